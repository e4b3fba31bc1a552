"""One training step: a pure function of the state and a batch, which the loop jits and donates."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float

from clp_jax.aliases import Array, Leaf, Tree
from clp_jax.data import observation_of
from clp_jax.errors import InputError
from clp_jax.models import Architecture, Model, Pi0Fast, Rows, build, pi0, pi0_fast
from clp_jax.models.pi0.augmentation import augment
from clp_jax.models.pi0.observation import model_image
from clp_jax.training.freezing import merge_parts, split_frozen
from clp_jax.training.state import TrainState
from clp_jax.trees import flatten

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
    """

    ema_decay: float | None = 0.99
    action_samples: int = 1
    accumulate: int = 1
    augment: bool = True
    frozen: frozenset[str] = frozenset()


def train_step(
    architecture: Architecture,
    tx: optax.GradientTransformation,
    settings: StepSettings,
    rng: Array,
    state: TrainState,
    batch: Mapping[str, Leaf],
    *,
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
      rows: how a batch, and each of its parts, is split over devices.

    Returns:
      The state after the step, and ``loss``, ``grad_norm`` (before clipping) and ``param_norm`` (of the kernels).
    """
    model = build(architecture, rows)
    trained, frozen = split_frozen(state.params, settings.frozen)
    key = jax.random.fold_in(rng, state.step)
    inputs, augmentation_key = _draw(model, key, batch, settings.action_samples)

    def loss(trained: Tree, inputs: Mapping[str, Leaf], number: Leaf) -> Float[Array, ""]:
        if settings.augment:
            own = augmentation_key if settings.accumulate == 1 else jax.random.fold_in(augmentation_key, number)
            inputs = _augmented(architecture.vision.image_size, own, inputs)
        return jnp.mean(model_loss(model, merge_parts(trained, frozen), inputs))

    value, gradient = _mean_gradient(loss, trained, inputs, settings.accumulate)
    updates, opt_state = tx.update(gradient, state.opt_state, trained)
    params = merge_parts(optax.apply_updates(trained, updates), frozen)
    average = state.ema_params
    if settings.ema_decay is not None:
        decay = settings.ema_decay
        average = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, average, params)
    kernels = [x for path, x in flatten(params).items() if x.ndim > 1 and path.split("/")[-1] not in _NO_KERNEL]
    info = {"loss": value, "grad_norm": _norm(gradient), "param_norm": _norm(kernels)}
    return TrainState(state.step + 1, params, opt_state, average), info


def model_loss(model: Model, params: Tree, rows: Mapping[str, Leaf]) -> Float[Array, "b *draws_and_horizon"]:
    """openpi's loss of each observation (and action of the chunk); flow matching reads ``noise`` and ``time``."""
    observation = observation_of(rows)
    if isinstance(model, Pi0Fast):
        return pi0_fast.compute_loss(model, params, observation)
    return pi0.compute_loss(model, params, observation, rows["actions"], noise=rows["noise"], time=rows["time"])


def _norm(tree: Leaf) -> Float[Array, ""]:
    """Of all leaves as one vector (optax's own function changed its name between the releases we support)."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(tree)))


def _draw(model: Model, key: Array, batch: Mapping[str, Leaf], samples: int) -> tuple[dict[str, Leaf], Array]:
    """The batch with fresh noise and times, and the key of the augmentation."""
    if isinstance(model, Pi0Fast):
        if samples != 1:
            raise InputError(f"a π0-FAST draws no noise: {samples} action samples make no sense, leave 1.")
        return dict(batch), key
    noise, time = pi0.draw_noise_and_time(key, batch["actions"].shape, samples)
    return {**batch, "noise": noise, "time": time}, jax.random.split(key, 3)[0]


def _augmented(size: int, key: Array, rows: Mapping[str, Leaf]) -> dict[str, Leaf]:
    images = {key.removeprefix("image/"): model_image(x, size) for key, x in rows.items() if key.startswith("image/")}
    return {**rows, **{f"image/{camera}": image for camera, image in augment(key, images).items()}}


def _mean_gradient(loss: Callable[..., Array], trained: Tree, rows: dict[str, Leaf], parts: int) -> tuple[Array, Any]:
    """Value and gradient of the loss, averaged over ``parts`` microbatches that run one after another."""
    value_and_gradient = jax.value_and_grad(loss)
    if parts == 1:
        return value_and_gradient(trained, rows, 0)
    # Strided, so that every device finds its share of each microbatch among the rows that it already has.
    micro = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), rows)

    def add(total, part):
        return jax.tree.map(jnp.add, total, value_and_gradient(trained, *part)), None

    zeros = jax.tree.map(jnp.zeros_like, (jnp.float32(0), trained))
    total, _ = jax.lax.scan(add, zeros, (micro, jnp.arange(parts)))
    return jax.tree.map(lambda x: x / parts, total)
