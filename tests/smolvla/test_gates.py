"""A closed gate and a zeroed branch are the removed block, in SmolVLA's alternating blocks too."""

import functools

import jax
import numpy as np
import pytest
from smolvla_recordings import (
    KEEPS,
    SAMPLE_TOLERANCE,
    VELOCITY_TOLERANCE,
    architecture,
    assert_close,
    blocks,
    inputs,
    params,
    recording,
)

from clp_jax.models import smolvla
from clp_jax.trees import flatten, unflatten

DEPTH = 12
EQUAL_TOLERANCE = 1e-6
"""Of two runs of one compiled program that must give the same."""


@functools.cache
def program():
    model = smolvla.build(architecture())

    @jax.jit
    def run(tree, given, noise, gates):
        actions = smolvla.sample(model, tree, given, noise=noise, num_steps=10, gates=gates)
        return smolvla.forward(model, tree, given, gates=gates)[0], actions

    def with_gates(tree, language, vision=np.ones((3, 3))):
        gates = {"vlm": language, "action": language, "vision": vision}
        gates = {name: np.asarray(gate, np.float32) for name, gate in gates.items()}
        return [np.asarray(x) for x in run(tree, inputs(), recording()["sample_noise"], gates)]

    return with_gates


def kept(*keeps):
    """Gates [depth, b], one kept list per observation."""
    return np.array([[block in keep for keep in keeps] for block in range(DEPTH)])


def without_branches(drop, towers):
    """The recorded parameters with both output projections of the dropped blocks zeroed."""
    ends = ("o_proj", "down_proj", "out/kernel", "out/bias", "Dense_1/kernel", "Dense_1/bias")
    leaves = dict(flatten(params()))
    for path, leaf in leaves.items():
        if path.endswith(ends) and path.startswith(towers):
            rows = [row for row, block in enumerate(blocks(path, len(leaf)) or ()) if block in drop]
            leaves[path] = np.where(np.isin(np.arange(len(leaf)), rows).reshape(-1, *[1] * (leaf.ndim - 1)), 0, leaf)
    return unflatten(leaves)


@pytest.mark.slow
def test_closed_gates_are_the_pruned_model_for_each_observation_by_itself():
    """Row by row: one cut of pairs, no cut, and one to an odd depth that starts and ends elsewhere."""
    plain, cuts = recording(), recording("_pruned")
    velocity, actions = program()(params(), kept(KEEPS[""], range(DEPTH), KEEPS["b/"]))
    for row, (theirs, prefix) in enumerate(((cuts, ""), (plain, ""), (cuts, "b/"))):
        assert_close(velocity[row], theirs[f"{prefix}v_t"][row], VELOCITY_TOLERANCE)
        assert_close(actions[row, :, :8], theirs[f"{prefix}sampled_actions"][row], SAMPLE_TOLERANCE)


def test_zeroed_branches_are_the_pruned_model():
    cuts, everything = recording("_pruned"), kept(*[range(DEPTH)] * 3)
    for prefix, keep in KEEPS.items():
        dropped = set(range(DEPTH)) - set(keep)
        velocity, actions = program()(without_branches(dropped, ("vlm/", "action/")), everything)
        assert_close(velocity, cuts[f"{prefix}v_t"], VELOCITY_TOLERANCE)
        assert_close(actions[..., :8], cuts[f"{prefix}sampled_actions"], SAMPLE_TOLERANCE)


def test_closed_gate_of_the_image_encoder_is_its_zeroed_branch():
    everything, gates = kept(*[range(DEPTH)] * 3), np.ones((3, 3))
    gates[1, :2] = 0
    closed = program()(params(), everything, gates)
    zeroed = program()(without_branches({1}, ("vision/",)), everything)
    for ours, theirs, plain in zip(closed, zeroed, program()(params(), everything), strict=True):
        assert_close(ours[:2], theirs[:2], EQUAL_TOLERANCE)
        assert_close(ours[2:], plain[2:], EQUAL_TOLERANCE)
        assert np.abs(ours[:2] - plain[:2]).max() > 1e-2
