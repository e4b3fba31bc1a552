"""Parts of states and actions as Isaac-GR00T's own transforms normalise and turn them, and back."""

import groot_recordings as golden
import numpy as np
import pytest

from clp_jax.errors import InputError
from clp_jax.models.groot.modes import Part, mode, to_model, to_robot
from clp_jax.models.groot.pictures import middle, resized
from clp_jax.models.groot.rotations import converted
from clp_jax.processing.norm_stats import NormStats

RECORDED = golden.recording("data_configs")
MODES = sorted({key.split("/")[1] for key in RECORDED if key.startswith("modes/")})
TOLERANCE = 3e-6
"""Upstream turns rotations in float32, we in float64."""


def recorded(text: str) -> tuple[np.ndarray, np.ndarray, NormStats]:
    x, y, stats = (RECORDED[f"modes/{text}/{name}"] for name in ("in", "out", "stats"))
    return x, y, NormStats(*stats.astype(np.float64))


def test_every_mode_was_recorded():
    assert {"min_max", "q99", "mean_std", "scale", "binary", "quaternion>rotation_6d"} <= set(MODES)
    assert len(MODES) == 41


@pytest.mark.parametrize("text", MODES)
def test_a_part_is_what_upstream_makes_of_it(text):
    x, y, stats = recorded(text)
    found = mode(text)
    ours = found.forth(x, stats)
    assert ours.dtype == np.float32
    assert ours.shape[-1] == found.width(x.shape[-1])
    if found.target == "quaternion":
        ours = ours * np.sign((ours * y).sum(axis=-1, keepdims=True))
    np.testing.assert_allclose(ours, y, atol=TOLERANCE)
    if text == "scale":  # upstream has no inverse of it
        np.testing.assert_allclose(found.back(ours, stats)[:, :4], x[:, :4], atol=TOLERANCE)
        return
    back, theirs = found.back(y, stats), RECORDED[f"modes/{text}/back"]
    if found.source == "quaternion":  # the same rotation with either sign
        back, theirs = (converted(z, "quaternion", "rotation_6d") for z in (back, theirs))
    np.testing.assert_allclose(back, theirs, atol=2 * TOLERANCE)


def test_states_may_be_sines_and_cosines_and_numbers_may_stay_as_they_are():
    x = np.array([[0.5, -2.0], [3.0, 0.1]], np.float32)
    parts = (Part(1, mode("sin_cos")), Part(1, mode("")))
    stats = NormStats(np.zeros(2), np.ones(2))
    expected = np.stack([np.sin(x[:, 0]), np.cos(x[:, 0]), x[:, 1]], axis=-1)
    assert np.array_equal(to_model(x, parts, stats), expected)


def test_parts_are_normalised_by_their_own_statistics_and_turned_back():
    x, _, stats = recorded("min_max")
    parts = (Part(2, mode("mean_std")), Part(2, mode("q99")), Part(1, mode("min_max")))
    there = to_model(x, parts, stats)
    assert np.array_equal(there[:, :2], mode("mean_std").forth(x, stats)[:, :2])
    assert np.array_equal(there[:, 2:4], mode("q99").forth(x, stats)[:, 2:4])
    np.testing.assert_allclose(to_robot(there, parts, stats)[:, :2], x[:, :2], atol=TOLERANCE)


@pytest.mark.parametrize(
    "text", ["minmax", "quaternion", "euler>rotation_6d", "quaternion>axis_angle q99", "a b c", ">"]
)
def test_another_mode_is_refused(text):
    with pytest.raises(InputError, match="is no mode of a GR00T-N1"):
        mode(text)
    with pytest.raises(InputError, match="no mode"):
        mode("quaternion>quaternion")


def test_a_quaternion_of_zeros_is_refused():
    with pytest.raises(InputError, match="quaternion of zeros"):
        mode("quaternion>rotation_6d").forth(np.zeros((2, 4)), NormStats(np.zeros(4), np.zeros(4)))


@pytest.mark.parametrize("i", range(4))
def test_pictures_are_upstreams(i):
    """The middle of each, made larger or smaller; Pillow's sums are finer than those of PyTorch."""
    given, theirs = (RECORDED[f"image/{i}/{name}"].astype(int) for name in ("in", "out"))
    ours = resized(middle(given.astype(np.uint8)), 56).astype(int)
    assert np.abs(ours - theirs).max() <= 1
    assert (ours != theirs).mean() < 0.002
