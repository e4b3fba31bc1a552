"""Several data sets as one: drawn by weights, the same in every run, with statistics of what is drawn."""

import dataclasses
import itertools
import json

import lerobot_sets as sets
import numpy as np
import pytest
import toys
from lerobot_sets import ACTION, STATE, STILL
from recordings import GOLDEN

from clp_jax.cli import main
from clp_jax.commands.data_flags import DataFlags, open_data
from clp_jax.data import open_dataset
from clp_jax.data.recordings import open_recordings
from clp_jax.errors import InputError
from clp_jax.processing import norm_stats
from clp_jax.processing.robots import Robot
from clp_jax.sharding import make_mesh
from clp_jax.training.held_out import held_out_loss
from scripts.make_lerobot_toy import write

pytestmark = pytest.mark.slow

ARCH = dataclasses.replace(toys.architecture("pi05"), vocab_size=512)
SPM = str(GOLDEN / "tokenizer/tiny_spm.model")
LENGTHS = {"a": (7, 4, 9), "b": (6, 5)}
COLUMNS = {STATE: 4, ACTION: 3}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixtures")
    truth = {
        name: write(folder / name, version, COLUMNS, {STILL: "image"}, lengths=LENGTHS[name])
        for name, version in (("a", "v3.0"), ("b", "v2.1"))
    }
    for file in sets.tables(folder / "b"):  # the numbers of both are drawn from the same seed
        sets.edit_table(file, lambda t: sets.with_column(t, STATE, moved(t.column(STATE))))
    truth["b"][STATE] += np.float32(0.5)
    return folder, truth


def moved(column):
    values = column.combine_chunks().flatten().to_numpy().reshape(len(column), -1)
    return sets.vectors(values + np.float32(0.5))


def opened(stored, *names, hold_out_ratio=0.0, **flags):
    config = DataFlags(image=(f"base_0_rgb={STILL}",), tokenizer=SPM, action_horizon=2, **flags)
    sources = [str(stored[0] / name) for name in names]
    return open_data(config, sources, ARCH, assets=None, hold_out_ratio=hold_out_ratio, seed=0)


def owners(data, batches, count):
    """The number of the set of each row of each batch, by the states, which are all different."""
    read = data.read(np.arange(len(data.episodes)))["state"]
    drawn = [next(batches)["state"] for _ in range(count)]
    places = [[int(np.flatnonzero((read == state).all(axis=1))[0]) for state in batch] for batch in drawn]
    return [[int(place >= sum(LENGTHS["a"])) for place in batch] for batch in places], places


def test_observations_are_those_of_each_set(stored):
    data = opened(stored, "a", "b", weights=(2.0, 1.0))
    rows = np.array([3, 25, 0, 20, 30])
    mixed = data.read(rows)
    own = {name: opened(stored, name, norm_stats=None) for name in "ab"}
    images = [own["a" if row < 20 else "b"].read(np.array([row % 20]))["image/base_0_rgb"][0] for row in rows]
    np.testing.assert_array_equal(mixed["image/base_0_rgb"], images)
    assert len(data) == len(data.episodes) == 31
    assert len(np.unique(data.episodes)) == 5
    assert data.asset_id == "a+b"


def test_sets_are_drawn_by_their_weights_and_each_row_of_a_set_equally_often(stored):
    data = opened(stored, "a", "b", weights=(1.0, 3.0))
    drawn, places = owners(data, data.batches(4, workers=0), 22)
    assert [sum(batch) for batch in drawn] == [3] * 22
    counts = np.bincount(list(itertools.chain(*places)), minlength=31)
    assert set(counts[20:]) == {6}  # 66 draws of 11 rows
    assert set(counts[:20]) <= {1, 2}  # 22 draws of 20 rows


def test_without_weights_every_row_is_drawn_as_often_as_another(stored):
    data = opened(stored, "a", "b")
    _, places = owners(data, data.batches(5, workers=0), 6)
    assert len(set(itertools.chain(*places))) == 30


def test_a_mixture_goes_on_where_it_was_with_any_number_of_processes_and_threads(stored):
    data = opened(stored, "a", "b", weights=(2.0, 1.0))
    whole = owners(data, data.batches(4, workers=0), 9)[1]
    batches = data.batches(4, workers=2)
    assert owners(data, batches, 5)[1] == whole[:5]
    state = batches.get_state()
    halves = [data.batches(4, workers=p, process_index=p, process_count=2) for p in range(2)]
    for half in halves:
        half.set_state(state)
    resumed = [owners(data, half, 4)[1] for half in halves]
    assert [a + b for a, b in zip(*resumed, strict=True)] == whole[5:]
    with pytest.raises(InputError, match=r"shares was \[\[20, 2.0\], \[11, 1.0\]\], is \[\[20, 1.0\], \[11, 1.0\]\]"):
        opened(stored, "a", "b", weights=(1.0, 1.0)).batches(4).set_state(state)


