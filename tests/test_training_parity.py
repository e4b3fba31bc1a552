"""Whole training steps beside those of openpi's own scripts/train.py, augmentation and random numbers included."""

import functools
import json
import zlib

import jax
import numpy as np
import pytest
from recordings import GOLDEN

from clp_jax.models import abstract_params
from clp_jax.models.layers.siglip import SiglipSizes
from clp_jax.models.pi0 import CAMERAS, PI0, Architecture, GemmaSizes
from clp_jax.training import OptimizerSettings, StepSettings, make_optimizer, make_state, train_step
from clp_jax.trees import flatten, unflatten

TOLERANCE = 2e-5
"""Relative; the losses are about 2. openpi's own two ways to run a step (jit, eager) differ by 2e-6 after one."""

SIZES = {
    "vision": SiglipSizes(width=16, depth=1, mlp_dim=24, num_heads=2, patch_size=14, num_tokens=256),
    "vlm": GemmaSizes(width=32, depth=2, mlp_dim=48, num_heads=2, num_kv_heads=1, head_dim=8),
    "action": GemmaSizes(width=24, depth=2, mlp_dim=40, num_heads=2, num_kv_heads=1, head_dim=8),
}


def recorded_params(architecture: Architecture) -> dict:
    """Values from the leaf's name alone, as the recording had them."""

    def values(path, shape):
        return (0.1 * np.random.default_rng(zlib.crc32(path.encode())).standard_normal(shape)).astype(np.float32)

    return unflatten({path: values(path, leaf.shape) for path, leaf in flatten(abstract_params(architecture)).items()})


def recorded_batch() -> dict[str, np.ndarray]:
    rng, batch = np.random.default_rng(0), {}
    for camera in CAMERAS:
        batch[f"image/{camera}"] = rng.integers(0, 256, (2, 224, 224, 3)).astype(np.uint8)
        batch[f"image_mask/{camera}"] = np.ones(2, bool)
    batch["state"] = rng.standard_normal((2, 6)).astype(np.float32)
    batch["tokenized_prompt"] = rng.integers(0, 64, (2, 6)).astype(np.int32)
    batch["tokenized_prompt_mask"] = np.arange(6) < np.array([[4], [6]])
    batch["actions"] = rng.standard_normal((2, 4, 6)).astype(np.float32)
    return batch


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_steps_equal_openpis(kind):
    sizes = {**SIZES, "kind": kind, "vocab_size": 64, "action_dim": 6, "dtype": "float32"}
    architecture = Architecture(**{**vars(PI0), **sizes})
    tx = make_optimizer(OptimizerSettings(warmup_steps=2, peak_lr=1e-3))
    state = make_state(jax.tree.map(jax.numpy.asarray, recorded_params(architecture)), tx, ema=True)
    step = jax.jit(functools.partial(train_step, architecture, tx, StepSettings()))
    rng, batch = jax.random.split(jax.random.key(42))[0], recorded_batch()
    for number, wanted in enumerate(json.loads((GOLDEN / "train_steps.json").read_text())[kind]):
        state, info = step(rng, state, batch)
        for name, value in wanted.items():
            np.testing.assert_allclose(float(info[name]), value, rtol=TOLERANCE, err_msg=f"{name} of step {number}")
