"""Flags of --data: which robot, which statistics, which tokenizer."""

import dataclasses
import shutil

import numpy as np
import pytest
import toys
from etils import epath
from recordings import GOLDEN

from clp_jax.commands.data_flags import DataFlags, open_data
from clp_jax.errors import InputError
from clp_jax.processing import norm_stats
from clp_jax.processing.norm_stats import NormStats
from scripts.make_lerobot_toy import write

ARCH = dataclasses.replace(toys.architecture("pi05"), vocab_size=512)
SPM = str(GOLDEN / "tokenizer/tiny_spm.model")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("flags") / "toy"
    write(path, "v3.0", {"observation.state": 4, "action": 4}, {"observation.image": "image"})
    return str(path)


@pytest.fixture
def assets(tmp_path):
    shutil.copy(SPM, tmp_path / "paligemma_tokenizer.model")
    return epath.Path(tmp_path)


def save_stats(assets: epath.Path, *names: str) -> None:
    for i, name in enumerate(names):
        values = [np.full(4, float(x)) for x in (i, 1, -1, 1)]
        norm_stats.save(assets / name, dict.fromkeys(("state", "actions"), NormStats(*values)))


def opened(folder: str, assets: epath.Path | None, **flags):
    config = DataFlags(robot="metaworld", **flags)
    return open_data(config, folder, ARCH, assets=assets, hold_out_ratio=0.0, seed=0)


def test_the_checkpoints_only_statistics_and_tokenizer_are_used(folder, assets):
    save_stats(assets, "lab/arm")
    data = opened(folder, assets)
    assert (data.asset_id, data.norm_stats["state"].mean[0]) == ("lab/arm", 0.0)


def test_several_statistics_need_a_choice(folder, assets):
    save_stats(assets, "a", "b")
    with pytest.raises(InputError, match="norm stats for a, b; choose one with --asset-id"):
        opened(folder, assets)
    assert opened(folder, assets, asset_id="b").norm_stats["state"].mean[0] == 1.0


def test_statistics_are_computed_if_asked_for_or_if_there_are_none(folder, assets):
    empty = opened(folder, assets)
    save_stats(assets, "a")
    asked = opened(folder, assets, norm_stats="data", asset_id="mine")
    assert (empty.asset_id, asked.asset_id) == ("toy", "mine")
    np.testing.assert_array_equal(empty.norm_stats["actions"].q99, asked.norm_stats["actions"].q99)


def test_statistics_of_a_file(folder, assets, tmp_path):
    save_stats(epath.Path(tmp_path / "own"), "x", "y")
    assert opened(folder, None, norm_stats=str(tmp_path / "own/y"), tokenizer=SPM).norm_stats["state"].mean[0] == 1.0


def test_flags_that_cannot_change_an_npz_are_refused(tmp_path):
    np.savez(tmp_path / "d.npz", **toys.data(ARCH).arrays)
    for flags in ({"robot": "libero"}, {"prompt": "go"}, {"action_horizon": 3}, {"tokenizer": SPM}):
        with pytest.raises(InputError, match=r"is model-ready: .* cannot change what it holds"):
            open_data(DataFlags(**flags), str(tmp_path / "d.npz"), ARCH, assets=None, hold_out_ratio=0.0, seed=0)


@pytest.mark.parametrize("name", ["action_horizon", "max_token_len"])
def test_sizes_below_one_are_refused(folder, assets, name):
    with pytest.raises(InputError, match="cannot be; give at least 1"):
        opened(folder, assets, **{name: 0})
