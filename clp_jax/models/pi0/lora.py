"""Gemma's weights with optional low-rank adapters, as openpi applies them.

Axes of an einsum weight: the last two are (in, out) in openpi's sense; ``lora_a`` replaces the last one by the rank,
``lora_b`` the one before it. The intermediate keeps the *output's* other labels, so in ``attn_vec_einsum`` the
sum over heads happens before ``lora_b`` and again inside it. Source: openpi models/lora.py, commit 15a9616.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from clp_jax.aliases import AnyArray, Array, Tree
from clp_jax.errors import InputError
from clp_jax.models.layers import lora
from clp_jax.models.pi0.architecture import Architecture

RANKS = 16, 32
"""openpi's of VLM and action expert, ``gemma_2b_lora`` and ``gemma_300m_lora``; alpha equals the rank."""

RULES = ((".*lora.*", False), ("PaliGemma/llm/.*", True))
"""openpi's rule of what is frozen in a model with adapters: of the language stack only the adapters are trained."""

_ADAPTER_INIT = nn.initializers.normal(stddev=0.01)


class Einsum(nn.Module):
    """``einsum(equation, x, w)`` in x's dtype, plus ``scale`` times the adapter's product when ``lora_rank`` > 0.

    ``part`` takes a part of the weight's first axis.
    """

    shape: tuple[int, ...]
    initializer: nn.initializers.Initializer
    lora_rank: int = 0
    lora_scale: float = 1.0

    @nn.compact
    def __call__(self, equation: str, x: Float[Array, "..."], part: slice = slice(None)) -> Float[Array, "..."]:
        w = self.param("w", self.initializer, self.shape)[part]
        y = jnp.einsum(equation, x, w.astype(x.dtype))
        if not self.lora_rank:
            return y
        a = self.param("lora_a", _ADAPTER_INIT, (*self.shape[:-1], self.lora_rank))
        b = self.param("lora_b", _ADAPTER_INIT, (*self.shape[:-2], self.lora_rank, self.shape[-1]))
        down, up = adapter_equations(equation)
        low = jnp.einsum(down, x, a[part].astype(x.dtype))
        return y + jnp.einsum(up, low, b[part].astype(x.dtype)) * self.lora_scale


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

    def setup(self) -> None:
        self.gating = self._weight("gating_einsum", (2, self.width, self.mlp_dim), batch_axis=(0,))
        self.linear = self._weight("linear", (self.mlp_dim, self.width))

    def hidden(self, x: Float[Array, "b s d"]) -> Float[Array, "b s f"]:
        """gelu(x W_0) * (x W_1)."""
        return nn.gelu(_product(x, *(w[0] for w in self.gating))) * _product(x, *(w[1] for w in self.gating))

    def write(self, hidden: Float[Array, "b s f"]) -> Float[Array, "b s d"]:
        """What is added to the stream."""
        return _product(hidden, *self.linear)

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


def merge_lora(tree: Tree, *, lora_scale: float = 1.0) -> dict:
    """The same model without adapters: every pair of factors is multiplied and added to its weight, in float32.

    Args:
      tree: parameters below ``params``, arrays of either library; a tree without adapters comes back as it is.
      lora_scale: alpha / rank of the attention adapters (openpi's feed-forward applies no scale).

    Returns:
      The tree without ``lora_a`` and ``lora_b``. Merged weights are float32 (openpi stores frozen ones in bfloat16,
      which would round the adapter away); every other leaf is the same object.

    Raises:
      InputError: an adapter has no weight, or only one factor.

    >>> mlp = {"linear": np.zeros((1, 2, 2)), "linear_lora_a": np.ones((1, 2, 1)), "linear_lora_b": np.ones((1, 1, 2))}
    >>> merge_lora({"mlp": mlp})["mlp"]["linear"].tolist()
    [[[1.0, 1.0], [1.0, 1.0]]]
    """
    return lora.merged(tree, adapter_paths, lambda path, w, a, b: merge_weight(path, w, a, b, lora_scale=lora_scale))


def lora_scale(architecture: Architecture, path: str) -> float:
    """alpha / rank of the attention adapters of the expert that a parameter belongs to."""
    second = any(part.endswith("_1") for part in path.split("/"))
    expert = architecture.action if second else architecture.vlm
    return 1.0 if expert is None else expert.lora_scale


def has_adapters(architecture: Architecture) -> bool:
    """Whether some expert has adapters."""
    return any(expert.attn_lora_rank or expert.ffn_lora_rank for expert in architecture.experts)


def without_adapters(architecture: Architecture) -> Architecture:
    """The architecture of the merged model."""
    plain: dict[str, Any] = {
        name: dataclasses.replace(getattr(architecture, name), attn_lora_rank=0, ffn_lora_rank=0, lora_scale=1.0)
        for name in architecture.groups[0]
    }
    return dataclasses.replace(architecture, **plain)


def with_adapters(architecture: Architecture, vlm_rank: int, action_rank: int) -> Architecture:
    """The architecture with adapters on the attention and the feed-forward of every expert.

    Raises:
      InputError: it has adapters already, or a rank is below 1.
    """
    if has_adapters(architecture):
        raise InputError("the checkpoint has LoRA adapters already; leave out --lora, they are trained as they are.")
    if min(vlm_rank, action_rank) < 1:
        raise InputError(f"--lora-ranks {vlm_rank} {action_rank} leaves an expert without; give ranks of at least 1.")
    vlm = dataclasses.replace(architecture.vlm, attn_lora_rank=vlm_rank, ffn_lora_rank=vlm_rank)
    action = architecture.action
    if action is not None:
        action = dataclasses.replace(action, attn_lora_rank=action_rank, ffn_lora_rank=action_rank)
    return dataclasses.replace(architecture, vlm=vlm, action=action)


def adapter_paths(path: str) -> tuple[str, str]:
    """Where the two factors of a weight's adapter would be.

    >>> adapter_paths("attn/q_einsum/w"), adapter_paths("mlp/linear")
    (('attn/q_einsum/lora_a', 'attn/q_einsum/lora_b'), ('mlp/linear_lora_a', 'mlp/linear_lora_b'))
    """
    stem = path.removesuffix("w") if path.endswith("/w") else f"{path}_"
    return f"{stem}lora_a", f"{stem}lora_b"


def merge_weight(
    path: str, w: Float[AnyArray, "*w"], a: Float[AnyArray, "*a"], b: Float[AnyArray, "*b"], *, lora_scale: float
) -> Float[AnyArray, "*w"]:
    """One weight plus its adapter, in float32; with or without the leading layer axis.

    In ``attn_vec_einsum`` every head n of the input is multiplied by its own ``a[n]``, summed over the heads, and the
    sum is multiplied by every ``b[n]``: what head n adds to the output is ``a[n] @ sum(b)``.

    Args:
      path: path of the weight, which tells how its adapter is applied.
      w: the weight, last axes (in, out).
      a: down, last axes (in, rank).
      b: up, last axes (rank, out).
      lora_scale: alpha / rank, for attention.
    """
    w, a, b = (x.astype(np.float32) for x in (w, a, b))
    if "/attn_vec_einsum" in f"/{path}":
        b = b.sum(axis=-3, keepdims=True)
    update = np.matmul(a, b) if isinstance(w, np.ndarray) else jnp.matmul(a, b, precision="highest")
    return w + update * (lora_scale if path.endswith("/w") else 1.0)
