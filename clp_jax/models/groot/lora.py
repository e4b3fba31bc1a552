"""Low-rank adapters on queries, keys and values, as NVIDIA's script adds them with peft (gr00t/utils/peft.py, n1.5).

Upstream adapts the attention of the action head, both transformers, or of the whole model. There what is frozen runs
as in inference, so that no inputs are left out of the adapters of the language model and of the image encoder.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from clp_jax.aliases import AnyArray, Array, Tree
from clp_jax.errors import InputError
from clp_jax.models.groot.architecture import Architecture
from clp_jax.models.groot.dropout import Site, dropped
from clp_jax.models.layers import lora
from clp_jax.models.layers.lora import Adapters, adapted

RANKS = 0, 32, 0
"""Upstream's of the language model, of both transformers of the action head, and of the image encoder; 0 is none."""

_ALPHA = 16
"""Upstream's, at any rank."""

_DROPOUT = {"vl": 0.1, "dit": 0.1}
"""Upstream's, by tower."""

RULES = ((r".*/lora_[ab]", False), (".*", True))
"""In a model with adapters, they alone are trained, as with peft."""

_TOWERS = {
    "vision": "backbone/vision/",
    "llm": "backbone/llm/",
    "vl": "action_head/vl_self_attention/",
    "dit": "action_head/dit/",
}


class AdaptedDense(nn.Module):
    """A dense layer, plus ``scale`` times the adapter's product where there is one."""

    features: int
    dtype: str
    adapters: Adapters | None = None
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "*b i"], keys: Any = None, site: Site | None = None) -> Float[Array, "*b o"]:
        """What the layer makes of its inputs.

        Args:
          x: inputs.
          keys: of dropout, of the block [b]; the adapter reads all of the inputs if None.
          site: which of the block's masks is the adapter's.
        """
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
        x = x.astype(self.dtype)
        y = jnp.dot(x, jnp.asarray(kernel).astype(self.dtype))
        if self.use_bias:
            y = y + jnp.asarray(self.param("bias", nn.initializers.zeros_init(), (self.features,))).astype(self.dtype)
        if self.adapters is None:
            return y
        seen = x if site is None else dropped(x, keys, self.adapters.dropout, site)
        return adapted(self, y, seen, self.adapters)


def has_adapters(architecture: Architecture) -> bool:
    """Whether some tower has adapters."""
    return any(getattr(architecture, tower).adapters is not None for tower in _TOWERS)


def without_adapters(architecture: Architecture) -> Architecture:
    """The architecture of the merged model."""
    return _with(architecture, dict.fromkeys(_TOWERS))


def with_adapters(architecture: Architecture, llm_rank: int, head_rank: int, vision_rank: int) -> Architecture:
    """The architecture with adapters on queries, keys and values.

    Args:
      architecture: of a model without.
      llm_rank: of those in the language model; 0 leaves it without.
      head_rank: of those in both transformers of the action head; 0 leaves them without.
      vision_rank: of those in the image encoder; 0 leaves it without.

    Raises:
      InputError: it has adapters already, or shall get none.
    """
    if has_adapters(architecture):
        raise InputError("the checkpoint has LoRA adapters already; leave out --lora, they are trained as they are.")
    ranks = llm_rank, head_rank, vision_rank
    if min(ranks) < 0 or not any(ranks):
        given = " ".join(map(str, ranks))
        raise InputError(f"--lora-ranks {given} gives no adapter; give at least one rank above 0.")
    return with_ranks(architecture, {"vision": vision_rank, "llm": llm_rank, "vl": head_rank, "dit": head_rank})


def with_ranks(architecture: Architecture, ranks: dict[str, int]) -> Architecture:
    """The architecture with adapters of these ranks, by tower; 0 is none."""
    scale = architecture.lora_scale
    found = {
        tower: Adapters(rank, _ALPHA / rank if scale is None else scale, _DROPOUT.get(tower, 0.0)) if rank else None
        for tower, rank in ranks.items()
    }
    return _with(architecture, found)


def ranks_of(shapes: dict[str, tuple[int, ...]]) -> dict[str, int]:
    """Ranks of the adapters in a tree, by tower; 0 for a tower without.

    Args:
      shapes: of its leaves, by path.

    Raises:
      InputError: a tower has adapters of several ranks.
    """
    found = {}
    for tower, prefix in _TOWERS.items():
        ranks = {shape[-1] for path, shape in shapes.items() if path.startswith(prefix) and path.endswith("/lora_a")}
        if len(ranks) > 1:
            raise InputError(f"the adapters of tower {tower!r} have ranks {sorted(ranks)}, expected one.")
        found[tower] = next(iter(ranks), 0)
    return found


def lora_scale(architecture: Architecture, path: str) -> float:
    """alpha / rank of the adapters of the tower that a parameter belongs to."""
    found = next((getattr(architecture, tower).adapters for tower, at in _TOWERS.items() if path.startswith(at)), None)
    return 1.0 if found is None else found.scale


def adapter_paths(path: str) -> tuple[str, str]:
    """Where the two factors of a weight's adapter would be.

    >>> adapter_paths("attn/q/kernel")
    ('attn/q/lora_a', 'attn/q/lora_b')
    """
    stem = path.removesuffix("kernel")
    return f"{stem}lora_a", f"{stem}lora_b"


def merge_lora(tree: Tree, *, architecture: Architecture | None = None) -> dict:
    """The same model without adapters, merged in float32.

    Args:
      tree: parameters, or their shapes under ``jax.eval_shape``.
      architecture: of the model, for its scales; without one they are 1.

    Raises:
      InputError: an adapter has no weight, or only one factor.
    """

    def scaled(path: str, w: Any, a: Any, b: Any) -> Any:
        scale = 1.0 if architecture is None else lora_scale(architecture, path)
        return merge_weight(path, w, a, b, lora_scale=scale)

    return lora.merged(tree, adapter_paths, scaled)


def merge_weight(
    path: str, w: Float[AnyArray, "*w"], a: Float[AnyArray, "*a"], b: Float[AnyArray, "*b"], *, lora_scale: float
) -> Float[AnyArray, "*w"]:
    """One weight plus its adapter, in float32; with or without the leading layer axis.

    Args:
      path: of the weight; all are adapted alike.
      w: the weight [.., in, out], or by head [.., in, heads, channels].
      a: down [.., in, rank].
      b: up [.., rank, out].
      lora_scale: alpha / rank.
    """
    del path
    w, a, b = (x.astype(np.float32) for x in (w, a, b))
    update = np.matmul(a, b) if isinstance(w, np.ndarray) else jnp.matmul(a, b, precision="highest")
    return w + update.reshape(w.shape) * lora_scale


def _with(architecture: Architecture, adapters: dict[str, Adapters | None]) -> Architecture:
    sizes: dict[str, Any] = {
        tower: dataclasses.replace(getattr(architecture, tower), adapters=found) for tower, found in adapters.items()
    }
    return dataclasses.replace(architecture, **sizes)
