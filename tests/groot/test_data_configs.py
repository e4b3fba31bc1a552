"""Isaac-GR00T's named data configurations: what its own transforms made of states, actions and a model's answers."""

import dataclasses
import json
import shutil

import groot_recordings as golden
import numpy as np
import pytest
from etils import epath
from groot_recordings import GOLDEN
from lerobot_sets import edit_table, tables, with_column

from clp_jax.checkpoint import read_spec
from clp_jax.cli import main
from clp_jax.commands.conventions import Told, choose_conventions
from clp_jax.commands.data_flags import DataFlags, open_data, stats_of_checkpoint
from clp_jax.commands.serve import Serve, make_policy
from clp_jax.errors import InputError
from clp_jax.models import Lengths, groot
from clp_jax.processing.conventions import conventions_of_json
from clp_jax.processing.robots import with_modality
from scripts.make_lerobot_toy import write

pytest.importorskip("tokenizers")

RECORDED = golden.recording("data_configs")
UPSTREAM = json.loads((GOLDEN / "data_configs.json").read_text())
CONFIGURATIONS = groot.CONFIGURATIONS
TOLERANCE = 3e-6
"""Upstream turns rotations in float32, we in float64."""


def architecture() -> groot.Architecture:
    """The recorded toy, as wide and with as many robots as the released model."""
    found = golden.architecture("ckpt")
    return dataclasses.replace(found, state_dim=64, action_dim=32, embodiments=32, embodiment="new_embodiment")


def checkpoint(folder, name: str) -> epath.Path:
    """Files of a checkpoint that knows the robot of a configuration."""
    (folder / "experiment_cfg").mkdir()
    entry = UPSTREAM[name]["metadata"]
    (folder / "experiment_cfg/metadata.json").write_text(json.dumps({"new_embodiment": entry}))
    return epath.Path(folder)


def processing(folder: epath.Path, name: str):
    a = architecture()
    chosen = choose_conventions(Told(data_config=name), a, None).conventions
    robot = groot.known_robot(a, chosen.robot, folder)
    stats, _ = stats_of_checkpoint(folder, None, a, robot)
    tokenizer = groot.load_tokenizer(a, None, epath.Path(GOLDEN / "ckpt"))
    return groot.processing(a, robot, stats, tokenizer, Lengths(4, chosen.max_token_len))


def test_all_of_upstreams_configurations_are_there():
    assert set(CONFIGURATIONS) == set(UPSTREAM)


@pytest.mark.parametrize("name", UPSTREAM)
def test_numbers_and_actions_are_upstreams(tmp_path, name):
    theirs = UPSTREAM[name]
    conventions = CONFIGURATIONS[name].conventions
    robot = conventions.robot
    assert robot is not None
    assert list(robot.images.values()) == theirs["video"]
    assert [list(robot.state), list(robot.actions), [robot.task]] == [
        theirs[key] for key in ("state", "action", "language")
    ]
    assert conventions.action_horizon == theirs["horizon"]
    ours = processing(checkpoint(tmp_path, name), name)
    assert ours.cameras == tuple(sorted(ours.cameras))
    images = dict.fromkeys(robot.images, np.zeros((8, 8, 3), np.uint8))
    for i in range(3):
        state, actions = RECORDED[f"{name}/state"][i], RECORDED[f"{name}/action"][i]
        ours.check_dims(len(state), actions.shape[1])
        found = ours.inputs(state=state, images=images, prompt="push", actions=actions)
        for key, vector, dims in (("state", "state", 64), ("actions", "action", 32)):
            expected = RECORDED[f"{name}/out/{vector}"][i]
            seen = expected.shape[-1]
            np.testing.assert_allclose(found[key][..., :seen], expected, atol=TOLERANCE)
            assert found[key].shape[-1] == dims
            assert not found[key][..., seen:].any()
        assert found["action_mask"].sum(axis=1).tolist() == [RECORDED[f"{name}/out/action"].shape[-1]] * 4
    model = np.pad(RECORDED[f"{name}/model"], [(0, 0), (0, 32 - RECORDED[f"{name}/model"].shape[1])])
    np.testing.assert_allclose(
        ours.outputs(model, state=RECORDED[f"{name}/state"][0]), RECORDED[f"{name}/robot"], atol=TOLERANCE
    )


