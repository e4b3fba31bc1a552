"""π0 and π0.5: a flow-matching action expert that reads a vision-language model block by block.

Time runs from 1 (noise) to 0 (action): x_t = t noise + (1 - t) actions, and the model predicts the velocity
noise - actions. π0 has a state token and mixes time into the action tokens; π0.5 has the state in the prompt and
time in adaRMS. Formulas and order of operations follow openpi models/pi0.py, commit 15a9616.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from clp_jax.aliases import AnyArray, Array, Tree
from clp_jax.models.layers.attention import attention_mask, token_positions
from clp_jax.models.layers.flow import noisy_actions, time_embedding, velocity_at
from clp_jax.models.layers.gating import repeated
from clp_jax.models.layers.scan import Rows, pinned
from clp_jax.models.layers.siglip import Siglip
from clp_jax.models.pi0.architecture import Architecture
from clp_jax.models.pi0.gemma import Gemma, KVCache
from clp_jax.models.pi0.observation import Observation, model_image
from clp_jax.models.towers import Capture, Gates, TowerStates


class PaliGemma(nn.Module):
    """The image encoder and the language stack, under openpi's names."""

    architecture: Architecture
    rows: Rows = None

    def setup(self) -> None:
        a = self.architecture
        fast = a.kind == "pi0_fast"
        self.img = Siglip(a.vision, a.vlm.width, a.dtype, a.remat, self.rows)
        skip_dead = not fast and (_skipping_pays() if a.skip_dead is None else a.skip_dead)
        self.llm = Gemma(a.experts, a.vocab_size, a.dtype, a.remat, fast, skip_dead, self.rows)

    def embed_prefix(
        self, observation: Observation, gates: Gates, *, capture: Capture
    ) -> tuple[Float[Array, "b p d"], Bool[Array, "b p"], dict[str, TowerStates]]:
        """Image tokens of every camera, then prompt tokens; their validity; the vision tower's states if captured."""
        cameras = list(observation.images)
        size = self.architecture.vision.image_size
        # One pass over all cameras: the encoder is compiled once and sees a larger batch.
        images = jnp.stack([model_image(observation.images[camera], size) for camera in cameras], axis=1)
        b, c = images.shape[:2]
        images = pinned(images.reshape(b * c, *images.shape[2:]), self.rows)
        encoded, states = self.img(images, gates=gates.get("vision"), capture=bool(capture))
        tokens = encoded.shape[1]
        masks = jnp.stack([jnp.asarray(observation.image_masks[camera]) for camera in cameras], axis=1)
        image_valid = jnp.repeat(masks, tokens, axis=1)
        text = self.llm.embed(jnp.asarray(observation.tokenized_prompt))
        prefix = jnp.concatenate([encoded.reshape(b, c * tokens, -1), text.astype(encoded.dtype)], axis=1)
        valid = jnp.concatenate([image_valid, jnp.asarray(observation.tokenized_prompt_mask)], axis=1)
        if states is None:
            return prefix, valid, {}
        states = states.reshape(states.shape[0], b, c * tokens, -1)
        return prefix, valid, {"vision": TowerStates(states, image_valid)}


