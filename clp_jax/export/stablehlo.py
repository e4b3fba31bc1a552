"""The sampling loop as one portable program (``jax.export``), weights beside it, and a loader without model code."""

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from clp_jax.checkpoint import FolderSpec, Spec, write_beside
from clp_jax.checkpoint.carrying import copy_all
from clp_jax.checkpoint.orbax.spec import POLICY
from clp_jax.checkpoint.safetensors.folder import CONFIG_FILE
from clp_jax.checkpoint.safetensors.listing import WEIGHTS_FILE
from clp_jax.checkpoint.safetensors.tensorfile import TensorWriter, read_tensors
from clp_jax.errors import InputError
from clp_jax.export import reference
from clp_jax.export.result import TOLERANCE, Check, Options, check_tolerance, run_check, same_bits, write_json
from clp_jax.export.upstream import TEMPLATES
from clp_jax.export.weights import Weights
from clp_jax.models import Architecture, Gates, build, family_of
from clp_jax.trees import unflatten

PROGRAM_FILE = "model.stablehlo"
LOADER = "load_stablehlo.py"
_BATCH = "b"

LOAD = f"""With jax, flatbuffers, safetensors and numpy installed, from this folder:

```python
from load_stablehlo import load

sample_actions = load()
actions = sample_actions(**inputs)    # the arrays that signature.json names
```

```console
$ python load_stablehlo.py    # compares with the recorded actions in check.npz
```

The program is `jax.export` output, made with JAX {jax.__version__}. JAX promises that releases of the six months after
it can load it, and those of the three weeks before it. Seen: a program of 0.5.3 runs in 0.10.2; one of 0.10.2 does not
load in 0.5.3, and `load` says so. The weights are arguments of the program, in `model.safetensors` under the names of
the JAX model. Inputs are normalised, tokenised and padded as the model's own project does it; what the checkpoint had
for that, such as norm stats, is in `assets`."""
_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
_BFLOAT16_TOLERANCE = 0.1
"""Two compilations of one bfloat16 model differ by up to 0.03, as those of openpi do."""


def write(weights: Weights, folder: Path, options: Options) -> None:
    """Writes everything but the comparison into a folder that is being staged."""
    inputs = abstract_inputs(weights.architecture, options)
    program = export_program(weights, inputs, options)
    (folder / PROGRAM_FILE).write_bytes(program.serialize())
    write_json(folder / "signature.json", signature(weights, inputs, options, program))
    with TensorWriter(folder / WEIGHTS_FILE, weights.leaves, {"format": "flax"}) as writer:
        for path in weights.leaves:
            writer.write(path, weights.parts(path))
    _write_beside(weights.spec, epath.Path(folder))
    shutil.copyfile(TEMPLATES / LOADER, folder / LOADER)


def _write_beside(spec: Spec, folder: epath.Path) -> None:
    """The assets of a step; of a folder of safetensors files all but the weights, where the steps of a run have it."""
    if isinstance(spec, FolderSpec):
        policy = folder / "assets" / POLICY
        policy.mkdir(parents=True)
        write_json(Path(policy / CONFIG_FILE), spec.config)
        copy_all(spec.others, policy)
    write_beside(folder, assets=None if isinstance(spec, FolderSpec) else spec.assets, record=spec.plan_record)


def check(weights: Weights, folder: Path, options: Options) -> Check:
    """Reads the weights back bit for bit, and runs the loader that lies in the folder, in a process of its own."""
    tensors = read_tensors(folder / WEIGHTS_FILE)
    for path in weights.leaves:
        layers = tensors[path] if weights.stacked(path) else [tensors[path]]
        if not all(same_bits(a, b) for a, b in zip(weights.parts(path), layers, strict=True)):
            raise InputError(f"{path} does not read back as it was written; check the disk and export again.")
    dtype = weights.architecture.dtype
    what = f"sampled actions of the program, run by {LOADER}, and of the JAX model, activations {dtype}"
    missing = None if options.run else "not asked for (--check bits)"
    if options.run:
        rows = options.batch_size
        inputs = reference.example_inputs(weights.architecture, options.lengths, batch_size=rows or 2)
        actions = reference.run_model(
            weights.architecture, weights.read(), inputs, num_steps=options.num_steps, dtype=dtype
        )
        np.savez(folder / reference.CHECK_FILE, **inputs, actions=actions)
        missing = _missing(options)
    difference, missing = run_check(folder / LOADER, missing=missing)
    check_tolerance(difference, _tolerance(weights.architecture))
    return Check(len(weights.leaves), difference, what, missing)


