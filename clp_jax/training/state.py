"""What changes from step to step, and how it starts: abstract first, then sharded, then filled."""

import jax
import jax.numpy as jnp
import optax
from flax import struct

from clp_jax.aliases import Leaf, Tree
from clp_jax.training.freezing import split_frozen
from clp_jax.trees import flatten, unflatten


@struct.dataclass
class TrainState:
    """A run between two steps.

    Attributes:
      step: steps done, int32 [].
      params: nested dict of the live parameters, frozen ones included.
      opt_state: of the trained parameters.
      ema_params: exponential moving average of ``params``; None without.
    """

    step: Leaf
    params: Leaf
    opt_state: Leaf
    ema_params: Leaf = None


def make_state(
    params: Tree, tx: optax.GradientTransformation, *, frozen: frozenset[str] = frozenset(), ema: bool = False
) -> TrainState:
    """The state before the first step; takes ``jax.ShapeDtypeStruct`` too, under ``jax.eval_shape``.

    Args:
      params: parameters of the model.
      tx: from `make_optimizer`.
      frozen: names of parameters that are not trained; they have no optimiser state.
      ema: keep an average.
    """
    trained, _ = split_frozen(params, frozen)
    # The average is a buffer of its own: a donated state must not hold one twice.
    average = jax.tree.map(jnp.copy, dict(params)) if ema else None
    return TrainState(step=jnp.int32(0), params=dict(params), opt_state=tx.init(trained), ema_params=average)


def training_dtypes(tree: Tree, frozen: frozenset[str], *, frozen_dtype: str | None = "bfloat16") -> Tree:
    """The tree as ``jax.ShapeDtypeStruct`` in the dtypes that a run keeps: float32 where it trains (openpi's).

    Args:
      tree: parameters or their shapes.
      frozen: names of parameters that are not trained.
      frozen_dtype: their dtype; None keeps what they have.
    """

    def dtype(path: str, leaf: Leaf):
        return jnp.float32 if path not in frozen else (frozen_dtype or leaf.dtype)

    return unflatten({p: jax.ShapeDtypeStruct(leaf.shape, dtype(p, leaf)) for p, leaf in flatten(tree).items()})
