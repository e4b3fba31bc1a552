"""Statistics of no data are refused on load; those without spread are said or refused where they are used."""

import copy
import dataclasses
import json

import lerobot_sets as sets
import numpy as np
import pytest
import toys
from lerobot_sets import ACTION, STATE, STILL
from recordings import GOLDEN

from clp_jax.data import open_dataset
from clp_jax.errors import InputError
from clp_jax.processing import norm_stats
from clp_jax.processing.norm_stats import NormStats, check_spread, narrow, of_vectors, warning
from clp_jax.processing.robots import Robot
from clp_jax.processing.tokenizer import load_tokenizer
from scripts.make_lerobot_toy import write

SOUND = {
    name: {"mean": [0.0, 1.0], "std": [1.0, 2.0], "q01": [-1.0, 0.0], "q99": [1.0, 3.0]}
    for name in ("state", "actions")
}


def stored(folder, value):
    folder.joinpath(norm_stats.FILE).write_text(json.dumps({"norm_stats": value}))
    return folder


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("std", [-0.5, 1.0], "actions, dimension 0: std is -0.5, a deviation is never negative"),
        ("q01", [-1.0, 4.0], "actions, dimension 1: q01 4 is above q99 3"),
        ("std", [0.0, 1.0], "actions, dimension 0: std is 0, but q01 and q99 differ"),
        ("mean", ["0", 1.0], "actions, mean, dimension 0 is '0', no number"),
        ("mean", [True, 1.0], "actions, mean, dimension 0 is True, no number"),
        ("mean", [None, 1.0], "actions, mean, dimension 0 is None, no number"),
        ("q99", [1e300, 3.0], "actions, q99, dimension 0 is 1e[+]300, values that are not finite in float32"),
        ("mean", "0", "actions, mean is no list of numbers"),
        ("mean", [], "actions, mean is no list of numbers"),
        ("mean", [[0.0], [1.0]], "actions, mean, dimension 0 is .0.0., no number"),
        ("mean", [0.0], "different shapes"),
        ("q01", None, "actions has only one of q01 and q99"),
    ],
)
def test_statistics_of_no_data_are_refused(tmp_path, key, value, message):
    changed = copy.deepcopy(SOUND)
    changed["actions"][key] = value
    with pytest.raises(InputError, match=message) as caught:
        norm_stats.load(stored(tmp_path, changed))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [{}, [], None, {"state": []}, {"state": None}, {"state": {}}, 5])
def test_a_file_without_statistics_is_refused(tmp_path, value):
    with pytest.raises(InputError, match="of openpi"):
        norm_stats.load(stored(tmp_path, value))


def test_padding_of_zeros_loads_and_matters_only_where_it_is_used(tmp_path):
    padded = {name: {key: [*values, 0.0] for key, values in entry.items()} for name, entry in SOUND.items()}
    stats = norm_stats.load(stored(tmp_path, padded))
    check_spread(stats, {"state": 2, "actions": 2}, source="file", by="quantiles")
    with pytest.raises(InputError, match=r"of file have no spread .*: actions 2 \(q01 0, q99 0: one unit beside them"):
        check_spread(stats, {"state": 2, "actions": 3}, source="file", by="quantiles")
    with pytest.raises(InputError, match=r"state 2 \(std 0: one unit beside the mean becomes 1e[+]06\)"):
        check_spread(stats, {"state": 3, "actions": 2}, source="file", by="deviation")


def test_a_rare_jump_is_narrow_for_quantiles_and_not_for_a_deviation():
    rare = np.zeros(1000)
    rare[5] = 1.0
    stats = {"actions": of_vectors([np.linspace(-1, 1, 1000), rare])}
    assert narrow(stats, {"actions": 2}, by="deviation") == ()
    assert narrow(stats, {"actions": 2}, by="quantiles") == (
        "actions 1 (q01 0, q99 0: one unit beside them becomes 2e+06)",
    )
    said = warning(stats, {"actions": 2})
    assert said is not None
    assert "actions 1" in said
    assert warning(stats, {"actions": 1}) is None


def test_statistics_without_quantiles_are_asked_for_their_deviation():
    stats = {"state": NormStats(np.zeros(2), np.array([1.0, 0.0]))}
    assert len(narrow(stats, {"state": 2})) == 1
    assert narrow(stats, {"state": 2}, by="quantiles") == ()


@pytest.fixture(scope="module")
def rare(tmp_path_factory):
    """A gripper that moves once in 200 rows."""
    folder = tmp_path_factory.mktemp("rare") / "set"
    write(folder, "v2.1", {STATE: 5, ACTION: 3}, {STILL: "image"}, lengths=(7, 4, 189))
    for file in sets.tables(folder):
        sets.edit_table(file, lambda t: sets.with_column(t, ACTION, sets.vectors(moving_once(t))))
    return folder


def moving_once(table):
    values = table.column(ACTION).combine_chunks().flatten().to_numpy().reshape(len(table), 3).copy()
    values[:, 2] = np.arange(len(table)) == 50
    return values


def opened(folder, kind, **settings):
    architecture = dataclasses.replace(toys.architecture(kind), vocab_size=512)
    tokenizer = load_tokenizer(GOLDEN / "tokenizer/tiny_spm.model")
    robot = Robot("toy", {"base_0_rgb": STILL})
    return open_dataset(folder, architecture, robot=robot, tokenizer=tokenizer, action_horizon=2, **settings)


def test_a_rare_jump_is_said_where_quantiles_normalise_it(rare):
    assert opened(rare, "pi0").notes == ()
    (note,) = opened(rare, "pi05").notes
    assert "actions 2 (q01 0, q99 0: one unit beside them becomes 2e+06) hardly vary" in note


def test_a_file_without_spread_is_refused_and_a_checkpoints_own_is_only_said(rare):
    stats = opened(rare, "pi05").norm_stats
    assert len(opened(rare, "pi05", norm_stats=stats).notes) == 1
    with pytest.raises(InputError, match=r"the statistics of my.json have no spread .*: actions 2"):
        opened(rare, "pi05", norm_stats=stats, stats_file="my.json")
    assert opened(rare, "pi0", norm_stats=stats, stats_file="my.json").notes == ()