NAME, TASK = "bimanual_panda_gripper", "annotation.human.action.task_description"
CAMERAS = [key.removeprefix("video.") for key in UPSTREAM[NAME]["video"]]
WIDTHS = {
    vector: {name: kind["shape"][0] for name, kind in UPSTREAM[NAME]["metadata"]["modalities"][vector].items()}
    for vector in ("state", "action")
}


def modality() -> dict:
    """The file of a data set in which the parts lie in reverse order, one of the arms in a column of its own."""
    found: dict = {"video": {camera: {"original_key": f"observation.images.{camera}"} for camera in CAMERAS}}
    for vector in ("state", "action"):
        start, found[vector] = 1, {}
        for name, width in reversed(WIDTHS[vector].items()):
            rotation = UPSTREAM[NAME]["metadata"]["modalities"][vector][name]["rotation_type"]
            entry = {"start": start, "end": start + width} | ({"rotation_type": rotation} if rotation else {})
            found[vector][name], start = entry, start + width
    found["state"]["left_arm_eef_pos"] = {"start": 0, "end": 3, "original_key": "observation.left"}
    found["annotation"] = {TASK.removeprefix("annotation."): {}, "human.validity": {}}
    return found


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A data set with a modality.json, and its rows."""
    folder = tmp_path_factory.mktemp("groot") / "set"
    dims = {"observation.state": 1 + sum(WIDTHS["state"].values()), "observation.left": 3}
    columns = dims | {"action": 1 + sum(WIDTHS["action"].values()), TASK: 1}
    truth = write(folder, "v2.1", columns, {f"observation.images.{camera}": "image" for camera in CAMERAS})
    for file in tables(folder):
        edit_table(file, lambda table: with_column(table, TASK, table["task_index"]))
    (folder / "meta/modality.json").write_text(json.dumps(modality()))
    return folder, truth


def of_file(truth, vector: str) -> np.ndarray:
    """The vector with the parts in the configuration's order."""
    parts = []
    for name in WIDTHS[vector]:
        entry = modality()[vector][name]
        column = entry.get("original_key", "observation.state" if vector == "state" else "action")
        parts.append(truth[column][:, entry["start"] : entry["end"]])
    return np.concatenate(parts, axis=1)


def opened(folder, **flags):
    flags = DataFlags(data_config=NAME, **flags)
    return open_data(flags, str(folder), architecture(), assets=epath.Path(GOLDEN / "ckpt"), hold_out_ratio=0.0, seed=0)


def test_a_data_set_says_where_the_parts_of_a_configuration_are(stored, tmp_path):
    folder, truth = stored
    data = opened(folder)
    assert data.conventions is not None
    robot, stats = data.conventions.robot, data.norm_stats
    assert robot is not None
    assert stats is not None
    assert stats["state"].max is not None
    assert robot.images == {f"view_{i}": f"observation.images.{camera}" for i, camera in enumerate(CAMERAS)}
    assert robot.state_modes[:2] == ("min_max", "quaternion>rotation_6d")
    assert robot.task == TASK
    state, actions = of_file(truth, "state"), of_file(truth, "action")
    np.testing.assert_allclose(stats["state"].max, state.max(axis=0), rtol=1e-6)
    expected = groot.processing(
        architecture(), robot, stats, groot.load_tokenizer(architecture(), None, epath.Path(GOLDEN / "ckpt")),
        Lengths(16, data.conventions.max_token_len),
    )  # fmt: skip
    images = {camera: truth[key][3] for camera, key in robot.images.items()}
    chunk = actions[np.minimum(np.arange(3, 19), 6)]
    wanted = expected.inputs(state=state[3], images=images, prompt="push the button", actions=chunk)
    batch = data.read(np.array([3]))
    for key, value in wanted.items():
        assert np.array_equal(batch[key][0], value), key
    assert batch["action_mask"][0, 0].sum() == actions.shape[1]
    # What is recorded is read back, and serves with the configuration's name or without.
    assert conventions_of_json(json.loads(json.dumps(data.conventions.to_json()))) == data.conventions
    record = {"steps": [{"command": "finetune", "conventions": data.conventions.to_json()}]}
    for told in (Told(), Told(data_config=NAME)):
        assert choose_conventions(told, architecture(), record).conventions == data.conventions
    with pytest.raises(InputError, match=r"Isaac-GR00T's bimanual_panda_hand, .* by the checkpoint's clp.json"):
        choose_conventions(Told(data_config="bimanual_panda_hand"), architecture(), record)
    said = str(data.conventions)
    assert "state min_max, quaternion>rotation_6d, 2 min_max" in said
    assert "images and prompts of isaac" in said


