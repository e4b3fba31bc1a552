"""Run this export in openpi's own PyTorch model and compare with the JAX model's recorded actions.

Run it with Python in openpi's environment (transformers 4.53.2 with openpi's transformers_replace) with clp_jax
installed, which brings openpi_patches. `load_model` is what openpi's `create_trained_policy` does.
"""

import json
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent


def load_model(folder=HERE, dtype="float32"):
    """openpi's PI0Pytorch at the depth of the weights; every parameter is loaded, or this raises."""
    from openpi.models import pi0_config

    import openpi_patches

    openpi_patches.install()
    sizes = json.loads((folder / "config.json").read_text())
    names = ("action_dim", "action_horizon", "max_token_len", "pi05", "paligemma_variant", "action_expert_variant")
    chosen = {name: sizes[name] for name in names}
    config = pi0_config.Pi0Config(dtype=dtype, pytorch_compile_mode=None, **chosen)
    train_config = type("TrainConfig", (), {"model": config})
    model = config.load_pytorch(train_config, str(folder / "model.safetensors"))
    return model.eval()


def observation_of(arrays):
    """The recorded inputs as openpi's Observation of tensors."""
    import torch
    from openpi.models import model as openpi_model

    nested = {"image": {}, "image_mask": {}}
    for key, array in arrays.items():
        group, _, camera = key.partition("/")
        (nested[group] if camera else nested)[camera or key] = torch.from_numpy(array)
    return openpi_model.Observation.from_dict(nested)


def largest_difference(folder=HERE):
    """max |PyTorch - JAX| over the recorded actions."""
    import torch

    options = json.loads((folder / "export.json").read_text())["options"]
    with np.load(folder / "check.npz") as archive:
        arrays = dict(archive)
    expected, noise = arrays.pop("actions"), torch.from_numpy(arrays.pop("noise"))
    model = load_model(folder)
    actions = model.sample_actions("cpu", observation_of(arrays), noise=noise, num_steps=options["num_steps"])
    return float(np.abs(actions.numpy() - expected).max())


if __name__ == "__main__":
    difference = largest_difference()
    if "--json" in sys.argv:
        print(json.dumps({"largest_difference": difference}))
    else:
        print(f"largest difference of the actions from the JAX model: {difference:.1e}")
    sys.exit(not difference <= 1e-3)
