"""openpi's PyTorch π0 and π0.5: ``model.safetensors``, ``config.json`` and norm stats where openpi looks for them."""

import shutil
from pathlib import Path

from etils import epath

from clp_jax.checkpoint import write_beside
from clp_jax.errors import InputError
from clp_jax.export import upstream
from clp_jax.export.result import Check, Options, write_json
from clp_jax.export.tensors import check_tensors, write_tensors
from clp_jax.export.weights import Weights
from clp_jax.models import Architecture, family_of

LOADER = "check_openpi.py"

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
    write_tensors(weights, folder, zeros=zeros)
    config = family.torch_config
    write_json(folder / "config.json", config(weights.architecture, options.lengths, weights.dtype or "float32"))
    write_beside(epath.Path(folder), assets=weights.spec.assets, record=weights.spec.plan_record)
    shutil.copyfile(upstream.TEMPLATES / LOADER, folder / LOADER)


def check(weights: Weights, folder: Path, options: Options) -> Check:
    """Maps the file back to the JAX tree, bit for bit, and runs openpi's model if openpi is there."""
    count = check_tensors(weights, folder)
    what = "sampled actions of openpi's PI0Pytorch and of the JAX model, float32 on CPU"
    difference, missing = upstream.compare(
        weights,
        folder,
        options,
        target="openpi-pytorch",
        script=LOADER,
        modules=("torch", "transformers", "openpi"),
        where="in openpi's environment (transformers 4.53.2 with openpi's transformers_replace) with clp_jax installed",
    )
    return Check(count, difference, what, missing)


def check_architecture(architecture: Architecture) -> None:
    """Refuses what openpi's PyTorch model cannot be.

    Raises:
      InputError: a kind of model without PyTorch code, or sizes that its code does not have.
    """
    if (reason := family_of(architecture).why_no_torch(architecture, "openpi-pytorch")) is not None:
        raise InputError(reason)
