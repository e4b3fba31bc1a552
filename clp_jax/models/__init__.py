"""The π0 family in Flax, with openpi's parameter tree at any size."""

import jax
import jax.numpy as jnp

from clp_jax.models.architecture import PI0, PI0_FAST, PI05, Architecture, GemmaSizes, SiglipSizes, architecture_of
from clp_jax.models.observation import Observation
from clp_jax.models.pi0 import Gates, Pi0, TowerStates
from clp_jax.models.pi0_fast import Pi0Fast
from clp_jax.models.rows import Rows

Model = Pi0 | Pi0Fast

CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
"""openpi's camera names for π0 and π0.5."""

FAST_CAMERAS = ("base_0_rgb", "base_1_rgb", "wrist_0_rgb")
"""openpi's camera names for π0-FAST."""


def build(architecture: Architecture, rows: Rows = None) -> Model:
    """The model of an architecture, without parameters; ``rows`` is how a batch is split over devices."""
    return Pi0Fast(architecture, rows) if architecture.kind == "pi0_fast" else Pi0(architecture, rows)


def abstract_observation(
    architecture: Architecture, *, batch_size: int = 1, prompt_length: int = 48, state_dim: int | None = None
) -> Observation:
    """An observation of shapes only, with openpi's cameras."""
    size, fast = architecture.vision.image_size, architecture.kind == "pi0_fast"
    cameras = FAST_CAMERAS if fast else CAMERAS
    prompt = jax.ShapeDtypeStruct((batch_size, prompt_length), jnp.int32)
    prompt_mask = jax.ShapeDtypeStruct((batch_size, prompt_length), jnp.bool_)
    return Observation(
        images={camera: jax.ShapeDtypeStruct((batch_size, size, size, 3), jnp.float32) for camera in cameras},
        image_masks={camera: jax.ShapeDtypeStruct((batch_size,), jnp.bool_) for camera in cameras},
        state=jax.ShapeDtypeStruct((batch_size, state_dim or architecture.action_dim or 32), jnp.float32),
        tokenized_prompt=prompt,
        tokenized_prompt_mask=prompt_mask,
        token_ar_mask=prompt if fast else None,
        token_loss_mask=prompt_mask if fast else None,
    )


def init_params(architecture: Architecture, rng: jax.Array) -> dict:
    """Freshly initialised parameters, float32."""
    model = build(architecture)
    spec = abstract_observation(architecture, prompt_length=2)
    observation = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), spec)
    if isinstance(model, Pi0Fast):
        return model.init(rng, observation)["params"]
    actions = jnp.zeros((1, 1, architecture.action_dim), jnp.float32)
    return model.init(rng, observation, actions, jnp.ones(1, jnp.float32))["params"]


def abstract_params(architecture: Architecture) -> dict:
    """The parameter tree as ``jax.ShapeDtypeStruct``, float32, without allocating anything.

    >>> abstract_params(PI0)["PaliGemma"]["llm"]["layers"]["attn"]["q_einsum"]["w"].shape
    (18, 8, 2048, 256)
    """
    return jax.eval_shape(lambda rng: init_params(architecture, rng), jax.random.key(0))


__all__ = [
    "PI0",
    "PI05",
    "PI0_FAST",
    "Architecture",
    "Gates",
    "GemmaSizes",
    "Model",
    "Observation",
    "Pi0",
    "Pi0Fast",
    "Rows",
    "SiglipSizes",
    "TowerStates",
    "abstract_observation",
    "abstract_params",
    "architecture_of",
    "build",
    "init_params",
]
