"""GR00T-N1.5: a vision-language model that runs once per observation, and a flow-matching head that reads it.

Time runs from 0 (noise) to 1 (action): x_t = (1 - t) noise + t actions, and the model predicts the velocity
actions - noise. Times are rounded to buckets before the model sees them. Formulas follow NVIDIA's Isaac-GR00T, release
n1.5, whose files lerobot 0.4 and 0.5 carry.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from clp_jax.aliases import AnyArray, Array, Leaf, Tree
from clp_jax.errors import InputError
from clp_jax.models.groot.architecture import Architecture
from clp_jax.models.groot.dropout import SEED
from clp_jax.models.groot.head import ActionHead
from clp_jax.models.groot.qwen import Qwen
from clp_jax.models.groot.transformer import Captured, KeysValues
from clp_jax.models.layers.scan import Rows, pinned
from clp_jax.models.layers.siglip import Siglip
from clp_jax.models.towers import Capture, Gates, TowerStates


class PoolingHead(nn.Module):
    """Parameters of SigLIP's pooling head under PyTorch's names and shapes, so that a checkpoint goes through whole.

    Nothing in GR00T reads them.
    """

    width: int
    mlp_dim: int

    def setup(self) -> None:
        d, f = self.width, self.mlp_dim
        shapes = {
            "probe": (1, 1, d),
            "attention": {"in_proj_weight": (3 * d, d), "in_proj_bias": (3 * d,), "out_proj": _dense(d, d)},
            "layernorm": {"weight": (d,), "bias": (d,)},
            "mlp": {"fc1": _dense(f, d), "fc2": _dense(d, f)},
        }
        for name, shape in shapes.items():
            self.param(name, lambda _, s: jax.tree.map(jnp.zeros, s, is_leaf=_is_shape), shape)

    def __call__(self) -> None:
        """Declares the parameters."""


class Backbone(nn.Module):
    """Images and prompt to features of the language model."""

    architecture: Architecture
    rows: Rows = None

    def setup(self) -> None:
        a = self.architecture
        self.vision = Siglip(a.vision, None, a.dtype, a.remat, self.rows)
        self.mlp1 = nn.Dense(a.llm.width, dtype=a.dtype)
        self.llm = Qwen(a.llm, a.vocab_size, a.padding, a.lm_head, a.dtype, a.remat, self.rows)
        if a.pooling_head:
            self.vision_head = PoolingHead(a.vision.width, a.vision.mlp_dim)

    def __call__(
        self, inputs: Mapping[str, Leaf], gates: Gates, *, capture: Capture
    ) -> tuple[Float[Array, "b s d"], Bool[Array, "b s"], dict[str, TowerStates]]:
        """Features, which tokens are real, and the states of ``vision`` and ``llm`` if captured."""
        if self.is_initializing() and self.architecture.pooling_head:
            self.vision_head()
        size = self.architecture.vision.image_size
        images = jnp.stack([model_image(inputs[f"image/{name}"], size) for name in cameras(inputs)], axis=1)
        b, c = images.shape[:2]
        images = pinned(images.reshape(b * c, *images.shape[2:]), self.rows)
        encoded, vision = self.vision(images, gates=gates.get("vision"), capture=bool(capture))
        features = self.mlp1(encoded).reshape(b, c * encoded.shape[1], -1)
        ids = jnp.asarray(inputs["tokenized_prompt"])
        x = _with_images(self.llm.embed(ids), ids == self.architecture.image_token, features)
        valid = jnp.asarray(inputs["tokenized_prompt_mask"]).astype(bool)
        out, captured = self.llm(pinned(x, self.rows), valid, gates=gates.get("llm"), capture=capture)
        if vision is None or captured is None:
            return out, valid, {}
        vision = vision.reshape(vision.shape[0], *features.shape[:2], -1)
        seen = jnp.ones(features.shape[:2], bool)
        return out, valid, {"vision": TowerStates(vision, seen), "llm": _tower(captured, valid)}


class Groot(nn.Module):
    """The whole model."""

    architecture: Architecture
    rows: Rows = None

    def setup(self) -> None:
        self.backbone = Backbone(self.architecture, self.rows)
        self.action_head = ActionHead(self.architecture, self.rows)

    def __call__(
        self,
        inputs: Mapping[str, Leaf],
        noisy_actions: Float[AnyArray, "b *k horizon adim"],
        time: Float[AnyArray, "b *k"],
        *,
        gates: Gates = Gates(),
        capture: Capture = False,
    ) -> tuple[Float[Array, "b *k horizon adim"], dict[str, TowerStates]]:
        """The velocity at x_t.

        The prompt depends on neither noise nor time, so one pass over it serves k draws of them.

        Args:
          inputs: images, prompt, state and embodiment by flat key; in training also the seeds of its dropout.
          noisy_actions: x_t, one or k per observation.
          time: t in [0, 1), 0 is noise.
          gates: blocks to switch off.
          capture: also return the residual streams, and what is written into them.

        Returns:
          The velocity and, per tower, its states; empty if not captured. ``dit`` has the rows of all draws.
        """
        context, towers = self.context(inputs, gates, capture=capture)
        rows = jnp.asarray(noisy_actions).reshape(-1, *noisy_actions.shape[-2:])
        steps = time_bucket(jnp.asarray(time).reshape(-1), self.architecture.num_timestep_buckets)
        robot = inputs["state"], inputs["embodiment_id"]
        velocity, captured = self.action_head(
            context, context_mask(inputs), *robot, rows, steps, gates.get("dit"), inputs.get(SEED), capture=capture
        )
        if captured is not None:
            towers |= {"dit": _tower(captured, jnp.ones(captured.states.shape[1:3], bool))}
        return velocity.reshape(noisy_actions.shape), towers

    def context(
        self, inputs: Mapping[str, Leaf], gates: Gates, *, capture: Capture = False
    ) -> tuple[Float[Array, "b s d"], dict[str, TowerStates]]:
        """What the diffusion transformer reads, and the states of all towers before it."""
        features, valid, towers = self.backbone(inputs, gates, capture=capture)
        context, captured = self.action_head.refine(
            features, context_mask(inputs), gates.get("vl"), inputs.get(SEED), capture=capture
        )
        if captured is not None:
            towers |= {"vl": _tower(captured, valid)}
        return context, towers

    def prefill(self, inputs: Mapping[str, Leaf], gates: Gates) -> KeysValues:
        """Keys and values of the context in every block of the diffusion transformer that reads it."""
        context, _ = self.context(inputs, gates)
        return self.action_head.dit.keys_values(context)

    def denoise(
        self,
        inputs: Mapping[str, Leaf],
        seen: KeysValues,
        noisy_actions: Float[AnyArray, "b horizon adim"],
        steps: Int[AnyArray, " b"],
        gates: Gates,
    ) -> Float[Array, "b horizon adim"]:
        """The velocity at x_t against a prefilled context."""
        robot = inputs["state"], inputs["embodiment_id"]
        return self.action_head(
            seen, context_mask(inputs), *robot, noisy_actions, steps, gates.get("dit"), capture=False
        )[0]


def sample_actions(
    model: Groot, params: Tree, inputs: Mapping[str, Leaf], *, noise: Leaf, num_steps: int, gates: Gates = Gates()
) -> Float[Array, "b horizon adim"]:
    """Integrate the velocity from noise (t = 0) to actions (t = 1) with ``num_steps`` Euler steps.

    The prompt is encoded once; every step reads its keys and values.
    """
    variables, buckets = {"params": params}, model.architecture.num_timestep_buckets
    seen = model.apply(variables, inputs, gates, method="prefill")

    def step(x, bucket):
        steps = jnp.broadcast_to(bucket, x.shape[:1])
        velocity: Any = model.apply(variables, inputs, seen, x, steps, gates, method="denoise")
        return x + (velocity / num_steps).astype(x.dtype), None

    # In Python's floats, as upstream rounds them.
    times = np.array([int(i / num_steps * buckets) for i in range(num_steps)], np.int32)
    return jax.lax.scan(step, jnp.asarray(noise), jnp.asarray(times))[0]


def context_mask(inputs: Mapping[str, Leaf]) -> Bool[Array, "b s"] | None:
    """Which tokens of the prompt the action head reads, None for all: upstream reads the padding of a batch, too."""
    mask = inputs.get("context_mask")
    return None if mask is None else jnp.asarray(mask).astype(bool)


def time_bucket(time: Float[Array, " b"], buckets: int) -> Int[Array, " b"]:
    """Times rounded towards zero.

    >>> time_bucket(jnp.array([0.0, 0.7985, -0.0004]), 1000).tolist()
    [0, 798, 0]
    """
    return (time * buckets).astype(jnp.int32)


def cameras(inputs: Mapping[str, Leaf]) -> list[str]:
    """Cameras of an observation in the order in which the prompt names them: sorted, whatever the order of the keys."""
    return sorted(key.removeprefix("image/") for key in inputs if key.startswith("image/"))


def model_image(image: AnyArray, size: int) -> Float[Array, "b h w 3"]:
    """An image batch as the encoder reads it: float32 in [-1, 1].

    Args:
      image: uint8, or float32 in [-1, 1]; of the model's size, as processing makes it.
      size: edge of the model's images in pixels.

    Raises:
      InputError: the image is of another size.
    """
    x = jnp.asarray(image)
    if x.shape[1:] != (size, size, 3):
        raise InputError(
            f"an image of shape {x.shape[1:]} does not fit the model, which reads {(size, size, 3)}; resize it."
        )
    if x.dtype == jnp.uint8:
        return (x.astype(jnp.float32) / 255.0 - 0.5) / 0.5
    return x.astype(jnp.float32)


def _with_images(
    text: Float[Array, "b s d"], places: Bool[Array, "b s"], features: Float[Array, "b t d"]
) -> Float[Array, "b s d"]:
    """The embeddings with the images' tokens, in order, in the places kept for them."""
    index = jnp.clip(jnp.cumsum(places, axis=1) - 1, 0, features.shape[1] - 1)
    images = jnp.take_along_axis(features, index[..., None], axis=1)
    return jnp.where(places[..., None], images, text)


def _tower(captured: Captured, valid: Bool[Array, "b s"]) -> TowerStates:
    return TowerStates(captured.states, valid, captured.writes)


def _dense(out: int, width: int) -> dict[str, tuple[int, ...]]:
    return {"weight": (out, width), "bias": (out,)}


def _is_shape(node: Any) -> bool:
    return isinstance(node, tuple)
