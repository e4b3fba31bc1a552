"""One training step: a pure function of the state and a batch, which the loop jits and donates."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float

from clp_jax.aliases import Array, Leaf, Tree
from clp_jax.cuts import WHOLE, Cut, rows_of, smaller
from clp_jax.models import Architecture, Gates, Loss, Rows, build, family_of
from clp_jax.training.freezing import merge_parts, split_frozen
from clp_jax.training.state import TrainState
from clp_jax.training.teaching import Teaching, taught_loss
from clp_jax.trees import flatten, unflatten

_NO_KERNEL = ("bias", "scale", "pos_embedding", "input_embedding")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepSettings:
    """What is static in a step.

    Attributes:
      ema_decay: of the average of the parameters; None without.
      action_samples: draws of noise and time per observation, which share one pass over its images and prompt.
      accumulate: microbatches whose gradients are averaged before the update: the memory of one, the result of all.
      augment: crop, rotate and recolour the images as openpi does.
      frozen: names of parameters that are not trained.
      frozen_rows: (name, rows on axis 0) of parameters that are trained but for these rows.
      teaching: by a frozen model whose output is a second target; None without.
      cuts: that take turns, a step each.
    """

    ema_decay: float | None = 0.99
    action_samples: int = 1
    accumulate: int = 1
    augment: bool = True
    frozen: frozenset[str] = frozenset()
    frozen_rows: tuple[tuple[str, tuple[int, ...]], ...] = ()
    teaching: Teaching | None = None
    cuts: tuple[Cut, ...] = (WHOLE,)


class Means(NamedTuple):
    """Means over a batch, by name, and the weight of the batch beside others."""

    values: dict[str, Float[Array, "*parts"]]
    weight: Float[Array, "*parts"]


def train_step(
    architecture: Architecture,
    tx: optax.GradientTransformation,
    settings: StepSettings,
    rng: Array,
    state: TrainState,
    batch: Mapping[str, Leaf],
    *,
    teacher: Tree | None = None,
    rows: Rows = None,
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """Draw noise and times, take the gradient of the loss, update.

    Randomness is that of openpi's step (scripts/train.py, commit 15a9616) for the same ``rng``, so runs compare. With
    several action samples the loss is their mean, in expectation the same.

    Args:
      architecture: of the model.
      tx: from `make_optimizer`.
      settings: see `StepSettings`.
      rng: key of the run; that of the step is ``fold_in(rng, state.step)``.
      state: before the step.
      batch: model inputs by flat key, as in a ``.npz`` of observations.
      teacher: parameters of the model that teaches, if one does.
      rows: how a batch, and each of its parts, is split over devices.

    Returns:
      The state after the step, and ``loss``, with a teacher the parts that it is made of, ``grad_norm`` (before
      clipping) and ``param_norm`` (of the kernels).
    """
    family = family_of(architecture)
    trained, frozen = split_frozen(state.params, settings.frozen)
    key = jax.random.fold_in(rng, state.step)
    inputs, augmentation_key = family.draw(architecture, key, batch, settings.action_samples)

    def loss(cut: Cut, trained: Tree, inputs: Mapping[str, Leaf], number: Leaf) -> tuple[Float[Array, ""], Means]:
        if settings.augment:
            own = augmentation_key if settings.accumulate == 1 else jax.random.fold_in(augmentation_key, number)
            inputs = family.augment(architecture, own, inputs)
        model, params = smaller(architecture, cut), rows_of(architecture, merge_parts(trained, frozen), cut)
        parts = {}
        if settings.teaching is None:
            found = family.losses(build(model, rows), params, inputs, gates=Gates())
        else:
            assert teacher is not None, "a teacher without parameters has nothing to say"
            found, parts = taught_loss(settings.teaching, model, rows, params, teacher, inputs)
        means = Means({name: _weighted_mean(one) for name, one in {"loss": found, **parts}.items()}, found.weight.sum())
        return means.values["loss"], means

    def of_cut(cut: Cut) -> Callable[..., Any]:
        return functools.partial(_mean_gradient, functools.partial(loss, cut), parts=settings.accumulate)

    turns = [of_cut(cut) for cut in settings.cuts]
    means, gradient = (
        turns[0](trained, inputs)
        if len(turns) == 1
        else jax.lax.switch(state.step % len(turns), turns, trained, inputs)
    )
    gradient = _without_rows(gradient, settings.frozen_rows)  # no part of the norm to which it is clipped
    updates, opt_state = tx.update(gradient, state.opt_state, trained)
    updates = _without_rows(updates, settings.frozen_rows)  # which decay without a gradient
    params = merge_parts(optax.apply_updates(trained, updates), frozen)
    average = state.ema_params
    if settings.ema_decay is not None:
        decay = settings.ema_decay
        average = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, average, params)
    kernels = [x for path, x in flatten(params).items() if x.ndim > 1 and path.split("/")[-1] not in _NO_KERNEL]
    info = means | {"grad_norm": _norm(gradient), "param_norm": _norm(kernels)}
    return TrainState(state.step + 1, params, opt_state, average), info


def _without_rows(tree: Tree, rows: Sequence[tuple[str, Sequence[int]]]) -> Tree:
    """The tree with zeros in these rows of its leaves."""
    if not rows:
        return tree
    flat = flatten(tree)
    return unflatten(flat | {path: flat[path].at[jnp.asarray(numbers)].set(0) for path, numbers in rows})


def _weighted_mean(loss: Loss) -> Float[Array, ""]:
    """The loss of a batch, where draws of one observation count alike."""
    each = loss.each.reshape(len(loss.weight), -1).mean(axis=1)
    return jnp.sum(loss.weight * each) / jnp.sum(loss.weight)


def _norm(tree: Leaf) -> Float[Array, ""]:
    """Of all leaves as one vector (optax's own function changed its name between the releases we support)."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(tree)))


def _mean_gradient(
    loss: Callable[..., Any], trained: Tree, rows: dict[str, Leaf], parts: int
) -> tuple[dict[str, Array], Any]:
    """Means and gradient of the loss over ``parts`` microbatches that run one after another, as of the whole batch."""
    gradient_and_means = jax.grad(loss, has_aux=True)
    if parts == 1:
        gradient, means = gradient_and_means(trained, rows, 0)
        return means.values, gradient
    # Strided, so that every device finds its share of each microbatch among the rows that it already has.
    micro = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), rows)

    def add(total, part):
        gradient, means = gradient_and_means(trained, *part)
        return jax.tree.map(lambda old, x: old + means.weight * x, total, gradient), means

    total, (values, weight) = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, trained), (micro, jnp.arange(parts)))
    share = weight / weight.sum()
    return jax.tree.map(lambda x: jnp.sum(share * x), values), jax.tree.map(lambda x: x / weight.sum(), total)
