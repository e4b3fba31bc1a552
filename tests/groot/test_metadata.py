"""Statistics in NVIDIA's form: read by the robot's embodiment, shown, and written into the steps of a run."""

import copy
import json
import shutil

import groot_recordings as golden
import numpy as np
import pytest
from etils import epath
from groot_recordings import GOLDEN

from clp_jax.cli import main
from clp_jax.commands.data_flags import stats_of_checkpoint
from clp_jax.errors import InputError
from clp_jax.models import groot
from clp_jax.processing import policy_files
from clp_jax.processing.norm_stats import NormStats

KEYS = ("mean", "std", "q01", "q99", "min", "max")


def part(*low: float) -> dict:
    values = np.array(low)
    return {
        "min": values,
        "max": values + 2,
        "mean": values + 1,
        "std": 0 * values + 1,
        "q01": values,
        "q99": values + 2,
    }


def entry(tag: str, start: float, rotation: str | None = None) -> dict:
    """Statistics of a robot with an arm of two dimensions and a hand of one, as JSON."""
    parts = {"arm": part(start, start + 1), "hand": part(start + 2)}
    listed = {name: {key: value.tolist() for key, value in values.items()} for name, values in parts.items()}
    kinds = {
        name: {"absolute": True, "rotation_type": rotation, "shape": [len(values["min"])], "continuous": True}
        for name, values in parts.items()
    }
    video = {"ego_view": {"resolution": [64, 48], "channels": 3, "fps": 10.0}}
    return {
        "statistics": {"state": listed, "action": copy.deepcopy(listed)},
        "modalities": {"video": video, "state": kinds, "action": copy.deepcopy(kinds)},
        "embodiment_tag": tag,
    }


def checkpoint(folder, **robots) -> epath.Path:
    """A copy of the recorded checkpoint with an entry for each robot."""
    shutil.copytree(GOLDEN / "ckpt_pruned", folder / "ckpt")
    shutil.copytree(GOLDEN / "eagle", folder / "eagle")
    (folder / "ckpt/experiment_cfg").mkdir()
    (folder / "ckpt/experiment_cfg/metadata.json").write_text(json.dumps(robots))
    return epath.Path(folder / "ckpt")


def architecture(folder: epath.Path, **settings) -> groot.Architecture:
    return groot.architecture_of(golden.tensors("ckpt_pruned"), folder, **settings)


def two(folder) -> epath.Path:
    return checkpoint(folder, so100=entry("so100", 0.0), gr1=entry("gr1", 10.0))


def test_statistics_are_those_of_the_embodiment_with_parts_in_order(tmp_path):
    folder = two(tmp_path)
    found, name = stats_of_checkpoint(folder, None, architecture(folder, embodiment="so100"))
    assert name is None
    assert found is not None
    for vector in ("state", "actions"):
        assert found[vector].min.tolist() == [0, 1, 2]
        assert found[vector].max.tolist() == [2, 3, 4]
        assert found[vector].q99.tolist() == [2, 3, 4]
    with pytest.raises(InputError, match=r"has statistics of so100, gr1; choose one with --embodiment"):
        stats_of_checkpoint(folder, None, architecture(folder))
    assert stats_of_checkpoint(folder, None, architecture(folder, embodiment="unitree_g1")) == (None, None)
    # An exported run: its record names the statistics, its files do not.
    named, name = stats_of_checkpoint(folder, "set", architecture(folder, embodiment="so100"))
    assert name is None
    assert named is not None
    assert named["state"].min.tolist() == [0, 1, 2]


def test_the_only_robot_of_a_checkpoint_is_its_embodiment(tmp_path):
    folder = checkpoint(tmp_path, unitree_g1=entry("unitree_g1", 0.0))
    assert architecture(folder).embodiment == "unitree_g1"
    assert architecture(folder, embodiment="2").embodiment == "2"
    for wrong in ("gr2", "gr1", "4", "-1"):
        with pytest.raises(InputError, match="--embodiment"):
            architecture(folder, embodiment=wrong)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e["statistics"]["action"]["hand"].pop("max"), r"action\.hand has only one of min and max"),
        (lambda e: [e["statistics"]["action"]["hand"].pop(key) for key in ("min", "max")], "action has no min and max"),
        (lambda e: e["statistics"]["state"]["arm"].update(min=[9.0, 9.0]), "dimension 0: min 9 is above max 2"),
        (lambda e: e["statistics"]["state"]["arm"].update(mean=["a", 1]), r"state\.arm, mean, dimension 0 is 'a'"),
        (lambda e: e["statistics"].pop("state"), "so100, state is no object"),
        (lambda e: e["statistics"].update(state={}), "no parts of state"),
        (lambda e: e.update(statistics=3), "statistics is no object"),
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path, change, message):
    robot = entry("so100", 0.0)
    change(robot)
    folder = checkpoint(tmp_path, so100=robot)
    with pytest.raises(InputError, match=rf"metadata\.json.*{message}"):
        groot.own_statistics(folder)


def test_a_file_that_is_no_object_of_robots_is_refused(tmp_path):
    folder = checkpoint(tmp_path)
    for text in ("[1]", '{"gr1": 3}', "{"):
        (folder / "experiment_cfg/metadata.json").write_text(text)
        with pytest.raises(InputError, match=r"metadata\.json .*(?:restore it|copy)"):
            groot.own_statistics(folder)


