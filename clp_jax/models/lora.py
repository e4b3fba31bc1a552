"""Gemma's weights with optional low-rank adapters, as openpi applies them.

Axes of an einsum weight: the last two are (in, out) in openpi's sense; ``lora_a`` replaces the last one by the rank,
``lora_b`` the one before it. The intermediate keeps the *output's* other labels, so in ``attn_vec_einsum`` the
sum over heads happens before ``lora_b`` and again inside it. Source: openpi models/lora.py, commit 15a9616.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Float

from clp_jax.aliases import Array

_ADAPTER_INIT = nn.initializers.normal(stddev=0.01)


class Einsum(nn.Module):
    """``einsum(equation, x, w)`` in x's dtype, plus ``scale`` times the adapter's product when ``lora_rank`` > 0."""

    shape: tuple[int, ...]
    initializer: nn.initializers.Initializer
    lora_rank: int = 0
    lora_scale: float = 1.0

    @nn.compact
    def __call__(self, equation: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
        w = self.param("w", self.initializer, self.shape)
        y = jnp.einsum(equation, x, w.astype(x.dtype))
        if not self.lora_rank:
            return y
        a = self.param("lora_a", _ADAPTER_INIT, (*self.shape[:-1], self.lora_rank))
        b = self.param("lora_b", _ADAPTER_INIT, (*self.shape[:-2], self.lora_rank, self.shape[-1]))
        down, up = adapter_equations(equation)
        low = jnp.einsum(down, x, a.astype(x.dtype))
        return y + jnp.einsum(up, low, b.astype(x.dtype)) * self.lora_scale


def adapter_equations(equation: str) -> tuple[str, str]:
    """The two einsums of an adapter on ``equation``, with ``r`` as the label of the rank.

    >>> adapter_equations("BTD,NDH->BTNH")
    ('BTD,NDr->BTNr', 'BTNr,NrH->BTNH')
    >>> adapter_equations("BTNH,NHD->BTD")
    ('BTNH,NHr->BTr', 'BTr,NrD->BTD')
    """
    inputs, output = equation.split("->")
    x, w = inputs.split(",")
    axis_in, axis_out = w[-2], w[-1]
    low = output.replace(axis_out, "r")
    return f"{x},{w.replace(axis_out, 'r')}->{low}", f"{low},{w.replace(axis_in, 'r')}->{output}"


class FeedForward(nn.Module):
    """Gemma's gated feed-forward, gelu(x W_0) * (x W_1) W; adapters add ``x a b`` without a scale."""

    width: int
    mlp_dim: int
    lora_rank: int = 0

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        gating = self._weight("gating_einsum", (2, self.width, self.mlp_dim), batch_axis=(0,))
        linear = self._weight("linear", (self.mlp_dim, self.width))
        hidden = nn.gelu(_product(x, *(w[0] for w in gating))) * _product(x, *(w[1] for w in gating))
        return _product(hidden, *linear)

    def _weight(self, name: str, shape: tuple[int, ...], batch_axis: tuple[int, ...] = ()) -> tuple[Array, ...]:
        """The weight alone, or the weight and its two adapter factors."""
        init = nn.initializers.lecun_normal(in_axis=-2, out_axis=-1, batch_axis=batch_axis)
        w = self.param(name, init, shape)
        if not self.lora_rank:
            return (w,)
        *lead, rows, columns = shape
        a = self.param(f"{name}_lora_a", _ADAPTER_INIT, (*lead, rows, self.lora_rank))
        b = self.param(f"{name}_lora_b", _ADAPTER_INIT, (*lead, self.lora_rank, columns))
        return w, a, b


def _product(x: Array, w: Array, *adapter: Array) -> Array:
    y = jnp.dot(x, w.astype(x.dtype))
    if not adapter:
        return y
    a, b = adapter
    return y + jnp.dot(jnp.dot(x, a.astype(x.dtype)), b.astype(x.dtype))