def check_possible(architecture: Architecture, options: Options) -> None:
    """Refuses what cannot be exported.

    Raises:
      InputError: a model that has no sampling of actions, a platform that JAX does not know, or flatbuffers is missing.
    """
    if importlib.util.find_spec("flatbuffers") is None:
        raise InputError('JAX saves programs with flatbuffers, which is not installed: pip install "clp-jax[export]".')
    if unknown := sorted(set(options.platforms) - set(_PLATFORMS)):
        raise InputError(
            f"there is no platform {', '.join(unknown)}; --platforms takes some of {','.join(_PLATFORMS)}."
        )
    if (reason := family_of(architecture).why_no_actions(architecture)) is not None:
        raise InputError(f"there is no program of actions to export: {reason}")


def abstract_inputs(architecture: Architecture, options: Options) -> dict[str, jax.ShapeDtypeStruct]:
    """Names, shapes and dtypes of the program's inputs; the batch is a symbol where none is fixed."""
    example = reference.example_inputs(architecture, options.lengths)
    from jax import export

    batch: Any = options.batch_size if options.batch_size is not None else export.symbolic_shape(_BATCH)[0]
    return {name: jax.ShapeDtypeStruct((batch, *array.shape[1:]), array.dtype) for name, array in example.items()}


def export_program(weights: Weights, inputs: dict[str, jax.ShapeDtypeStruct], options: Options) -> Any:
    """Traces and lowers the sampling for all platforms; no parameter is read."""
    from jax import export

    family, model = family_of(weights.architecture), build(weights.architecture)

    def sample(parameters: dict, arrays: dict) -> jax.Array:
        params = unflatten(parameters)
        return family.sample(model, params, arrays, noise=arrays["noise"], num_steps=options.num_steps, gates=Gates())

    return export.export(jax.jit(sample), platforms=options.platforms)(dict(weights.leaves), inputs)


def signature(
    weights: Weights, inputs: dict[str, jax.ShapeDtypeStruct], options: Options, program: Any
) -> dict[str, Any]:
    """``signature.json``: what the program takes and gives, and who can run it."""
    a = weights.architecture
    return {
        "inputs": {
            name: {"shape": [n if isinstance(n, int) else str(n) for n in x.shape], "dtype": x.dtype.name}
            for name, x in inputs.items()
        },
        "output": {
            "shape": [str(options.batch_size or _BATCH), options.lengths.horizon, a.action_dim],
            "dtype": "float32",
        },
        "about": {
            "image/<camera>": "uint8 0..255, height x width x channels, or any content where image_mask is false",
            "state": "normalised and padded",
            "noise": "normal; the output is normalised and padded, too",
        },
        "activations": a.dtype,
        "num_steps": options.num_steps,
        "platforms": list(program.platforms),
        "calling_convention_version": program.calling_convention_version,
        "tolerance": _tolerance(a),
        "exported_by": {"jax": jax.__version__},
    }


def _tolerance(architecture: Architecture) -> float:
    return TOLERANCE if architecture.dtype == "float32" else _BFLOAT16_TOLERANCE


def _missing(options: Options) -> str | None:
    if importlib.util.find_spec("safetensors") is None:
        return f"needs safetensors, not installed here: pip install safetensors, then `python {LOADER}` in the export"
    here = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    if here not in options.platforms:
        return f"needs one of {', '.join(options.platforms)}, this machine runs {here}: `python {LOADER}` there"
    return None
