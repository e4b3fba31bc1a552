"""Batches: the same whoever reads them, in how many shares and threads, and wherever the run was cut."""

import dataclasses
import itertools

import numpy as np
import pytest
import toys

from clp_jax.data import open_dataset
from clp_jax.errors import InputError

ARCH = toys.architecture()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "d.npz"
    arrays = toys.data(ARCH, 14, per_episode=2).arrays
    np.savez(path, **(arrays | {"state": arrays["state"] * 0 + np.arange(14, dtype=np.float32)[:, None]}))
    return open_dataset(path, ARCH, hold_out_ratio=0.2, seed=1)


def rows(batches, count):
    return [next(batches)["state"][:, 0].astype(int).tolist() for _ in range(count)]


def test_hold_out_keeps_whole_episodes_apart(data):
    held = data.held_out()
    assert held is not None
    assert len(data) + len(held) == 14
    assert not set(data.calibration().episodes) & set(held.episodes)


def test_an_epoch_is_a_permutation_in_whole_batches_and_the_next_one_differs(data):
    batches = data.batches(5, workers=0)
    first, second = (list(itertools.chain(*rows(batches, len(data) // 5))) for _ in range(2))
    for epoch in (first, second):
        assert len(set(epoch)) == len(epoch) == 10
        assert set(epoch) <= set(data.rows.tolist())
    assert first != second
    assert rows(data.batches(5, seed=1, workers=0), 2) != rows(data.batches(5, workers=0), 2)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_together_read_the_batches_of_one(data, processes):
    whole = rows(data.batches(4, workers=0), 7)
    shares = [rows(data.batches(4, process_index=p, process_count=processes), 7) for p in range(processes)]
    assert [list(itertools.chain(*parts)) for parts in zip(*shares, strict=True)] == whole


def test_state_restores_the_position_for_any_number_of_processes_and_threads(data):
    whole = rows(data.batches(4), 9)
    batches = data.batches(4, workers=2)
    assert rows(batches, 5) == whole[:5]
    state = batches.get_state()
    assert len(state) < 300
    resumed = [data.batches(4, workers=p, process_index=p, process_count=2) for p in range(2)]
    for batch in resumed:
        batch.set_state(state)
    assert [a + b for a, b in zip(rows(resumed[0], 4), rows(resumed[1], 4), strict=True)] == whole[5:]


def test_state_of_another_run_is_refused(data):
    state = data.batches(4, workers=0).get_state()
    with pytest.raises(InputError, match="batch_size was 4, is 5; seed was 0, is 1"):
        data.batches(5, seed=1, workers=0).set_state(state)


def test_batches_have_the_documented_keys(data):
    batch = next(data.batches(4, process_count=2, workers=0))
    assert set(batch) == {
        *(f"{prefix}/{camera}" for prefix in ("image", "image_mask") for camera in data.cameras),
        "state",
        "tokenized_prompt",
        "tokenized_prompt_mask",
        "actions",
        "action_is_pad",
    }
    assert {len(value) for value in batch.values()} == {2}
    assert batch["action_is_pad"].shape == (2, toys.HORIZON)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 4, "process_count": 3}, "does not divide"),
        ({"batch_size": 0}, "does not divide"),
        ({"batch_size": 64}, "do not fill one batch of 64"),
        ({"batch_size": 2, "seed": -1}, "outside"),
    ],
)
def test_batches_that_cannot_be_are_refused(data, settings, message):
    with pytest.raises(InputError, match=message):
        data.batches(**settings)


@pytest.mark.parametrize("workers", [0, 2])
def test_error_of_a_reader_arrives_as_it_is(data, workers):
    def fail(_):
        raise InputError("frame 3 is broken")

    with pytest.raises(InputError) as caught:
        next(dataclasses.replace(data, read=fail).batches(4, workers=workers))
    assert str(caught.value) == "frame 3 is broken"


def test_choice_of_observations_is_random_sorted_and_repeatable(data):
    some = data.calibration(4, seed=3)
    assert len(some) == 4
    np.testing.assert_array_equal(some.arrays["state"], np.sort(some.arrays["state"], axis=0))
    np.testing.assert_array_equal(some.arrays["state"], data.calibration(4, seed=3).arrays["state"])
    assert {tuple(data.calibration(4, seed=s).arrays["state"][:, 0]) for s in range(5)} != {0}
    with pytest.raises(InputError, match="at least one"):
        data.calibration(0)