def test_statistics_are_of_the_rows_as_often_as_they_are_drawn(stored):
    a, b = (stored[1][name][STATE].astype(np.float64) for name in "ab")
    plain = opened(stored, "a", "b").norm_stats["state"]
    np.testing.assert_allclose(plain.mean, np.concatenate([a, b]).mean(axis=0), atol=1e-7)
    weighted = opened(stored, "a", "b", weights=(1.0, 3.0)).norm_stats["state"]
    mean = a.mean(axis=0) / 4 + 3 * b.mean(axis=0) / 4
    np.testing.assert_allclose(weighted.mean, mean, atol=1e-7)
    spread = ((a - mean) ** 2).mean(axis=0) / 4 + 3 * ((b - mean) ** 2).mean(axis=0) / 4
    np.testing.assert_allclose(weighted.std, np.sqrt(spread), atol=1e-7)


def test_weighted_quantiles_are_those_of_values_repeated_as_often():
    values = np.random.default_rng(0).standard_normal((3, 200)).astype(np.float32)
    counts = np.random.default_rng(1).integers(1, 5, 200)
    ours = norm_stats.of_vectors(values, counts.astype(np.float64))
    theirs = norm_stats.of_vectors(np.repeat(values, counts, axis=1))
    for name in ("mean", "std"):
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), atol=1e-7)
    np.testing.assert_array_equal(ours.q01, theirs.q01)
    np.testing.assert_array_equal(ours.q99, theirs.q99)


def test_statistics_of_chunks_are_weighted_too(stored, tmp_path):
    flags = ["--data", *(str(stored[0] / name) for name in "ab"), "--image", f"base_0_rgb={STILL}"]
    out = tmp_path / "stats"
    assert main(["norm-stats", *flags, "--weights", "1", "3", "--action-horizon", "2", "--out", str(out)]) == 0
    saved, seen = norm_stats.load(out / "a+b"), opened(stored, "a", "b", weights=(1.0, 3.0)).norm_stats
    for name in ("state", "actions"):
        np.testing.assert_array_equal(saved[name].mean, seen[name].mean)
        np.testing.assert_array_equal(saved[name].q99, seen[name].q99)


def test_each_set_holds_out_its_share_and_a_choice_follows_the_weights(stored):
    data = opened(stored, "a", "b", weights=(1.0, 9.0), hold_out_ratio=0.5)
    assert {int(row >= 20) for row in data.held} == {int(row >= 20) for row in data.rows} == {0, 1}
    assert not set(data.held) & set(data.rows)
    many = [data.calibration(4, seed=seed).arrays["episode_index"] for seed in range(40)]
    of_b = np.mean(np.concatenate(many) >= 3)
    assert of_b > 0.75  # 0.9, but without taking a row twice


def test_episodes_are_chosen_for_each(stored):
    data = opened(stored, "a", "b", episodes=("!2", ":"))
    assert np.bincount(data.episodes).tolist() == [7, 4, 6, 5]
    data = opened(stored, "a", "a", episodes=("2", ":2"), weights=(3.0, 1.0))
    assert [int(count) for count in np.bincount(data.episodes) if count] == [9, 7, 4]
    assert data.asset_id == "a"


def test_notes_name_their_set_and_other_rates_are_noted(stored, tmp_path):
    folder = sets.copied(stored[0] / "b", tmp_path / "c")
    sets.edit_info(folder, fps=20)
    for file in sets.tables(folder):
        sets.edit_table(
            file, lambda t: sets.with_column(t, "timestamp", [t.column("timestamp").to_numpy() / np.float32(2)])
        )
    sets.edit_info(folder, total_tasks=9)
    config = DataFlags(image=(f"base_0_rgb={STILL}",), tokenizer=SPM, action_horizon=2)
    data = open_data(config, [str(stored[0] / "a"), str(folder)], ARCH, assets=None, hold_out_ratio=0.0, seed=0)
    assert any(note.startswith(f"{folder}: info.json says total_tasks 9") for note in data.notes)
    assert "different numbers of rows a second" in data.notes[-1]


def test_episodes_that_are_there_twice_are_noted(stored, tmp_path):
    robot = Robot("own", {"base_0_rgb": STILL})
    folder = stored[0] / "a"
    assert open_recordings([folder, stored[0] / "b"], robot).notes == ()
    (tmp_path / "link").symlink_to(folder)
    (note,) = open_recordings([folder, tmp_path / "link"], robot).notes
    assert f"first episode 0 of {tmp_path / 'link'} those of episode 0 of {folder}" in note
    assert open_recordings([folder, tmp_path / "link"], robot, episodes=[":2", "2:"]).notes == ()