def test_augmentation_gets_whole_images_and_a_policy_the_middle(stored):
    data = opened(stored[0])
    assert data.read_whole is not None
    seen, whole = data.read(np.array([0])), data.read_whole(np.array([0]))
    assert {key for key in seen if not np.array_equal(seen[key], whole[key])} == {f"image/view_{i}" for i in range(3)}
    batches = {augmented: next(data.batches(1, augmented=augmented, workers=0)) for augmented in (False, True)}
    assert not np.array_equal(*(batch["image/view_0"] for batch in batches.values()))


def test_statistics_are_of_the_configurations_parts_in_its_order(stored, tmp_path):
    folder, truth = stored
    assert main(["norm-stats", "--data", str(folder), "--data-config", NAME, "--out", str(tmp_path / "stats")]) == 0
    found = json.loads((tmp_path / "stats/set/norm_stats.json").read_text())["norm_stats"]
    for name, vector in (("state", "state"), ("actions", "action")):
        np.testing.assert_allclose(found[name]["min"], of_file(truth, vector).min(axis=0), rtol=1e-6)
    assert main(["check", "--data", str(folder), "--data-config", NAME]) == 0


def test_a_step_names_the_parts_as_upstream_does(stored, tmp_path):
    data = opened(stored[0])
    assert data.conventions is not None
    files = groot.side_files(
        epath.Path(GOLDEN / "ckpt"),
        embodiment="new_embodiment",
        norm_stats=data.norm_stats,
        robot=data.conventions.robot,
    )
    entry = json.loads(files["experiment_cfg/metadata.json"])["new_embodiment"]
    theirs = UPSTREAM[NAME]["metadata"]
    for vector in ("state", "action"):
        assert list(entry["statistics"][vector]) == list(WIDTHS[vector])
        kinds = entry["modalities"][vector]
        assert {name: kind["shape"][0] for name, kind in kinds.items()} == WIDTHS[vector]
    quat = "right_arm_eef_quat"
    assert entry["modalities"]["state"][quat] == theirs["modalities"]["state"][quat]
    (tmp_path / "experiment_cfg").mkdir()
    (tmp_path / "experiment_cfg/metadata.json").write_bytes(files["experiment_cfg/metadata.json"])
    again, _ = stats_of_checkpoint(epath.Path(tmp_path), None, architecture(), data.conventions.robot)
    assert again is not None
    assert data.norm_stats is not None
    np.testing.assert_array_equal(again["state"].min, data.norm_stats["state"].min)
    with pytest.raises(InputError, match=r"state\.right_arm_eef_quat is a rotation \(quaternion\).*--data-config"):
        groot.norm_stats_of(epath.Path(tmp_path), architecture())


