"""What lies around the diffusion transformer: encoders of state and actions, and a decoder, per embodiment."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, UInt32

from clp_jax.aliases import AnyArray, Array
from clp_jax.models.groot.architecture import Architecture
from clp_jax.models.groot.dit import Dit, waves
from clp_jax.models.groot.transformer import BLOCK_EPS, Captured, KeysValues, SelfAttentionTransformer, norm
from clp_jax.models.layers.gating import repeated
from clp_jax.models.layers.scan import Rows, pinned
from clp_jax.models.towers import Capture


class EmbodimentDense(nn.Module):
    """A dense layer with weights and bias of its own for every embodiment; each row takes those of its robot."""

    embodiments: int
    features: int
    dtype: str

    @nn.compact
    def __call__(self, x: Float[AnyArray, "r t i"], embodiment: Int[AnyArray, " r"]) -> Float[Array, "r t o"]:
        shape = (self.embodiments, x.shape[-1], self.features)
        w = self.param("W", nn.initializers.normal(0.02), shape)
        bias = self.param("b", nn.initializers.zeros_init(), (self.embodiments, self.features))
        robots = jnp.asarray(embodiment)
        weights, biases = (jnp.asarray(p)[robots].astype(self.dtype) for p in (w, bias))
        return jnp.einsum("rti,rio->rto", jnp.asarray(x).astype(self.dtype), weights) + biases[:, None]


class TwoLayers(nn.Module):
    """Two layers per embodiment with a ReLU between."""

    embodiments: int
    hidden: int
    features: int
    dtype: str

    def setup(self) -> None:
        self.layer1 = EmbodimentDense(self.embodiments, self.hidden, self.dtype)
        self.layer2 = EmbodimentDense(self.embodiments, self.features, self.dtype)

    def __call__(self, x: Float[AnyArray, "r t i"], embodiment: Int[AnyArray, " r"]) -> Float[Array, "r t o"]:
        return self.layer2(nn.relu(self.layer1(x, embodiment)), embodiment)


class ActionEncoder(nn.Module):
    """Actions and the sines and cosines of a rounded time, mixed per embodiment."""

    embodiments: int
    width: int
    dtype: str

    def setup(self) -> None:
        self.W1, self.W2, self.W3 = (EmbodimentDense(self.embodiments, self.width, self.dtype) for _ in range(3))

    def __call__(
        self, actions: Float[AnyArray, "r horizon adim"], steps: Int[AnyArray, " r"], embodiment: Int[AnyArray, " r"]
    ) -> Float[Array, "r horizon d"]:
        x = self.W1(actions, embodiment)
        half = self.width // 2
        angles = waves(steps, np.arange(half) / half)
        time = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1).astype(x.dtype)
        mixed = jnp.concatenate([x, jnp.broadcast_to(time[:, None], x.shape)], axis=-1)
        return self.W3(nn.silu(self.W2(mixed, embodiment)), embodiment)


class ActionHead(nn.Module):
    """From the language model's features to velocities."""

    architecture: Architecture
    rows: Rows = None

    def setup(self) -> None:
        a = self.architecture
        width, dtype = a.dit.width, a.dtype
        self.vlln = norm(epsilon=BLOCK_EPS, dtype=dtype)
        self.vl_self_attention = SelfAttentionTransformer(a.vl, dtype, a.remat, self.rows)
        self.state_encoder = TwoLayers(a.embodiments, a.hidden_width, width, dtype)
        self.action_encoder = ActionEncoder(a.embodiments, width, dtype)
        self.future_tokens = self.param("future_tokens", nn.initializers.normal(0.02), (a.future_tokens, width))
        self.position_embedding = self.param("position_embedding", nn.initializers.normal(0.02), (a.max_seq_len, width))
        self.dit = Dit(a.dit, a.vl.width, dtype, a.remat, self.rows)
        self.action_decoder = TwoLayers(a.embodiments, a.hidden_width, a.action_dim, dtype)

    def refine(
        self,
        features: Float[Array, "b s d"],
        mask: Bool[Array, "b s"] | None,
        gates: Any,
        seeds: UInt32[AnyArray, " b"] | None = None,
        *,
        capture: Capture,
    ) -> tuple[Array, Captured | None]:
        """The diffusion transformer's context, and what was captured in the transformer that makes it."""
        return self.vl_self_attention(self.vlln(features), mask, seeds, gates=gates, capture=capture)

    def __call__(
        self,
        context: Float[Array, "b s d"] | KeysValues,
        mask: Bool[Array, "b s"] | None,
        state: Float[AnyArray, "b p"],
        embodiment: Int[AnyArray, " b"],
        noisy_actions: Float[AnyArray, "r horizon adim"],
        steps: Int[AnyArray, " r"],
        gates: Any,
        seeds: UInt32[AnyArray, " b"] | None = None,
        *,
        capture: Capture,
    ) -> tuple[Float[Array, "r horizon adim"], Captured | None]:
        """Velocities, and what was captured in the diffusion transformer; one or several rows per observation."""
        rows, horizon = noisy_actions.shape[:2]
        robots = repeated(jnp.asarray(embodiment), rows)
        actions = self.action_encoder(noisy_actions, steps, robots)
        actions = actions + jnp.asarray(self.position_embedding)[:horizon].astype(actions.dtype)
        state_token = repeated(self.state_encoder(jnp.asarray(state)[:, None], embodiment), rows)
        future = jnp.asarray(self.future_tokens).astype(actions.dtype)
        future = jnp.broadcast_to(future, (rows, *future.shape))
        tokens = pinned(jnp.concatenate([state_token, future, actions], axis=1), self.rows)
        out, captured = self.dit(tokens, steps, context, mask, seeds, gates=gates, capture=capture)
        return self.action_decoder(out[:, -horizon:], robots), captured
