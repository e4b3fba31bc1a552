"""Calibration files: what is read, what is refused, and how observations are dealt into groups."""

import jax
import numpy as np
import pytest
import toys
from hypothesis import given, settings
from hypothesis import strategies as st

from clp_jax.data import arrange, hold_out, load_npz
from clp_jax.errors import InputError
from clp_jax.models import build
from clp_jax.models.pi0 import CAMERAS, fixed_draw, losses

ARCH = toys.architecture()


def write(path, arrays):
    np.savez(path, **arrays)
    return path


def test_noise_and_time_of_the_file_are_kept(tmp_path):
    arrays = toys.data(ARCH).arrays
    arrays = arrays | {"time": np.full(12, 0.25, np.float32)}
    loaded = load_npz(write(tmp_path / "d.npz", arrays), ARCH)
    np.testing.assert_array_equal(loaded.arrays["time"], arrays["time"])
    assert loaded.cameras == ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
    assert len(loaded.fingerprint) == 64


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_cameras_that_no_observation_has_are_left_out_and_nobody_misses_them(tmp_path, kind):
    arch = toys.architecture(kind)
    whole = toys.data(arch, 3).arrays | {f"image_mask/{camera}": np.zeros(3, bool) for camera in CAMERAS[1:]}
    loaded = load_npz(write(tmp_path / "d.npz", whole), arch)
    assert loaded.cameras == CAMERAS[:1]
    model, params = build(arch), toys.params(arch)

    def loss(params, arrays):
        return losses(model, params, arrays).each.mean()

    value_and_grad = jax.jit(jax.value_and_grad(loss))
    for ours, theirs in zip(
        *(jax.tree.leaves(value_and_grad(params, arrays)) for arrays in (loaded.arrays, whole)), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_one_camera_stays_where_every_camera_is_masked(tmp_path):
    arrays = toys.data(ARCH, 3).arrays | {f"image_mask/{camera}": np.zeros(3, bool) for camera in CAMERAS}
    assert load_npz(write(tmp_path / "d.npz", arrays), ARCH).cameras == CAMERAS[:1]


def test_missing_noise_and_time_are_the_same_in_every_run(tmp_path):
    arrays = {k: v for k, v in toys.data(ARCH).arrays.items() if k not in ("noise", "time")}
    path = write(tmp_path / "d.npz", arrays)
    first, second = load_npz(path, ARCH), load_npz(path, ARCH)
    for key in ("noise", "time"):
        np.testing.assert_array_equal(first.arrays[key], second.arrays[key])


def test_times_follow_the_training_distribution():
    time = fixed_draw(ARCH, {"actions": np.zeros((1000, 1, 1))})["time"]
    quantiles = np.quantile((time - 0.001) / 0.999, [0.1, 0.5, 0.9])
    np.testing.assert_allclose(quantiles, np.array([0.1, 0.5, 0.9]) ** (2 / 3), atol=0.01)


def changed(**arrays):
    return lambda base: base | arrays


def without(*keys):
    return lambda base: {k: v for k, v in base.items() if k not in keys}


BAD = {
    "lacks actions": without("actions"),
    "lacks image_mask/base_0_rgb": without("image_mask/base_0_rgb"),
    "lacks image/right_wrist_0_rgb, image_mask/right_wrist_0_rgb": without(
        "image/right_wrist_0_rgb", "image_mask/right_wrist_0_rgb"
    ),
    "holds image/cam_high; the cameras of a pi0 model are base_0_rgb, left_wrist_0_rgb, right_wrist_0_rgb": changed(
        **{"image/cam_high": np.zeros((12, 8, 8, 3), np.uint8)}
    ),
    r"state has shape \(12, 5\), expected \(12, 6\)": changed(state=np.zeros((12, 5), np.float32)),
    r"actions has shape \(11, 4, 6\)": changed(actions=np.zeros((11, 4, 6), np.float32)),
    "actions holds NaN": changed(actions=np.full((12, 4, 6), np.nan, np.float32)),
    "vocabulary has 23": changed(tokenized_prompt=np.full((12, 5), 23, np.int32)),
    "tokenized_prompt is float32, expected": changed(tokenized_prompt=np.zeros((12, 5), np.float32)),
    "image_mask/base_0_rgb is int64, expected bool": changed(**{"image_mask/base_0_rgb": np.ones(12, np.int64)}),
    r"float outside \[-1, 1\]": changed(**{"image/base_0_rgb": np.full((12, 8, 8, 3), 255.0, np.float32)}),
    r"time must lie in \(0, 1\]": changed(time=np.zeros(12, np.float32)),
    "observation 0 has no valid token": changed(
        tokenized_prompt_mask=np.zeros((12, 5), bool),
        **{f"image_mask/{camera}": np.zeros(12, bool) for camera in CAMERAS},
    ),
    "holds no observations": lambda base: {k: v[:0] for k, v in base.items()},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_file_is_refused_in_one_sentence(tmp_path, message):
    path = write(tmp_path / "d.npz", BAD[message](toys.data(ARCH).arrays))
    with pytest.raises(InputError, match=message) as caught:
        load_npz(path, ARCH)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a zip", b"just text"])
def test_file_that_is_no_npz_is_refused_before_all_of_it_is_read(tmp_path, content, monkeypatch):
    monkeypatch.setattr("hashlib.file_digest", lambda *_: pytest.fail("it may be long"))
    path = tmp_path / "d.npz"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"d\.npz cannot be read: File is not a zip file"):
        load_npz(path, ARCH)


def test_bare_array_folder_and_missing_file_are_refused(tmp_path):
    with (tmp_path / "one.npz").open("wb") as stream:
        np.save(stream, np.zeros(3))
    cases = ((tmp_path / "one.npz", "one bare array"), (tmp_path, "is a folder"), (tmp_path / "x", "no data"))
    for path, message in cases:
        with pytest.raises(InputError, match=message):
            load_npz(path, ARCH)


episodes = st.lists(st.integers(0, 6), min_size=1, max_size=40).map(np.array)


@settings(deadline=None)
@given(episodes=episodes, group_size=st.integers(1, 7))
def test_every_observation_has_one_slot_and_no_episode_two_clusters(episodes, group_size):
    arrangement = arrange(episodes, group_size)
    rows = arrangement.slots[arrangement.slots >= 0]
    assert sorted(rows.tolist()) == list(range(len(episodes)))
    clusters: dict[int, set[int]] = {}
    for group, cluster in zip(arrangement.slots, arrangement.cluster, strict=True):
        for row in group[group >= 0]:
            clusters.setdefault(int(episodes[row]), set()).add(int(cluster))
    assert all(len(found) == 1 for found in clusters.values())


@settings(deadline=None)
@given(episodes=episodes, ratio=st.floats(0, 0.99))
def test_hold_out_splits_by_whole_episodes(episodes, ratio):
    kept, held = hold_out(episodes, ratio)
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(len(episodes)))
    assert len(kept) > 0
    assert not set(episodes[kept].tolist()) & set(episodes[held].tolist())


@pytest.mark.parametrize(("ratio", "count"), [(0.99, 3), (0.5, 2), (0.1, 0)])
def test_a_ratio_near_one_holds_out_all_episodes_but_one(ratio, count):
    _, held = hold_out(np.repeat(np.arange(4), 2), ratio)
    assert len(held) == 2 * count
