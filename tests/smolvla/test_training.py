"""lerobot's four training steps with its own noise and times, through our step."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
from smolvla_recordings import GOLDEN, RELATIVE_TOLERANCE, architecture, inputs, params, recording, tensors, tree_of

from clp_jax.models import smolvla
from clp_jax.training import OptimizerSettings, StepSettings, make_optimizer, make_state, train_step
from clp_jax.training.freezing import frozen_paths
from clp_jax.training.optimizer import learning_rate
from clp_jax.trees import flatten

pytestmark = pytest.mark.slow

LEAF_ROUNDING, LEAF_SHARE = 1.2e-7, 2e-3
"""Largest difference of a parameter: a rounding of float32, and a share of the learning rates so far. AdamW's first
updates are of their size whatever the gradient's, so where a gradient is near zero, its rounding moves the update."""


def steps_of(length: int):
    """Losses, gradient norms, and the parameters after four steps of a run of so many."""
    a = architecture()
    defaults = dict(smolvla.training_defaults(a, length))
    optimizer = OptimizerSettings.among(defaults)
    frozen = frozen_paths(tuple(flatten(params())), default=smolvla.frozen_rules(a))
    settings = StepSettings(ema_decay=None, augment=True, frozen=frozen)
    tx = make_optimizer(optimizer)
    state = make_state(params(), tx, frozen=frozen)
    step, g, found = jax.jit(functools.partial(train_step, a, tx, settings)), recording(), []
    for number in range(4):
        batch = inputs(noise=g["step_noise"][number], time=g["step_time"][number])
        state, info = step(jax.random.key(0), state, batch)
        found.append({"loss": float(info["loss"]), "grad_norm": float(info["grad_norm"])})
    return found, state.params, optimizer


def test_settings_are_lerobots():
    """AdamW divides a gradient's scale away again, so that four steps hardly feel where it was clipped."""
    ours, theirs = (
        smolvla.training_defaults(architecture(), 100_000),
        json.loads((GOLDEN / "train_steps.json").read_text()),
    )
    optimizer, scheduler = theirs["optimizer"], theirs["scheduler"]
    assert [ours["b1"], ours["b2"]] == optimizer["betas"]
    assert (ours["eps"], ours["weight_decay"]) == (optimizer["eps"], optimizer["weight_decay"])
    assert ours["clip_norm"] == optimizer["grad_clip_norm"]
    assert (ours["peak_lr"], ours["decay_lr"]) == (scheduler["peak_lr"], scheduler["decay_lr"])
    assert (ours["warmup_steps"], ours["decay_steps"]) == (scheduler["num_warmup_steps"], scheduler["num_decay_steps"])


@pytest.mark.parametrize("length", [100_000, 4])
def test_four_steps_are_lerobots(monkeypatch, length):
    monkeypatch.setattr(smolvla, "draw", lambda architecture, rng, batch, samples=1: (dict(batch), rng))
    found, after, optimizer = steps_of(length)
    recorded = json.loads((GOLDEN / "train_steps.json").read_text())["runs"][str(length)]["steps"]
    for number, (ours, theirs) in enumerate(zip(found, recorded, strict=True)):
        np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=RELATIVE_TOLERANCE)
        np.testing.assert_allclose(ours["grad_norm"], theirs["grad_norm_before_clip"], rtol=RELATIVE_TOLERANCE)
        np.testing.assert_allclose(float(learning_rate(optimizer)(number)), theirs["lr_used"], rtol=1e-5)
    tolerance = LEAF_ROUNDING + LEAF_SHARE * sum(each["lr_used"] for each in recorded)
    prefix = f"step4_of_{length}:"
    wanted = {key.removeprefix(prefix): value for key, value in recording().items() if key.startswith(prefix)}
    expected = flatten(tree_of(tensors() | wanted, architecture()))
    ours, before, compared = flatten(after), flatten(params()), 0
    for path, leaf in expected.items():
        changed = np.asarray(leaf != before[path])
        compared += changed.any()
        difference = np.abs(np.asarray(ours[path]) - leaf)[changed]
        assert difference.max(initial=0) < tolerance, path
    assert compared >= 4


def test_frozen_rows_stay_as_they_are_and_weigh_nothing():
    """With weight decay and clipping, either of which would move or count them."""
    a = architecture()
    training = dataclasses.replace(a.training, train_expert_only=False)
    a = dataclasses.replace(a, training=training)
    leaves = flatten(params())
    frozen = frozen_paths(tuple(leaves), default=smolvla.frozen_rules(a))
    rows = tuple(sorted(smolvla.frozen_rows(a, leaves).items()))
    optimizer = OptimizerSettings(weight_decay=0.1, clip_norm=0.1, peak_lr=1e-2, warmup_steps=0, decay_steps=10)
    tx = make_optimizer(optimizer)

    def after(frozen_rows):
        settings = StepSettings(ema_decay=None, frozen=frozen, frozen_rows=frozen_rows)
        step = jax.jit(functools.partial(train_step, a, tx, settings))
        state, info = step(jax.random.key(0), make_state(params(), tx, frozen=frozen), inputs())
        return flatten(state.params), float(info["grad_norm"])

    (held, less), (free, more) = after(rows), after(())
    assert less < more
    for path, numbers in rows:
        for row in range(leaves[path].shape[0]):
            same = np.array_equal(held[path][row], leaves[path][row])
            assert same == (row in numbers), (path, row)
            assert not np.array_equal(free[path][row], leaves[path][row]), (path, row)