def refusals(folder, tmp_path):
    write(tmp_path / "wide", "v3.0", COLUMNS | {STATE: 5}, {STILL: "image"})
    a, b = str(folder / "a"), str(folder / "b")
    return {
        "does not fit": (
            [a, str(tmp_path / "wide")],
            {},
            r"observation.state has 5 dimensions in .*wide and 4 in .*a;",
        ),
        "twice": ([a, a], {}, "names the same twice"),
        "nothing": ([], {}, "takes LeRobot data sets or .npz files, not nothing"),
        "two forms": ([a, "d.npz"], {}, "takes LeRobot data sets or .npz files, not .* and d.npz"),
        "one weight": ([a, b], {"weights": (1.0,)}, "--weights has 1 values for 2 data sets"),
        "no share": ([a, b], {"weights": (1.0, 0.0)}, "--weights are numbers above 0"),
        "weight of one": ([a], {"weights": (1.0,)}, "--weights are numbers above 0, one for each of several"),
    }


def test_what_cannot_be_mixed_is_refused(stored, tmp_path):
    for sources, flags, message in refusals(stored[0], tmp_path).values():
        config = DataFlags(image=(f"base_0_rgb={STILL}",), tokenizer=SPM, action_horizon=2, **flags)
        with pytest.raises(InputError, match=message):
            open_data(config, sources, ARCH, assets=None, hold_out_ratio=0.0, seed=0)


def test_model_ready_observations_are_mixed_and_must_be_alike(tmp_path):
    arch = toys.architecture()
    for name, seed in (("a", 0), ("b", 1)):
        np.savez(tmp_path / f"{name}.npz", **toys.data(arch, 6, seed=seed).arrays)
    short = {key: value[:, :2] if key == "actions" else value for key, value in toys.data(arch, 6).arrays.items()}
    np.savez(tmp_path / "short.npz", **{key: value for key, value in short.items() if key != "noise"})
    sources = [tmp_path / f"{name}.npz" for name in ("a", "b")]
    data = open_dataset(sources, arch, weights=[1.0, 1.0])
    assert next(data.batches(4, workers=0))["state"].shape == (4, 6)
    assert data.norm_stats is data.asset_id is data.pictures is None
    with pytest.raises(InputError, match=r"actions is 2 x 6 in .*short.npz and 4 x 6 in .*a.npz; data sets of one run"):
        open_dataset([sources[0], tmp_path / "short.npz"], arch)


def test_all_sets_are_checked(stored, tmp_path, capsys):
    folder = sets.copied(stored[0] / "b", tmp_path / "c")
    sets.edit_info(folder, total_frames=1)
    both = ["--data", str(stored[0] / "a"), str(folder)]
    assert main(["check", *both]) == 2
    shown = capsys.readouterr()
    assert "is whole" in shown.out
    assert "total_frames 1" in shown.out
    assert f"error: {folder} has 1 fault" in shown.err
    assert json.loads((folder / "meta/info.json").read_text())["total_frames"] == 1


def test_the_held_out_loss_is_the_weighted_mean_of_the_sets_losses(stored):
    data = opened(stored, "a", "b", weights=(1.0, 3.0), hold_out_ratio=0.5)
    held = data.held_out_sets(6)
    assert {number: (weight, len(part)) for number, (weight, part) in held.items()} == {0: (1.0, 3), 1: (3.0, 3)}
    assert [{int(name >= 3) for name in part.episodes} for _, part in held.values()] == [{0}, {1}]
    params, mesh = toys.params(ARCH), make_mesh(1)
    found = held_out_loss(ARCH, held, mesh, batch_size=8)(params)
    alone = [
        held_out_loss(ARCH, {0: part}, mesh, batch_size=8)(params)
        == {"held_out_loss": found[f"held_out_loss/{number}"]}
        for number, part in held.items()
    ]
    assert alone == [True, True]
    expected = (found["held_out_loss/0"] + 3 * found["held_out_loss/1"]) / 4
    assert found["held_out_loss"] == pytest.approx(expected)
    assert found["held_out_loss/0"] != pytest.approx(found["held_out_loss/1"], rel=1e-3)


def test_without_weights_every_held_out_row_counts_alike_and_an_empty_set_is_left_out(stored):
    held = opened(stored, "a", "b", hold_out_ratio=0.5).held_out_sets(1)
    assert {number: (weight, len(part)) for number, (weight, part) in held.items()} == {0: (16.0, 1), 1: (6.0, 1)}
    lone = opened(stored, "a", "b", episodes=("0", ":"), weights=(5.0, 1.0), hold_out_ratio=0.5)
    assert list(lone.held_out_sets(6)) == [1]
    assert set(lone.held_out(2).episodes) <= {1, 2}
