"""SmolVLA: a flow-matching action expert that reads a small vision-language model block by block.

Time runs from 1 (noise) to 0 (action): x_t = t noise + (1 - t) actions, and the model predicts the velocity
noise - actions. Formulas and order of operations follow lerobot 0.6.1.
"""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from clp_jax.aliases import AnyArray, Array, Leaf, Tree
from clp_jax.errors import InputError
from clp_jax.models.layers.attention import attention_mask, token_positions
from clp_jax.models.layers.gating import repeated
from clp_jax.models.layers.scan import Rows, pinned
from clp_jax.models.layers.siglip import Siglip
from clp_jax.models.smolvla.architecture import Architecture
from clp_jax.models.smolvla.decoder import Decoder, Place, rms_norm
from clp_jax.models.smolvla.images import folded, model_image
from clp_jax.models.smolvla.times import accurate_time_embedding
from clp_jax.models.smolvla.weights import Pair, Stream, Streams
from clp_jax.models.towers import Capture, Gates, TowerStates


class SmolVLA(nn.Module):
    """The model; parameters are those of lerobot's, blocks of one kind stacked."""

    architecture: Architecture
    rows: Rows = None

    def setup(self) -> None:
        a = self.architecture
        table, init = (a.vocab_size, a.vlm.width), nn.initializers.normal(stddev=0.02)
        self.vision = Siglip(a.vision, None, a.dtype, a.remat, self.rows)
        self.connector = nn.Dense(a.vlm.width, use_bias=False, dtype=a.dtype)
        self.embed_tokens = self.param("embed_tokens", init, table)
        # Nothing reads the logits, but a checkpoint holds their table.
        self.lm_head = self.param("lm_head", init, table)
        self.vlm, self.action = Stream(a, "vlm"), Stream(a, "action")
        self.state_proj = nn.Dense(a.vlm.width, dtype=jnp.float32)
        self.action_in_proj = nn.Dense(a.action.width, dtype=jnp.float32)
        self.action_time_mlp_in = nn.Dense(a.action.width, dtype=jnp.float32)
        self.action_time_mlp_out = nn.Dense(a.action.width, dtype=jnp.float32)
        self.action_out_proj = nn.Dense(a.action_dim, dtype=jnp.float32)

    def __call__(
        self,
        inputs: Mapping[str, Leaf],
        noisy_actions: Float[AnyArray, "b *k horizon adim"],
        time: Float[AnyArray, "b *k"],
        *,
        gates: Gates = Gates(),
        capture: Capture = False,
    ) -> tuple[Float[Array, "b *k horizon adim"], dict[str, TowerStates]]:
        """The velocity at x_t, prefix and actions in one pass, as training runs it.

        The prefix depends on neither noise nor time, so it can serve k draws of them: as the action expert's rows, k of
        which see the same prefix and none of which sees another.

        Args:
          inputs: what the robot sees, by flat key.
          noisy_actions: x_t, one or k per observation.
          time: t in (0, 1], 1 is noise.
          gates: blocks to switch off.
          capture: also return the residual streams, and what is written into them.

        Returns:
          v_t in float32 and, per tower (``vision``, ``vlm``, ``action``), its states; empty if not captured. ``action``
          has the rows of all draws.
        """
        prefix, valid, starts, towers = self.embed_prefix(inputs, gates, capture=capture)
        suffix = self.embed_suffix(*_rows(noisy_actions, time))
        places = Streams(_prefix_place(valid, starts), _suffix_place(valid, *suffix.shape[:2]))
        streams, _, captured = self._decode(places, Streams(prefix, suffix), gates, capture=capture)
        if captured is not None:
            states, writes = captured
            towers |= {
                "vlm": TowerStates(states.vlm, valid, writes.vlm),
                "action": TowerStates(states.action, jnp.ones(suffix.shape[:2], dtype=bool), writes.action),
            }
        return self._velocity(streams.action, noisy_actions.shape), towers

    def prefill(self, inputs: Mapping[str, Leaf], *, gates: Gates = Gates()) -> tuple[Pair, Bool[Array, "b p"]]:
        """What the actions see of the prefix in every block, which depends on neither noise nor time; its validity."""
        prefix, valid, starts, _ = self.embed_prefix(inputs, gates, capture=False)
        places = Streams(_prefix_place(valid, starts), None)
        return self._decode(places, Streams(prefix, None), gates)[1], valid

    def denoise(
        self,
        cache: Pair,
        prefix_valid: Bool[Array, "b p"],
        noisy_actions: Float[AnyArray, "b horizon adim"],
        time: Float[AnyArray, " b"],
        *,
        gates: Gates = Gates(),
    ) -> Float[Array, "b horizon adim"]:
        """The velocity at x_t against a prefilled prefix."""
        suffix = self.embed_suffix(noisy_actions, time)
        places = Streams(None, _suffix_place(prefix_valid, *suffix.shape[:2]))
        streams, _, _ = self._decode(places, Streams(None, suffix), gates, cache)
        return self._velocity(streams.action, noisy_actions.shape)

    def embed_prefix(
        self, inputs: Mapping[str, Leaf], gates: Gates, *, capture: Capture
    ) -> tuple[Float[Array, "b p d"], Bool[Array, "b p"], Bool[Array, "b p"], dict[str, TowerStates]]:
        """Tokens of images, prompt and state; which are real; which open a new attention block; the vision's states.

        A camera that is not there makes the prefix shorter, unless ``empty_cameras`` keeps its place after the others.
        Such a place is masked, so that nothing but its length matters: its tokens are zeros here.
        """
        a = self.architecture
        images, image_valid, towers = self._embed_cameras(inputs, gates, capture=capture)
        prompt = self._embed(inputs["tokenized_prompt"])
        # The factor is exact here, and rounded to the activation dtype for images: both are lerobot's.
        prompt = (prompt.astype(jnp.float32) * math.sqrt(a.vlm.width)).astype(a.dtype)
        state = self.state_proj(jnp.asarray(inputs["state"]))[:, None, :].astype(a.dtype)
        tokens = jnp.concatenate([images, prompt, state], axis=1)
        no_padding = jnp.ones(state.shape[:2], dtype=bool)
        valid = jnp.concatenate([image_valid, jnp.asarray(inputs["tokenized_prompt_mask"]), no_padding], axis=1)
        missing = max(a.prefix_length - tokens.shape[1], 0)
        starts = jnp.arange(tokens.shape[1] + missing) == tokens.shape[1] - 1
        tokens, valid = jnp.pad(tokens, ((0, 0), (0, missing), (0, 0))), jnp.pad(valid, ((0, 0), (0, missing)))
        return tokens, valid, jnp.broadcast_to(starts, valid.shape), towers

    def embed_suffix(
        self, noisy_actions: Float[AnyArray, "r horizon adim"], time: Float[AnyArray, " r"]
    ) -> Float[Array, "r horizon d"]:
        """Tokens of the action expert: actions and time, mixed in float32."""
        a = self.architecture
        actions = self.action_in_proj(noisy_actions)
        times = accurate_time_embedding(time, a.action.width, a.min_period, a.max_period)
        times = jnp.broadcast_to(times[:, None, :], actions.shape)
        mixed = self.action_time_mlp_in(jnp.concatenate([actions, times], axis=-1))
        return self.action_time_mlp_out(nn.silu(mixed)).astype(a.dtype)

    def _embed_cameras(
        self, inputs: Mapping[str, Leaf], gates: Gates, *, capture: Capture
    ) -> tuple[Array, Array, dict[str, TowerStates]]:
        a = self.architecture
        cameras = cameras_of(a, inputs)
        # One pass over all cameras: the encoder is compiled once and sees a larger batch.
        images = jnp.stack([model_image(inputs[f"image/{c}"], a.vision.image_size) for c in cameras], axis=1)
        b, count = images.shape[:2]
        images = pinned(images.reshape(b * count, *images.shape[2:]), self.rows)
        encoded, states = self.vision(images, gates=gates.get("vision"), capture=bool(capture))
        tokens = self.connector(folded(encoded, a.scale_factor))
        tokens = tokens * jnp.asarray(math.sqrt(a.vlm.width), tokens.dtype)
        masks = jnp.stack([jnp.asarray(inputs[f"image_mask/{camera}"]) for camera in cameras], axis=1)
        towers = {}
        if states is not None:
            states = states.reshape(states.shape[0], b, count * states.shape[2], -1)
            towers = {"vision": TowerStates(states, jnp.repeat(masks, a.vision.num_tokens, axis=1))}
        empty = min(len(a.cameras) - count, a.empty_cameras)
        tokens = jnp.pad(tokens.reshape(b, count, *tokens.shape[1:]), ((0, 0), (0, empty), (0, 0), (0, 0)))
        valid = jnp.repeat(jnp.pad(masks, ((0, 0), (0, empty)))[:, :, None], tokens.shape[2], axis=2)
        if a.image_tokens is not None:
            tokens, valid = self._framed(tokens, valid, *a.image_tokens)
        return tokens.reshape(b, -1, tokens.shape[-1]), valid.reshape(b, -1), towers

    def _framed(self, tokens: Array, valid: Array, fake: int, whole: int) -> tuple[Array, Array]:
        """Images [b, c, t, d] between special tokens, which are real even where the image is not."""
        frame = self._embed(jnp.array([fake, whole, fake]))
        frame = jnp.broadcast_to(frame, (*tokens.shape[:2], *frame.shape))
        tokens = jnp.concatenate([frame[:, :, :2], tokens, frame[:, :, 2:]], axis=2)
        return tokens, jnp.pad(valid, ((0, 0), (0, 0), (2, 1)), constant_values=True)

    def _embed(self, tokens: AnyArray) -> Array:
        return jnp.take(self.embed_tokens, jnp.asarray(tokens), axis=0).astype(self.architecture.dtype)

    def _decode(
        self, places: Streams, tokens: Streams, gates: Gates, cache: Pair | None = None, *, capture: Capture = False
    ) -> tuple[Streams, Pair, tuple[Streams, Streams] | None]:
        weights = Streams(self.vlm()[0], self.action()[0])
        decoder = Decoder(self.architecture, places, self.rows, capture)
        own_gates = Streams(gates.get("vlm"), gates.get("action"))
        return decoder.run(weights if cache is None else Streams(None, weights.action), tokens, own_gates, cache)

    def _velocity(self, out: Float[Array, "r s d"], shape: tuple[Any, ...]) -> Array:
        _, norm = self.action()
        out = rms_norm(out, norm, self.architecture.rms_eps)
        return self.action_out_proj(out.astype(jnp.float32)).reshape(shape)