@pytest.mark.slow
def test_a_released_checkpoint_is_served_by_a_configurations_name(tmp_path):
    shutil.copytree(GOLDEN / "ckpt", tmp_path / "ckpt")
    shutil.copytree(GOLDEN / "eagle", tmp_path / "eagle")
    checkpoint(tmp_path / "ckpt", "so100_dualcam")
    entry = UPSTREAM["so100_dualcam"]["metadata"] | {"embodiment_tag": "so100"}
    (tmp_path / "ckpt/experiment_cfg/metadata.json").write_text(json.dumps({"so100": entry}))
    config = Serve(checkpoint=str(tmp_path / "ckpt"), data_config="so100_dualcam", dtype="float32", max_batch=1)
    policy = make_policy(config, read_spec(config.checkpoint))
    assert policy.metadata["keys"] == [
        *("video/front", "video/wrist", "state/single_arm", "state/gripper", "prompt")
    ]  # fmt: skip
    assert policy.metadata["conventions"].startswith("Isaac-GR00T's so100_dualcam: 16 actions")
    rng = np.random.default_rng(0)
    request = {
        **{f"video.{camera}": rng.integers(0, 256, (48, 64, 3)).astype(np.uint8) for camera in ("front", "wrist")},
        **{f"state.{name}": rng.standard_normal(kind["shape"]) for name, kind in entry["modalities"]["state"].items()},
        "prompt": "push",
    }
    prepared = policy.prepare(request)
    low, high = (
        np.concatenate([entry["statistics"]["state"][p][k] for p in ("single_arm", "gripper")]) for k in ("min", "max")
    )
    state = np.concatenate([request["state.single_arm"], request["state.gripper"]])
    scaled = np.where(high > low, 2 * (state - low) / np.where(high > low, high - low, 1) - 1, 0)
    np.testing.assert_allclose(prepared.inputs["state"][: len(state)], scaled, atol=1e-5)


def test_what_does_not_fit_is_refused(stored, tmp_path):
    a = architecture()
    for told, message in (
        (Told(data_config="so101"), "--data-config 'so101' is not known here; did you mean so100"),
        (Told(data_config="pi0_libero"), "pi0_libero is openpi's; give it with --openpi-config"),
        (Told(openpi_config="so100"), "so100 is Isaac-GR00T's; give it with --data-config"),
        (Told(openpi_config="pi0_libero", data_config="so100"), "each name a configuration"),
    ):
        with pytest.raises(InputError, match=message):
            choose_conventions(told, a, None)
    other = tmp_path / "set"
    shutil.copytree(stored[0], other)
    for change, message in (
        (lambda m: m["state"].pop("left_gripper_qpos"), r"there is no state\.left_gripper_qpos; the file has"),
        (lambda m: m["video"].pop("front_view"), r"there is no video\.front_view"),
        (lambda m: m["annotation"].pop("human.action.task_description"), r"there is no annotation\.human\.action"),
        (
            lambda m: m["state"]["right_arm_eef_quat"].pop("rotation_type"),
            "has no rotation_type, and is to become rotation_6d",
        ),
        (lambda m: m["state"]["right_arm_eef_quat"].update(rotation_type="rotation"), "is no mode of a GR00T-N1"),
        (
            lambda m: m["state"]["right_arm_eef_quat"].update(rotation_type="axis_angle"),
            "has 4 dimensions, a rotation by axis_angle 3",
        ),
    ):
        changed = modality()
        change(changed)
        (other / "meta/modality.json").write_text(json.dumps(changed))
        with pytest.raises(InputError, match=message):
            opened(other)
    (other / "meta/modality.json").unlink()
    with pytest.raises(InputError, match=r"has no meta/modality\.json, which says where state\.right_arm_eef_pos"):
        opened(other)
    robot = CONFIGURATIONS[NAME].conventions.robot
    assert robot is not None
    stats, tokenizer = opened(stored[0]).norm_stats, groot.load_tokenizer(a, None, epath.Path(GOLDEN / "ckpt"))
    assert stats is not None
    with pytest.raises(InputError, match=r"nothing says how many dimensions state\.right_arm_eef_pos"):
        groot.processing(a, robot, stats, tokenizer, Lengths(16, 900))
    found = with_modality(robot, stored[0] / "meta/modality.json")
    modes = ("sin_cos", *found.action_modes[1:])
    for changed, message in (
        ({"action_modes": modes}, "mode sin_cos, from which no action can be made"),
        ({"action_modes": ("",)}, "have 6 parts and 1 modes"),
        ({"delta": (True,)}, "delta"),
    ):
        with pytest.raises(InputError, match=message):
            groot.processing(a, dataclasses.replace(found, **changed), stats, tokenizer, Lengths(16, 900))
