"""A GR00T on a robot's data set and behind a server: NVIDIA's modality.json, any cameras, model-ready requests."""

import json

import groot_recordings as golden
import numpy as np
import pytest
from etils import epath
from groot_recordings import GOLDEN, OUTPUT_TOLERANCE, largest_difference, recording

from clp_jax.checkpoint import read_spec, write_params
from clp_jax.cli import main
from clp_jax.commands.data_flags import DataFlags, open_data
from clp_jax.commands.serve import Serve, make_policy
from clp_jax.data import open_dataset
from clp_jax.errors import InputError
from clp_jax.models import Lengths, groot
from clp_jax.processing import norm_stats
from clp_jax.processing.robots import read_robot
from clp_jax.serving.requests import ModelRequests, flat
from clp_jax.training.assets import assets_writer
from scripts.make_lerobot_toy import write

pytestmark = pytest.mark.slow

pytest.importorskip("tokenizers")

CKPT = GOLDEN / "ckpt_pruned"
STATE, HAND, ACTION = "observation.state", "observation.hand", "action"
FRONT, WRIST = "observation.images.front", "observation.images.wrist"
MODALITY = {
    "state": {"hand": {"start": 1, "end": 3, "original_key": HAND}, "arm": {"start": 0, "end": 4}},
    "action": {"arm": {"start": 0, "end": 4}, "gripper": {"start": 6, "end": 7}},
    "video": {"wrist": {"original_key": WRIST}, "front": {"original_key": FRONT}},
    "annotation": {"human.task_description": {"original_key": "task_index"}},
}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A data set with modality.json, its state and actions as the robot has them, and its statistics."""
    folder = tmp_path_factory.mktemp("groot") / "set"
    truth = write(folder, "v2.1", {STATE: 8, HAND: 3, ACTION: 7}, {FRONT: "image", WRIST: "image"})
    (folder / "meta/modality.json").write_text(json.dumps(MODALITY))
    state = np.concatenate([truth[HAND][:, 1:], truth[STATE][:, :4]], axis=1)
    stats = folder.parent / "stats"
    assert main(["norm-stats", "--data", str(folder), "--action-horizon", "5", "--out", str(stats)]) == 0
    return folder, state, truth[ACTION][:, [0, 1, 2, 3, 6]], stats / "set/norm_stats.json"


def scaled(x: np.ndarray, every: np.ndarray) -> np.ndarray:
    low, high = every.min(axis=0), every.max(axis=0)
    return 2 * (x - low) / (high - low) - 1


@pytest.mark.parametrize("given", ["the data", "a file"])
def test_a_data_set_with_modality_json_needs_no_robot(stored, given):
    folder, state, actions, file = stored
    architecture = golden.architecture("ckpt_pruned", embodiment="so100")
    flags = DataFlags(norm_stats="data" if given == "the data" else str(file))
    data = open_data(flags, str(folder), architecture, assets=epath.Path(CKPT), hold_out_ratio=0.0, seed=0)
    assert data.cameras == ("front", "wrist")
    batch = data.read(np.array([0, 3]))
    np.testing.assert_allclose(batch["state"][:, :6], scaled(state, state)[[0, 3]], atol=1e-5)
    assert not batch["state"][:, 6:].any()
    np.testing.assert_allclose(batch["actions"][1, 0, :5], scaled(actions, actions)[3], atol=1e-5)
    assert batch["action_mask"].all(axis=(0, 1)).tolist() == [True] * 5 + [False] * 2
    assert batch["embodiment_id"].tolist() == [2, 2]
    images = 2 * architecture.vision.num_tokens
    assert ((batch["tokenized_prompt"] == architecture.image_token).sum(axis=1) == images).all()
    assert batch["image/wrist"].shape == (2, 56, 56, 3)
    assert data.norm_stats is not None
    assert data.norm_stats["actions"].max is not None
    # The whole batch is what the model describes, and no more than a data set adds.
    lengths = Lengths(batch["actions"].shape[1], batch["tokenized_prompt"].shape[1])
    described = groot.inputs(architecture, lengths, data.cameras)
    assert described.keys() | {"action_is_pad"} == batch.keys()


def test_an_embodiment_is_asked_for_and_too_long_prompts_are_refused_at_once(stored):
    folder, *_ = stored
    flags = DataFlags(prompt="put " * 60 + "it down")
    for embodiment, message in ((None, "--embodiment"), ("so100", "larger --max-token-len")):
        architecture = golden.architecture("ckpt_pruned", embodiment=embodiment)
        with pytest.raises(InputError, match=message):
            open_data(flags, str(folder), architecture, assets=epath.Path(CKPT), hold_out_ratio=0.0, seed=0)


def request(folder, row: int) -> dict:
    rng = np.random.default_rng(row)
    return {
        "observation/state": rng.standard_normal(8),
        "observation/hand": rng.standard_normal(3),
        "observation/images/front": rng.integers(0, 256, (40, 50, 3)).astype(np.uint8),
        "observation/images/wrist": rng.integers(0, 256, (3, 30, 50)).astype(np.uint8),
        "prompt": "push the button",
    }


def test_a_server_answers_in_the_robots_units_and_reads_no_padding(stored):
    folder, _, actions, file = stored
    answers = []
    for tokens in (None, 86):
        config = Serve(
            checkpoint=str(CKPT),
            dtype="float32",
            max_batch=1,
            robot=str(folder / "meta/modality.json"),
            norm_stats=str(file),
            embodiment="so100",
            max_token_len=tokens,
        )
        policy = make_policy(config, read_spec(config.checkpoint))
        assert policy.metadata["action_dim"] == 5
        assert policy.metadata["keys"] == ["images/wrist", "images/front", "hand", "state", "prompt"]
        noise = recording()["sample_noise"][0]
        answers.append(policy.infer(request(folder, 0), noise=noise)["actions"])
    assert answers[0].shape == (5, 5)
    assert largest_difference(*answers) < OUTPUT_TOLERANCE  # as many padding tokens as you like
    stats = norm_stats.load(file)["actions"]
    assert stats.min is not None
    np.testing.assert_allclose(stats.min, actions.min(axis=0), rtol=1e-6)


def test_model_ready_requests_may_leave_out_the_masks_that_upstream_has_not():
    architecture, inputs = golden.architecture("ckpt_pruned"), golden.inputs()
    requests = ModelRequests(architecture, Lengths(5, inputs["tokenized_prompt"].shape[1]))
    asked = ("image/ego_view", "state", "embodiment_id", "tokenized_prompt", "tokenized_prompt_mask")
    given = {key: inputs[key][1] for key in asked}
    found, state = requests.inputs(flat(given))
    assert found.keys() == {*asked, "context_mask"}
    assert found["context_mask"].all()
    assert np.array_equal(state, inputs["state"][1])
    for key in asked:
        with pytest.raises(InputError, match=f"lacks {key}"):
            requests.inputs(flat({name: value for name, value in given.items() if name != key}))
    with pytest.raises(InputError, match=r"embodiment_id must be from 0 to 3"):
        requests.inputs(flat(given | {"embodiment_id": np.int32(4)}))


def observations(**changes) -> dict[str, np.ndarray]:
    """The recorded observations with a second picture, which comes first."""
    inputs = golden.inputs()
    inputs["image/view_1"] = inputs.pop("image/ego_view")
    inputs["image/view_0"] = 255 - inputs["image/view_1"]
    more = np.full((3, 16), golden.architecture("ckpt").image_token, np.int32)
    inputs["tokenized_prompt"] = np.concatenate([more, inputs["tokenized_prompt"]], axis=1)
    inputs["tokenized_prompt_mask"] = np.concatenate([more > 0, inputs["tokenized_prompt_mask"]], axis=1)
    del inputs["sample_noise"]
    return inputs | changes


def test_observations_of_any_cameras_are_read(tmp_path):
    np.savez(tmp_path / "two.npz", **observations())
    data = open_dataset(tmp_path / "two.npz", golden.architecture("ckpt"))
    assert data.cameras == ("view_0", "view_1")
    none = {key: array for key, array in observations().items() if not key.startswith("image/")}
    none["tokenized_prompt"] = np.zeros_like(none["tokenized_prompt"])
    np.savez(tmp_path / "none.npz", **none)
    with pytest.raises(InputError, match="holds no image/<camera>"):
        open_dataset(tmp_path / "none.npz", golden.architecture("ckpt"))


def test_time_runs_from_noise_to_the_action(tmp_path):
    for time, fits in ((0.0, True), (-0.001, True), (0.999, True), (1.0, False), (-0.01, False)):
        np.savez(tmp_path / "time.npz", **observations(time=np.full(3, time, np.float32)))
        if fits:
            open_dataset(tmp_path / "time.npz", golden.architecture("ckpt"))
            continue
        with pytest.raises(InputError, match=r"time must lie in \[-0\.0011, 1\), where 0 is noise"):
            open_dataset(tmp_path / "time.npz", golden.architecture("ckpt"))


def test_a_step_of_a_run_is_served_as_it_was_trained(stored, tmp_path):
    folder, *_ = stored
    spec, architecture = read_spec(CKPT), golden.architecture("ckpt_pruned", embodiment="so100")
    data = open_data(DataFlags(), str(folder), architecture, assets=spec.folder, hold_out_ratio=0.0, seed=0)
    files = epath.Path(tmp_path / "files")
    assets_writer(spec, architecture, data, embodiment="so100")(files)
    write_params(tmp_path / "run", golden.checkpoint("ckpt_pruned"), assets=files)
    robot = str(folder / "meta/modality.json")
    policy = make_policy(Serve(checkpoint=str(tmp_path / "run"), robot=robot), read_spec(tmp_path / "run"))
    prepared = policy.prepare(request(folder, 1))
    assert prepared.inputs["embodiment_id"] == 2
    assert data.norm_stats is not None
    processing = groot.processing(
        architecture, read_robot(robot), data.norm_stats, policy.requests.processing.tokenizer, Lengths(5, 112)
    )
    given = request(folder, 1)
    state = np.concatenate([given["observation/hand"][1:3], given["observation/state"][:4]])
    images = {camera: given[f"observation/images/{camera}"] for camera in ("front", "wrist")}
    expected = processing.inputs(state=state, images=images, prompt=given["prompt"])
    assert prepared.inputs.keys() == expected.keys()
    for key, array in expected.items():
        assert np.array_equal(prepared.inputs[key], array), key