def cameras_of(architecture: Architecture, inputs: Mapping[str, Leaf]) -> list[str]:
    """The cameras that are there, in the order in which the model reads them.

    Raises:
      InputError: there is none, or one that the model does not have.
    """
    given = {key.removeprefix("image/") for key in inputs if key.startswith("image/")}
    known = ", ".join(architecture.cameras)
    if unknown := sorted(given - set(architecture.cameras)):
        raise InputError(f"the model has no camera {unknown[0]}; it has {known}.")
    if not given:
        raise InputError(f"there is no image; give one for a camera of the model at least: {known}.")
    return [camera for camera in architecture.cameras if camera in given]


def _rows(noisy_actions: AnyArray, time: AnyArray) -> tuple[AnyArray, AnyArray]:
    """All draws of all observations on one axis; those of an observation are neighbours."""
    return noisy_actions.reshape(-1, *noisy_actions.shape[-2:]), time.reshape(-1)


def _prefix_place(valid: Array, starts: Array) -> Place:
    """Positions of the prefix and who sees whom in it; the state opens a block of its own."""
    return Place(token_positions(valid), attention_mask(valid, starts))


def _suffix_place(prefix_valid: Array, rows: Any, horizon: int) -> Place:
    """Positions of the actions, which count on from the prefix, and their mask over prefix and actions: causal."""
    valid = jnp.ones((rows, horizon), dtype=bool)
    prefix_valid = repeated(prefix_valid, rows)
    to_prefix = jnp.broadcast_to(prefix_valid[:, None, :], (*valid.shape, prefix_valid.shape[1]))
    positions = jnp.sum(prefix_valid, axis=-1, dtype=jnp.int32)[:, None] + token_positions(valid)
    return Place(positions, jnp.concatenate([to_prefix, attention_mask(valid, valid)], axis=-1))


def sample_actions(
    model: SmolVLA,
    params: Tree,
    inputs: Mapping[str, Leaf],
    *,
    noise: Float[AnyArray, "b horizon adim"],
    num_steps: int,
    gates: Gates = Gates(),
) -> Float[Array, "b horizon adim"]:
    """Integrate the velocity from noise (t = 1) to actions (t = 0) with ``num_steps`` Euler steps.

    The prefix is encoded once; every step reads what the expert sees of it.
    """
    variables = {"params": params}
    cache, prefix_valid = model.apply(variables, inputs, gates=gates, method="prefill")
    dt = -1.0 / num_steps
    times = np.array([1.0 + step * dt for step in range(num_steps)], np.float32)

    def step(x, time):
        now = jnp.broadcast_to(time, (x.shape[0],))
        velocity: Any = model.apply(variables, cache, prefix_valid, x, now, gates=gates, method="denoise")
        return x + dt * velocity, None

    return jax.lax.scan(step, jnp.asarray(noise, jnp.float32), times)[0]