class Pi0(nn.Module):
    """π0 or π0.5 by ``architecture.kind``; parameters are openpi's tree."""

    architecture: Architecture
    rows: Rows = None

    def setup(self) -> None:
        a = self.architecture
        assert a.action is not None and a.action_dim is not None
        width = a.action.width
        self.PaliGemma = PaliGemma(a, self.rows)
        self.action_in_proj = nn.Dense(width)
        if a.kind == "pi05":
            self.time_mlp_in, self.time_mlp_out = nn.Dense(width), nn.Dense(width)
        else:
            self.state_proj = nn.Dense(width)
            self.action_time_mlp_in, self.action_time_mlp_out = nn.Dense(width), nn.Dense(width)
        self.action_out_proj = nn.Dense(a.action_dim)

    def __call__(
        self,
        observation: Observation,
        noisy_actions: Float[AnyArray, "b *k horizon adim"],
        time: Float[AnyArray, "b *k"],
        *,
        gates: Gates = Gates(),
        capture: Capture = False,
    ) -> tuple[Float[Array, "b *k horizon adim"], dict[str, TowerStates]]:
        """The velocity at x_t, prefix and suffix in one pass, as training runs it.

        The prefix depends on neither noise nor time, so it can serve k draws of them: as the action expert's rows, k of
        which see the same prefix and none of which sees another.

        Args:
          observation: what the robot sees.
          noisy_actions: x_t, one or k per observation.
          time: t in (0, 1], 1 is noise.
          gates: blocks to switch off.
          capture: also return the residual streams, and what is written into them.

        Returns:
          v_t and, per tower (``vision``, ``vlm``, ``action``), its states; empty if not captured. ``action`` has the
          rows of all draws.
        """
        prefix, prefix_valid, towers = self.PaliGemma.embed_prefix(observation, gates, capture=capture)
        suffix, starts, condition = self.embed_suffix(observation, *_rows(noisy_actions, time))
        positions, mask = _suffix_view(prefix_valid, starts, suffix.shape[0])
        no_starts = jnp.zeros(prefix_valid.shape, dtype=bool)
        (_, out), _, states = self.PaliGemma.llm(
            [prefix, suffix],
            positions=[token_positions(prefix_valid), positions],
            masks=[attention_mask(prefix_valid, no_starts), mask],
            conditions=[None, condition],
            gates=language_gates(self.architecture, gates),
            capture=capture,
        )
        if states is not None:
            towers |= {
                "vlm": TowerStates(states[0].states, prefix_valid, states[0].writes),
                "action": TowerStates(states[1].states, jnp.ones(suffix.shape[:2], dtype=bool), states[1].writes),
            }
        return self._velocity(out, noisy_actions.shape), towers

    def prefill(self, observation: Observation, *, gates: Gates = Gates()) -> tuple[KVCache, Bool[Array, "b p"]]:
        """Keys and values of the prefix, which depends on neither noise nor time, and its validity."""
        prefix, valid, _ = self.PaliGemma.embed_prefix(observation, gates, capture=False)
        _, kv_cache, _ = self.PaliGemma.llm(
            [prefix, None],
            positions=[token_positions(valid), None],
            masks=[attention_mask(valid, jnp.zeros(valid.shape, dtype=bool)), None],
            gates=language_gates(self.architecture, gates),
        )
        return kv_cache, valid

    def denoise(
        self,
        observation: Observation,
        kv_cache: KVCache,
        prefix_valid: Bool[Array, "b p"],
        noisy_actions: Float[AnyArray, "b horizon adim"],
        time: Float[AnyArray, " b"],
        *,
        gates: Gates = Gates(),
    ) -> Float[Array, "b horizon adim"]:
        """The velocity at x_t against a prefilled prefix."""
        suffix, starts, condition = self.embed_suffix(observation, noisy_actions, time)
        positions, mask = _suffix_view(prefix_valid, starts, suffix.shape[0])
        (_, out), _, _ = self.PaliGemma.llm(
            [None, suffix],
            positions=[None, positions],
            masks=[None, mask],
            conditions=[None, condition],
            kv_cache=kv_cache,
            gates=language_gates(self.architecture, gates),
        )
        return self._velocity(out, noisy_actions.shape)

    def embed_suffix(
        self, observation: Observation, noisy_actions: Float[AnyArray, "r horizon adim"], time: Float[AnyArray, " r"]
    ) -> tuple[Float[Array, "r s d"], Bool[Array, " s"], Float[Array, "r d"] | None]:
        """Tokens of the action expert, where a new attention block starts, and the adaRMS condition (π0.5)."""
        rows, horizon = noisy_actions.shape[:2]
        actions = self.action_in_proj(noisy_actions)
        embedded_time = time_embedding(time, actions.shape[-1])
        first_action = jnp.arange(horizon) == 0
        if self.architecture.kind == "pi05":
            condition = nn.swish(self.time_mlp_out(nn.swish(self.time_mlp_in(embedded_time))))
            return actions, first_action, condition
        times = jnp.broadcast_to(embedded_time[:, None, :], actions.shape).astype(actions.dtype)
        mixed = self.action_time_mlp_in(jnp.concatenate([actions, times], axis=-1))
        tokens = self.action_time_mlp_out(nn.swish(mixed))
        state = repeated(self.state_proj(jnp.asarray(observation.state)), rows)[:, None, :]
        starts = jnp.concatenate([jnp.ones(1, dtype=bool), first_action])
        return jnp.concatenate([state, tokens], axis=1), starts, None

    def _velocity(self, out: Float[Array, "r s d"], shape: tuple[Any, ...]) -> Array:
        return self.action_out_proj(out[:, -shape[-2] :]).reshape(shape)


def language_gates(architecture: Architecture, gates: Gates) -> Float[Array, "depth e _b"] | None:
    """The gates of the language stack, one column per expert; None where no tower of it is gated."""
    names = architecture.groups[0]
    if not any(name in gates for name in names):
        return None
    depth = architecture.vlm.depth
    columns = [jnp.asarray(gates.get(name, jnp.ones((depth, 1)))) for name in names]
    width = max(column.shape[1] for column in columns)
    return jnp.stack([jnp.broadcast_to(column, (depth, width)) for column in columns], axis=1)


def _rows(noisy_actions: AnyArray, time: AnyArray) -> tuple[AnyArray, AnyArray]:
    """All draws of all observations on one axis; those of an observation are neighbours."""
    return noisy_actions.reshape(-1, *noisy_actions.shape[-2:]), time.reshape(-1)


