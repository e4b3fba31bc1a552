"""openpi's PyTorch π0 and π0.5: ``model.safetensors``, ``config.json`` and norm stats where openpi looks for them."""

import functools
import importlib.util
import shutil
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from etils import epath

from clp_jax.checkpoint import write_beside
from clp_jax.checkpoint.safetensors.tensorfile import TensorWriter, read_tensors
from clp_jax.errors import InputError
from clp_jax.export import reference
from clp_jax.export.result import Check, Options, check_tolerance, export_record, run_check, same_bits, write_json
from clp_jax.export.weights import Weights
from clp_jax.models import Architecture, blocks_of, family_of
from clp_jax.models.layers.torch_rules import Blocks, Layout, from_tensors, tensors_of, to_tensors

WEIGHTS_FILE = "model.safetensors"
LOADER = "check_openpi.py"
TEMPLATES = Path(__file__).resolve().parent / "templates"

LOAD = """In openpi's environment (its `transformers_replace` copied over transformers 4.53.2), with clp_jax installed
(its `openpi_patches` reads the depth from the weights):

```console
$ python -m openpi_patches scripts/serve_policy.py policy:checkpoint --policy.config=CONFIG --policy.dir=THIS_FOLDER
$ python THIS_FOLDER/check_openpi.py    # compares with the JAX model's actions in check.npz
```

`CONFIG` is the training config that the checkpoint was fine-tuned with. `create_trained_policy` casts weights to
bfloat16, whatever is stored. openpi's PyTorch computes the time embedding in float64 and its JAX code in float32, so
actions of a π0.5 differ by up to 2e-4 even in float32. The parameter `gemma_expert.lm_head` is zeros: the PyTorch
model has it, and nothing uses it."""


def write(weights: Weights, folder: Path, options: Options) -> None:
    """Writes everything but the comparison into a folder that is being staged."""
    family = family_of(weights.architecture)
    zeros = family.zero_tensors(weights.architecture, weights.leaves)
    write_tensors(weights, folder / WEIGHTS_FILE, zeros=zeros)
    config = family.torch_config
    write_json(folder / "config.json", config(weights.architecture, options.lengths, weights.dtype or "float32"))
    write_beside(epath.Path(folder), assets=weights.spec.assets, record=weights.spec.plan_record)
    shutil.copyfile(TEMPLATES / LOADER, folder / LOADER)


def check(weights: Weights, folder: Path, options: Options) -> Check:
    """Maps the file back to the JAX tree, bit for bit, and runs openpi's model if openpi is there."""
    count = check_tensors(weights, folder / WEIGHTS_FILE)
    what = "sampled actions of openpi's PI0Pytorch and of the JAX model, float32 on CPU"
    missing = None if options.run else "not asked for (--check bits)"
    if options.run:
        write_reference(weights, folder, options)
        write_json(folder / "export.json", export_record(weights, "openpi-pytorch", options, None))
        missing = _missing()
    difference, missing = run_check(folder / LOADER, missing=missing)
    check_tolerance(difference)
    return Check(count, difference, what, missing)


def check_architecture(architecture: Architecture) -> None:
    """Refuses what openpi's PyTorch model cannot be.

    Raises:
      InputError: a kind of model without PyTorch code, or sizes that its code does not have.
    """
    if (reason := family_of(architecture).why_no_torch(architecture, "openpi-pytorch")) is not None:
        raise InputError(reason)


def write_tensors(weights: Weights, file: Path, *, zeros: Mapping[str, jax.ShapeDtypeStruct], prefix: str = "") -> None:
    """Streams the weights into a safetensors file in PyTorch's names.

    Args:
      weights: without adapters.
      file: to create.
      zeros: tensors that the file needs and no parameter stands for.
      prefix: of every name.
    """
    layout, blocks = _layout(weights)
    tensors = tensors_of(weights.leaves, layout, blocks) | dict(zeros)
    tensors = {prefix + name: tensor for name, tensor in tensors.items()}
    with TensorWriter(file, tensors, {"format": "pt"}) as writer:
        for name, tensor in to_tensors(weights.leaves, layout, blocks, weights.parts):
            writer.write(prefix + name, [tensor])
        for name in zeros:
            writer.write(prefix + name, None)


def check_tensors(weights: Weights, file: Path, *, prefix: str = "") -> int:
    """Compares a file with what was to be written, in JAX's layout, bit for bit; returns how many parameters.

    Raises:
      InputError: they differ.
    """
    tensors = {name.removeprefix(prefix): tensor for name, tensor in read_tensors(file).items()}
    source = ((path, i, part) for path in weights.leaves for i, part in enumerate(weights.parts(path)))
    layout, blocks = _layout(weights)
    read_back = from_tensors(weights.leaves, layout, blocks, tensors)
    for (path, i, back), (expected_path, j, part) in zip(read_back, source, strict=True):
        assert (path, i) == (expected_path, j)
        if not same_bits(back, part):
            raise InputError(f"layer {i} of {path} does not read back as it was written; check the disk, export again.")
    return len(weights.leaves)


def _layout(weights: Weights) -> tuple[Layout, Blocks]:
    """The rule of every leaf, and which leaves are stacked."""
    family = family_of(weights.architecture)
    return family.stored_layout(weights.leaves, ()), functools.partial(blocks_of, family.STACKS)


def write_reference(weights: Weights, folder: Path, options: Options) -> None:
    """Writes ``check.npz``: inputs and the JAX model's actions."""
    inputs = reference.example_inputs(weights.architecture, options.lengths)
    actions = reference.run_model(weights.architecture, weights.read(), inputs, num_steps=options.num_steps)
    np.savez(folder / reference.CHECK_FILE, **inputs, actions=actions)


def _missing() -> str | None:
    """What the comparison needs and this Python lacks."""
    lacking = [name for name in ("torch", "transformers", "openpi") if importlib.util.find_spec(name) is None]
    if not lacking:
        return None
    return (
        f"needs {' and '.join(lacking)}, not installed here: run `python {LOADER}` of the export in openpi's "
        "environment (transformers 4.53.2 with openpi's transformers_replace) with clp_jax installed"
    )