def test_inspect_shows_the_statistics_of_every_robot(tmp_path, capsys):
    assert main(["inspect", str(two(tmp_path)), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["statistics"]
    assert {entry["file"]: entry["dimensions"] for entry in found} == {
        name: {"state": 3, "actions": 3} for name in ("so100", "gr1")
    }


def write(files: dict[str, bytes], folder) -> epath.Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return epath.Path(folder)


def statistics(dims: int) -> NormStats:
    values = np.arange(dims) + 0.5
    return NormStats(values, values + 1, q01=values, q99=values + 3, min=values, max=values + 3)


def test_a_step_names_its_robot_its_statistics_and_its_tokenizer(tmp_path):
    folder = two(tmp_path / "source")
    stats = {"state": statistics(3), "actions": statistics(4)}
    files = groot.side_files(folder, embodiment="so100", norm_stats=stats, depths={"llm": 5, "vl": 3, "dit": 8})
    step = write(files, tmp_path / "step")
    assert architecture(step).embodiment == "so100"
    found, _ = stats_of_checkpoint(step, None, architecture(step))
    assert found is not None
    for vector, expected in stats.items():
        for key in KEYS:
            assert getattr(found[vector], key).tolist() == getattr(expected, key).tolist()
    written = json.loads(files["experiment_cfg/metadata.json"])
    assert list(written) == ["so100"]
    assert list(written["so100"]["statistics"]["state"]) == ["arm", "hand"]  # as wide as before, by their names
    assert list(written["so100"]["statistics"]["action"]) == ["action"]
    assert written["so100"]["modalities"]["action"]["action"]["shape"] == [4]
    assert written["so100"]["modalities"]["video"] == entry("so100", 0.0)["modalities"]["video"]
    assert groot.load_tokenizer(architecture(step), None, step).image_token == 327
    # Without a word on the robot a step keeps what there was.
    kept = groot.side_files(folder)["experiment_cfg/metadata.json"]
    assert kept == (folder / "experiment_cfg/metadata.json").read_bytes()
    alone = groot.side_files(folder, embodiment="gr1")["experiment_cfg/metadata.json"]
    assert json.loads(alone) == {"gr1": entry("gr1", 10.0)}


def test_a_tokenizer_that_was_given_takes_the_place_of_the_checkpoints(tmp_path):
    folder = two(tmp_path / "source")
    other = tmp_path / "other"
    other.mkdir()
    groot.load_tokenizer(architecture(folder), None, folder)._model.save(str(other / "tokenizer.json"))
    shutil.copy(GOLDEN / "eagle/tokenizer_config.json", other)
    names = {name for name in groot.side_files(folder, tokenizer=other) if name.startswith("eagle/")}
    assert names == {"eagle/config.json", "eagle/tokenizer.json", "eagle/tokenizer_config.json"}


def trained_by_lerobot(folder, **config) -> epath.Path:
    """A policy folder as lerobot writes it, without weights."""
    names = ("mean", "std", "min", "max", "q01", "q99")
    values = {"observation.state": statistics(3), "action": statistics(4)}
    state = {
        f"{key}.{name}": getattr(entry, name).astype(np.float32) for key, entry in values.items() for name in names
    }
    state |= {"observation.images.top.mean": np.zeros((3, 1, 1), np.float32), "action.count": np.array([9], np.int64)}
    name = "policy_preprocessor_step_2_groot_pack_inputs_v3.safetensors"
    config = {"embodiment_tag": "so100", "normalize_min_max": True} | config
    steps = [
        {"registry_name": "to_batch_processor", "config": {}},
        {"registry_name": "groot_pack_inputs_v3", "config": config, "state_file": name},
    ]
    folder.mkdir()
    (folder / name).write_bytes(policy_files.to_safetensors(state))
    (folder / "policy_preprocessor.json").write_text(json.dumps({"name": "policy_preprocessor", "steps": steps}))
    (folder / "config.json").write_text(json.dumps({"type": "groot", "base_model_path": str(GOLDEN / "ckpt_pruned")}))
    shutil.copytree(GOLDEN / "eagle", folder / "eagle")
    return epath.Path(folder)


def test_a_policy_of_lerobot_brings_its_statistics_and_its_robot(tmp_path):
    folder = trained_by_lerobot(tmp_path / "policy")
    found, name = stats_of_checkpoint(folder, None, architecture(folder))
    assert architecture(folder).embodiment == "so100"
    assert name is None
    assert found is not None
    for vector, dims in (("state", 3), ("actions", 4)):
        for key in KEYS:
            np.testing.assert_array_equal(getattr(found[vector], key), getattr(statistics(dims), key))
    (folder / "policy_preprocessor_step_2_groot_pack_inputs_v3.safetensors").unlink()
    with pytest.raises(InputError, match="names policy_preprocessor_step_2_groot_pack_inputs_v3"):
        stats_of_checkpoint(folder, None, architecture(folder))
    raw = trained_by_lerobot(tmp_path / "raw", normalize_min_max=False)
    with pytest.raises(InputError, match="trained on numbers as they are"):
        stats_of_checkpoint(raw, None, architecture(raw))
