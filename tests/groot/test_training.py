"""What is trained by default, and three recorded steps of both upstream flavours."""

import functools
import json
import re

import groot_recordings as golden
import numpy as np
import optax
import pytest
from groot_recordings import GOLDEN, largest_difference

from clp_jax.models import groot
from clp_jax.models.groot.training import learning_rate
from clp_jax.trees import flatten, unflatten

# A leaf moves by 2.5e-4. Upstream's own float32 and float64 runs differ by 3.3e-6 in leaves after three steps, by 3e-6
# in the loss and by 1.6e-5 in the norm of the gradient; a port's gradients may differ by 5e-5 and its outputs by 1e-4.
LEAF_TOLERANCE = 2e-5
LOSS_TOLERANCE = 1e-4
NORM_TOLERANCE = 2e-4

FLAVOURS = ("isaac", "lerobot")


@functools.cache
def recorded():
    return json.loads((GOLDEN / "train_steps.json").read_text())


def names_of(paths):
    """Names of the tensors that leaves become, by path; of stacked ones for block 0 or 1."""
    layout = groot.layout(dict.fromkeys(paths))
    return {path: layout[path].names[0].format(i=int("/dit/self/" in path)) for path in paths}


def test_frozen_by_default_is_what_upstream_freezes():
    paths = list(flatten(golden.checkpoint("ckpt")))
    frozen = groot.frozen_paths(golden.architecture("ckpt"), paths)
    trained = tuple(recorded()["isaac"]["trainable_prefixes"])
    for path, name in names_of(paths).items():
        assert (path in frozen) == (not name.startswith(trained)), path


def test_flags_free_their_parts_but_never_what_nothing_reads():
    paths = list(flatten(golden.checkpoint("ckpt")))
    everything = {"tune_llm": True, "tune_visual": True, "tune_projector": True, "tune_diffusion_model": True}
    unread = groot.frozen_paths(golden.architecture("ckpt"), paths, **everything)
    assert all("/vision_head/" in path or path.endswith("/lm_head") for path in unread) and len(unread) == 12
    without = groot.frozen_paths(golden.architecture("ckpt"), paths, **dict.fromkeys(everything, False))
    left = {path.split("/")[1] for path in paths if path not in without}
    assert left == {"vlln", "vl_self_attention", "future_tokens"}


def test_no_weight_decay_where_upstream_has_none():
    paths = [path for path in flatten(golden.checkpoint("ckpt")) if path.startswith("action_head/")]
    rule = groot.upstream_settings(golden.architecture("ckpt"), 20).not_decayed
    listed = set(recorded()["isaac"]["no_weight_decay"])
    for path, name in names_of(paths).items():
        assert bool(re.fullmatch(rule, path)) == (name in listed), path
    assert groot.upstream_settings(golden.architecture("ckpt"), 20, "lerobot").not_decayed is None


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_learning_rates(flavour):
    theirs = recorded()[flavour]
    ours = groot.upstream_settings(golden.architecture("ckpt"), 20, flavour)
    assert [learning_rate(ours, step["step"]) for step in theirs["steps"]] == pytest.approx(
        [step["lr"] for step in theirs["steps"]], rel=1e-6
    )
    assert (ours.b1, ours.b2) == tuple(theirs["betas"])
    assert (ours.eps, ours.weight_decay) == (theirs["eps"], theirs["weight_decay"])
    assert (ours.clip_norm, ours.peak_lr) == (theirs["clip_norm"], theirs["lr"])
    assert learning_rate(ours, 20) == pytest.approx(ours.decay_lr)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_three_steps(flavour):
    theirs, defaults = recorded()[flavour], groot.upstream_settings(golden.architecture("ckpt"), 20, flavour)
    whole = {path: np.asarray(leaf) for path, leaf in flatten(golden.checkpoint("ckpt")).items()}
    frozen = groot.frozen_paths(golden.architecture("ckpt"), whole)
    params = {path: leaf for path, leaf in whole.items() if path not in frozen}
    decayed = {path: not (defaults.not_decayed and re.fullmatch(defaults.not_decayed, path)) for path in params}
    rate = optax.inject_hyperparams(optax.adamw, static_args=("b1", "b2", "eps", "weight_decay", "mask"))
    optimizer = rate(0.0, defaults.b1, defaults.b2, defaults.eps, weight_decay=defaults.weight_decay, mask=decayed)
    state = optimizer.init(params)
    for step in theirs["steps"]:
        (loss, _), gradient = golden.gradient()(unflatten(whole | params), golden.inputs())
        gradient = {path: np.asarray(leaf) for path, leaf in flatten(gradient).items() if path in params}
        norm = float(np.sqrt(sum(np.square(leaf, dtype=np.float64).sum() for leaf in gradient.values())))
        assert abs(float(loss) - step["loss"]) < LOSS_TOLERANCE
        assert abs(norm - step["grad_norm"]) < NORM_TOLERANCE
        scale = min(1.0, defaults.clip_norm / norm)
        gradient = {path: leaf * scale for path, leaf in gradient.items()}
        state.hyperparams["learning_rate"] = np.float32(learning_rate(defaults, step["step"]))
        updates, state = optimizer.update(gradient, state, params)
        params = {path: np.asarray(leaf + updates[path]) for path, leaf in params.items()}
    ours = golden.named(unflatten(whole | params))
    for key, leaf in golden.recording("train_steps").items():
        name, _, tensor = key.partition(":")
        if name == flavour:
            assert largest_difference(ours[tensor], leaf) < LEAF_TOLERANCE, tensor