def _suffix_view(
    prefix_valid: Bool[Array, "b p"], starts: Bool[Array, " s"], rows: Any
) -> tuple[Int[Array, "r s"], Bool[Array, "r s t"]]:
    """Positions of the suffix, which count on from the prefix, and its mask over prefix and suffix."""
    valid = jnp.ones((rows, len(starts)), dtype=bool)
    to_suffix = attention_mask(valid, jnp.broadcast_to(starts, valid.shape))
    prefix_valid = repeated(prefix_valid, rows)
    to_prefix = jnp.broadcast_to(prefix_valid[:, None, :], (*valid.shape, prefix_valid.shape[1]))
    positions = jnp.sum(prefix_valid, axis=-1, dtype=jnp.int32)[:, None] + token_positions(valid)
    return positions, jnp.concatenate([to_prefix, to_suffix], axis=-1)


def compute_loss(
    model: Pi0,
    params: Tree,
    observation: Observation,
    actions: Float[AnyArray, "b horizon adim"],
    *,
    noise: Float[AnyArray, "b *k horizon adim"],
    time: Float[AnyArray, "b *k"],
    gates: Gates = Gates(),
) -> Float[Array, "b *k horizon"]:
    """Flow-matching loss with given noise and times: the mean square over the action dimensions.

    Noise and times have an axis more than the actions' batch where k draws of them share one pass over the prefix.
    """
    x_t = noisy_actions(actions, noise, time)
    velocity, _ = model.apply({"params": params}, observation, x_t, time, gates=gates)
    return squared_error(velocity, velocity_at(actions, noise, time))


def squared_error(
    velocity: Float[Array, "b *k horizon adim"], wanted: Float[AnyArray, "b *k horizon adim"]
) -> Float[Array, "b *k horizon"]:
    """The mean square over the action dimensions, in float32."""
    return jnp.mean(jnp.square(velocity.astype(jnp.float32) - wanted), axis=-1)


def sample_actions(
    model: Pi0,
    params: Tree,
    observation: Observation,
    *,
    noise: Float[AnyArray, "b horizon adim"],
    num_steps: int = 10,
    gates: Gates = Gates(),
) -> Float[Array, "b horizon adim"]:
    """Integrate the velocity from noise (t = 1) to actions (t = 0) with ``num_steps`` Euler steps.

    The prefix is encoded once; every step reads its keys and values.
    """
    variables = {"params": params}
    kv_cache, prefix_valid = model.apply(variables, observation, gates=gates, method="prefill")
    dt = -1.0 / num_steps

    def step(_, carry):
        x, time = carry
        times = jnp.broadcast_to(time, (x.shape[0],))
        inputs = observation, kv_cache, prefix_valid, x, times
        velocity: Any = model.apply(variables, *inputs, gates=gates, method="denoise")
        return x + (dt * velocity).astype(x.dtype), time + dt

    # The time is accumulated, not multiplied, as upstream does: the float32 roundings are part of its answer.
    actions, _ = jax.lax.fori_loop(0, num_steps, step, (noise, jnp.float32(1.0)))
    return actions


def draw_noise_and_time(
    rng: Array, shape: tuple[int, int, int], samples: int = 1
) -> tuple[Float[Array, "b *k horizon adim"], Float[Array, "b *k"]]:
    """What openpi's ``compute_loss(rng, ...)`` draws for actions of this shape: normal noise and t ~ Beta(1.5, 1).

    Args:
      rng: key.
      shape: of the actions [b, horizon, adim].
      samples: draws per observation. One is openpi's. More are stacked on an axis behind the batch: the first is
        openpi's, and draw j what openpi draws with ``fold_in(rng, j + 2)``, as its own draw uses up children 0 to 2.
    """
    if samples == 1:
        return _draw(rng, shape)
    keys = [rng, *(jax.random.fold_in(rng, j + 2) for j in range(1, samples))]
    noise, time = zip(*(_draw(key, shape) for key in keys), strict=True)
    return jnp.stack(noise, axis=1), jnp.stack(time, axis=1)


def _draw(rng: Array, shape: tuple[int, int, int]) -> tuple[Array, Array]:
    _, noise_rng, time_rng = jax.random.split(rng, 3)
    time = jax.random.beta(time_rng, 1.5, 1, shape[:1]) * 0.999 + 0.001
    return jax.random.normal(noise_rng, shape), time


def _skipping_pays() -> bool:
    """Whether a block that is left out by a conditional saves time.

    XLA's CPU compiler of jax 0.5.3 runs what is inside a conditional partly on one thread: a training step took 12 %
    less CPU time than openpi's, and 23 % longer. That of jax 0.10.2 does not.
    """
    return jax.__version_info__ > (0, 5, 3) or jax.default_backend() != "cpu"
