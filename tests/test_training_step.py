"""The arithmetic of a training step, on a family of two numbers, so that each can be checked by hand."""

import functools
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys

from clp_jax.models import Loss
from clp_jax.training import StepSettings, make_state, step, teaching, train_step
from clp_jax.training.teaching import Teaching

DECAY, RATE = 0.75, 0.5


def family(view=lambda key: jnp.zeros(())):
    """Observation i has the loss ``(w x_i + b - y_i + view)^2`` and the weight ``weight_i``."""

    def forward(model, params, inputs, *, gates, capture=False):
        return params["w"] * inputs["x"] + params["b"] + inputs["view"], {}

    def distance(architecture, output, other, inputs):
        return Loss(jnp.square(output - other), inputs["weight"])

    def loss_of(architecture, output, inputs):
        return distance(architecture, output, inputs["y"], inputs)

    return types.SimpleNamespace(
        draw=lambda architecture, key, batch, samples: (dict(batch), key),
        augment=lambda architecture, key, inputs: {**inputs, "view": inputs["view"] + view(key)},
        forward=forward,
        distance=distance,
        loss_of=loss_of,
        losses=lambda model, params, inputs, *, gates: loss_of(
            None, forward(model, params, inputs, gates=gates)[0], inputs
        ),
    )


@pytest.fixture
def run(monkeypatch):
    """Runs steps of plain gradient descent; gives the states after them and what they report."""

    def steps(count, view=lambda key: jnp.zeros(()), teacher=None, **settings):
        for module in (step, teaching):
            monkeypatch.setattr(module, "family_of", lambda _: family(view))
            monkeypatch.setattr(module, "build", lambda *_: None)
        settings = StepSettings(**{"ema_decay": DECAY, "augment": False} | settings)
        tx, params = optax.sgd(RATE), {"w": jnp.float32(2.0), "b": jnp.float32(-1.0)}
        state = make_state(params, tx, frozen=settings.frozen, ema=settings.ema_decay is not None)
        one = jax.jit(functools.partial(train_step, toys.architecture(), tx, settings))
        states, infos = [state], []
        for _ in range(count):
            state, info = one(jax.random.key(3), state, batch(), teacher=teacher)
            states.append(state)
            infos.append(info)
        return states, infos

    return steps


def batch():
    """Eight observations; the first quarter counts for little."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 8)).astype(np.float32)
    weight = np.array([0.5, 0.25, 3.0, 1.0, 2.0, 1.0, 4.0, 1.0], np.float32)
    return {"x": x, "y": y, "weight": weight, "view": np.zeros(8, np.float32)}


def expected(params, view=0.0):
    """Loss and gradient of the batch at these parameters: the mean by weight."""
    rows = batch()
    error = params["w"] * rows["x"] + params["b"] - rows["y"] + view
    share = rows["weight"] / rows["weight"].sum()
    return (share * error**2).sum(), {"w": (share * 2 * error * rows["x"]).sum(), "b": (share * 2 * error).sum()}


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_the_gradient_is_that_of_the_mean_by_weight_however_many_parts_it_comes_in(run, parts):
    states, infos = run(3, accumulate=parts)
    for before, after, info in zip(states[:-1], states[1:], infos, strict=True):
        loss, gradient = expected(before.params)
        np.testing.assert_allclose(info["loss"], loss, rtol=1e-5)
        np.testing.assert_allclose(info["grad_norm"], np.hypot(*gradient.values()), rtol=1e-5)
        for name, slope in gradient.items():
            np.testing.assert_allclose(after.params[name], before.params[name] - RATE * slope, rtol=1e-5)


@pytest.mark.parametrize("parts", [1, 2])
def test_a_teacher_has_its_share_of_the_loss_and_no_gradient_of_its_own(run, parts):
    """Pulled to y by 3/4 and to the teacher's line by 1/4; both see the same view."""
    teacher, share = {"w": jnp.float32(1.0), "b": jnp.float32(0.5)}, 0.25
    taught = Teaching(architecture=toys.architecture(), weight=share)
    states, infos = run(2, teacher=teacher, teaching=taught, accumulate=parts, view=number_of, augment=parts == 1)
    rows, weights = batch(), batch()["weight"] / batch()["weight"].sum()
    for number, (before, after, info) in enumerate(zip(states[:-1], states[1:], infos, strict=True)):
        view = float(number_of(jax.random.fold_in(jax.random.key(3), number))) if parts == 1 else 0.0
        task, slope = expected(before.params, view)
        apart = (before.params["w"] - 1.0) * rows["x"] + before.params["b"] - 0.5
        np.testing.assert_allclose(info["task_loss"], task, rtol=1e-5)
        np.testing.assert_allclose(info["teacher_loss"], (weights * apart**2).sum(), rtol=1e-5)
        np.testing.assert_allclose(info["loss"], 0.75 * info["task_loss"] + 0.25 * info["teacher_loss"], rtol=1e-5)
        w = 0.75 * slope["w"] + 0.25 * (weights * 2 * apart * rows["x"]).sum()
        np.testing.assert_allclose(after.params["w"], before.params["w"] - RATE * w, rtol=1e-5)
    assert states[-1].params.keys() == teacher.keys()


def test_the_average_takes_in_the_parameters_of_its_own_step(run):
    states, _ = run(3)
    assert [int(state.step) for state in states] == [0, 1, 2, 3]
    for before, after in itertools.pairwise(states):
        for name, average in before.ema_params.items():
            wanted = DECAY * average + (1 - DECAY) * after.params[name]
            np.testing.assert_allclose(after.ema_params[name], wanted, rtol=1e-6)
            assert after.params[name] != before.params[name]
    states, _ = run(1, ema_decay=None)
    assert states[-1].ema_params is None


def test_frozen_parameters_stay_to_the_bit_and_have_no_gradient(run):
    states, infos = run(2, frozen=frozenset(["b"]))
    for before, after, info in zip(states[:-1], states[1:], infos, strict=True):
        _, gradient = expected(before.params)
        np.testing.assert_allclose(info["grad_norm"], abs(gradient["w"]), rtol=1e-5)
        assert float(after.params["b"]) == -1.0
        assert after.params["w"] != before.params["w"]


def number_of(key):
    """A number that tells one key from another."""
    return jax.random.uniform(key, (), jnp.float32, 1.0, 2.0)


def test_augmentation_has_a_key_of_each_step_and_of_each_part(run):
    """One part has the step's own key, which is upstream's; several have children of it by their number."""
    keys = [jax.random.fold_in(jax.random.key(3), number) for number in range(2)]
    states, infos = run(2, view=number_of, augment=True)
    for before, info, key in zip(states[:-1], infos, keys, strict=True):
        np.testing.assert_allclose(info["loss"], expected(before.params, float(number_of(key)))[0], rtol=1e-5)
    states, infos = run(2, view=number_of, augment=True, accumulate=2)
    for before, info, key in zip(states[:-1], infos, keys, strict=True):
        parts = [float(number_of(jax.random.fold_in(key, part))) for part in range(2)]
        np.testing.assert_allclose(info["loss"], expected(before.params, np.tile(parts, 4))[0], rtol=1e-5)
