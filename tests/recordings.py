"""Recordings of the real openpi: what went in, what came out, and how closely we must agree.

Tolerances are absolute, on values of magnitude 1 to 20. In float32 openpi's own jitted and eager runs differ by up
to 3e-6 in outputs; between JAX versions, fusion choices and processors (AVX2, AVX-512) we see up to 2.1e-5 in the
deepest hidden states.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from clp_jax.checkpoint import read_params, read_spec
from clp_jax.models import build
from clp_jax.models.pi0 import Architecture, Observation, architecture_of, sample_actions

GOLDEN = Path(__file__).parent / "golden"
KEEP9 = (0, 1, 2, 3, 5, 8, 11, 14, 17)
"""The blocks that the *_pruned9 recordings keep."""

HIDDEN_TOLERANCE = 4e-5
OUTPUT_TOLERANCE = 1e-5
SAMPLE_TOLERANCE = 1e-5
KV_TOLERANCE = 5e-5
"""Keys and values are sums over the width of the deepest hidden states, each with its own HIDDEN_TOLERANCE."""

optimised = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 3})
"""``jax.jit`` as it is outside the tests, whose level (`conftest`) may round another way and, with jax 0.5.3, runs four
times as long: for equality to the bit, and for what takes longer to run than to compile."""

_CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
_FAST_CAMERAS = ("base_0_rgb", "base_1_rgb", "wrist_0_rgb")


@functools.cache
def recording(name: str) -> dict[str, np.ndarray]:
    """The arrays of ``golden_<name>.npz``."""
    with np.load(GOLDEN / f"golden_{name}.npz") as archive:
        return {key: archive[key] for key in archive.files}


@functools.cache
def checkpoint(name: str) -> dict:
    """The parameters of a recorded checkpoint, as NumPy arrays."""
    return read_params(read_spec(GOLDEN / "ckpt" / name))


@functools.cache
def images() -> dict[str, np.ndarray]:
    """The recorded images as openpi saw them, converted in NumPy: bfloat16 rounding would show a last bit."""
    with np.load(GOLDEN / "images_u8.npz") as archive:
        return {key: archive[key].astype(np.float32) / 255.0 * 2.0 - 1.0 for key in archive.files}


def observation(kind: str) -> Observation:
    """The three recorded observations; the second lacks its third camera, the third its second."""
    g = recording(kind)
    cameras = _FAST_CAMERAS if kind == "pi0_fast" else _CAMERAS
    return Observation(
        images={camera: images()[source] for camera, source in zip(cameras, _CAMERAS, strict=True)},
        image_masks={camera: g[f"image_mask/{camera}"] for camera in cameras},
        state=g["state"],
        tokenized_prompt=g["tokenized_prompt"],
        tokenized_prompt_mask=g["tokenized_prompt_mask"],
        token_ar_mask=g.get("token_ar_mask"),
        token_loss_mask=g.get("token_loss_mask"),
    )


def pruned(params: dict, keep: tuple[int, ...] = KEEP9) -> dict:
    """Slices written out by hand, not by the code under test."""
    llm = dict(params["PaliGemma"]["llm"])
    llm["layers"] = jax.tree.map(lambda leaf: leaf[list(keep)], llm["layers"])
    return params | {"PaliGemma": params["PaliGemma"] | {"llm": llm}}


@functools.cache
def _everything(architecture: Architecture):
    model = build(architecture)

    @optimised
    def run(params, obs, actions, noise, time, sample_noise):
        t = time[:, None, None]
        velocity, towers = model.apply({"params": params}, obs, t * noise + (1 - t) * actions, time, capture=True)
        # Not compute_loss, which would run the model again; it is tested with its gradient.
        loss = jnp.mean(jnp.square(velocity.astype(jnp.float32) - (noise - actions)), axis=-1)
        sampled = sample_actions(model, params, obs, noise=sample_noise, num_steps=10)
        return {"v_t": velocity, "towers": towers, "loss": loss, "sampled_actions": sampled}

    return run


def run(kind: str, params: dict, *, dtype: str = "float32", lora_scale: float = 1.0) -> dict:
    """Velocity, hidden states, loss and sampled actions of our model on the recorded inputs."""
    g = recording(kind)
    architecture = architecture_of(params, dtype=dtype, lora_scale=lora_scale)
    inputs = (g[key] for key in ("actions", "noise", "time", "sample_noise"))
    return _everything(architecture)(params, observation(kind), *inputs)


def largest_difference(ours, theirs) -> float:
    """max |a - b| in float64."""
    a, b = (np.asarray(jnp.asarray(x, jnp.float32), np.float64) for x in (ours, theirs))
    assert a.shape == b.shape
    return float(np.abs(a - b).max())
