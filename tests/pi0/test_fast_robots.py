"""π0-FAST between a robot's data and the robot: observations, training, answers."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import toys
from recordings import GOLDEN
from served import loaded, params

from clp_jax.checkpoint import read_spec, write_params
from clp_jax.cli import main
from clp_jax.commands.serve import Serve, make_policy
from clp_jax.errors import InputError
from clp_jax.loading import read_architecture
from clp_jax.models import Lengths, family_of, pi0
from clp_jax.models.pi0.fast import sample_tokens
from clp_jax.models.pi0.fast_tokenizer import FILES, FastTokenizer, load_action_tokenizer
from clp_jax.models.pi0.observation import Observation
from clp_jax.models.pi0.robots import DROID, LIBERO
from clp_jax.processing.norm_stats import NormStats
from clp_jax.processing.robots import Robot, mask
from clp_jax.processing.tokenizer import load_tokenizer
from clp_jax.serving import wire
from clp_jax.serving.policy import Policy
from clp_jax.serving.requests import ModelRequests, RobotRequests
from scripts.make_lerobot_toy import write

pytestmark = pytest.mark.slow

ARCH = dataclasses.replace(toys.architecture("pi0_fast"), vocab_size=810)
WORDS, FAST = GOLDEN / "tokenizer/tiny_paligemma.model", GOLDEN / "tokenizer/fast"
HORIZON, TOKENS, STEPS = 4, 100, 3
ROBOT = Robot(
    "toy", {"base_0_rgb": "top", "wrist_0_rgb": "wrist"}, ("state",), ("action",), delta=mask(2), action_dim=3
)
STATS = {name: NormStats(np.zeros(3), np.ones(3), np.full(3, -2.0), np.full(3, 3.0)) for name in ("state", "actions")}


@pytest.fixture(scope="module")
def tokenizer():
    return FastTokenizer(load_tokenizer(WORDS), load_action_tokenizer(str(FAST), None))


def chain(tokenizer, robot=ROBOT, stats=STATS, **settings):
    return pi0.processing(ARCH, robot, stats, tokenizer, Lengths(HORIZON, TOKENS), **settings)


def observation(seed=0):
    rng = np.random.default_rng(seed)
    images = {key: rng.integers(1, 256, (6, 8, 3)).astype(np.uint8) for key in ("top", "wrist")}
    return images | {"state": rng.uniform(-1, 1, 3), "prompt": "open the_drawer"}


def inputs(tokenizer, robot=ROBOT, actions=None):
    seen = observation()
    images = {camera: seen[key] for camera, key in robot.images.items() if key in seen}
    return chain(tokenizer, robot).inputs(state=seen["state"], images=images, prompt=seen["prompt"], actions=actions)


CHAINS = json.loads((GOLDEN / "golden_fast_tokenizer.json").read_text())["chains"]
ROBOTS = {
    "libero": dataclasses.replace(LIBERO, delta=mask(6, -1)),
    "droid": dataclasses.replace(
        DROID, images={"base_0_rgb": "exterior_image_1_left", "wrist_0_rgb": "wrist_image_left"}
    ),
}
"""As openpi's pi0_fast_libero and pi0_fast_droid have them."""


@pytest.mark.parametrize("name", CHAINS)
def test_inputs_and_answers_are_those_of_openpis_transforms(tokenizer, name):
    recorded, robot = CHAINS[name], ROBOTS[name]
    stats = {key: NormStats(**{k: np.array(x) for k, x in entry.items()}) for key, entry in recorded["stats"].items()}
    actions, state = (np.array(recorded[key], np.float32) for key in ("actions", "state"))
    full = pi0.processing(ARCH, robot, stats, tokenizer, Lengths(len(actions), 160))
    pictures = [np.random.default_rng(seed).integers(0, 256, (6, 8, 3)).astype(np.uint8) for seed in (1, 2)]
    seen = {"state": state, "images": dict(zip(robot.images, pictures, strict=True)), "prompt": "Pick_up the bowl"}
    found = full.inputs(**seen, actions=actions)
    for key in ("tokenized_prompt", "tokenized_prompt_mask", "token_ar_mask", "token_loss_mask"):
        np.testing.assert_array_equal(found[key], recorded[key], err_msg=key)
    np.testing.assert_array_equal(full.inputs(**seen)["tokenized_prompt"], recorded["asked"])
    assert full.cameras == tuple(recorded["image"])
    for camera, image in recorded["image"].items():
        np.testing.assert_array_equal(found[f"image/{camera}"], image)
        assert found[f"image_mask/{camera}"] == recorded["image_mask"][camera]
    written = found["tokenized_prompt"][found["token_loss_mask"]]
    np.testing.assert_allclose(full.outputs(written, state=state), recorded["answered"], atol=1e-5)


def test_inputs_are_what_the_model_reads(tokenizer):
    described = pi0.inputs(ARCH, Lengths(HORIZON, TOKENS))
    for actions in (None, np.zeros((HORIZON, 3))):
        found = inputs(tokenizer, actions=actions)
        assert {key: (array.shape, array.dtype) for key, array in found.items()} == {
            key: (leaf.shape, leaf.dtype) for key, leaf in described.items()
        }
        assert found["token_loss_mask"].any() == (actions is not None)


def test_camera_that_the_robot_lacks_is_black_and_not_masked(tokenizer):
    found = inputs(tokenizer)
    assert not found["image/base_1_rgb"].any()
    assert found["image/base_0_rgb"].any()
    assert found["image/wrist_0_rgb"].any()
    assert all(found[f"image_mask/{camera}"] for camera in pi0.FAST_CAMERAS)


def test_robots_with_the_cameras_of_pi0_keep_their_names(tokenizer):
    """openpi's LIBERO has them: a wrist camera by name is neither cropped nor turned in training."""
    robot = dataclasses.replace(ROBOT, images={"base_0_rgb": "top", "left_wrist_0_rgb": "wrist"})
    found = inputs(tokenizer, robot)
    assert [key for key in found if key.startswith("image/")] == [f"image/{camera}" for camera in pi0.CAMERAS]
    assert found["image/left_wrist_0_rgb"].any()
    assert set(LIBERO.images) <= set(pi0.robot_cameras(ARCH))
    mixed = dataclasses.replace(ROBOT, images={"left_wrist_0_rgb": "wrist", "wrist_0_rgb": "wrist"})
    with pytest.raises(InputError, match="give them names of base_0_rgb, base_1_rgb, wrist_0_rgb, or of base_0_rgb, "):
        chain(tokenizer, mixed)


def test_state_outside_of_the_prompt_may_have_any_number_of_dimensions(tokenizer):
    wide = {name: NormStats(*(np.full(40, x) for x in (0.0, 1.0, -2.0, 3.0))) for name in STATS}
    state = np.linspace(-1, 1, 40)
    found = chain(tokenizer, stats=wide).inputs(state=state, images={}, prompt="go")
    assert found["state"].shape == (32,)
    longest = chain(tokenizer, stats=wide).prompt_tokens("go", 40)
    assert longest > chain(tokenizer).prompt_tokens("go", 3)


def test_actions_of_a_robot_come_back_from_their_tokens(tokenizer):
    rng = np.random.default_rng(1)
    actions, state = rng.uniform(-1, 1, (HORIZON, 3)), observation()["state"]
    found = inputs(tokenizer, actions=actions)
    written = found["tokenized_prompt"][found["token_loss_mask"]]
    back = chain(tokenizer).outputs(written, state=state)
    # Half a coefficient of a tenth, over a chunk, in the units of the quantiles.
    assert np.abs(back - actions).max() <= np.sqrt(HORIZON) * 0.05 * (3.0 - -2.0) / 2
    assert chain(tokenizer).note(written) is None


def test_answer_without_actions_is_the_middle_of_the_range_and_says_so(tokenizer, caplog):
    state = observation()["state"]
    rubbish = np.arange(9, dtype=np.int32)
    found = chain(tokenizer).outputs(rubbish, state=state)
    middle = np.full((HORIZON, 3), 0.5)
    np.testing.assert_allclose(found, middle + np.array([state[0], state[1], 0]), atol=1e-5)
    assert "the model wrote no actions" in caplog.text
    assert "zeros" in (chain(tokenizer).note(rubbish) or "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stats": {"state": STATS["state"]}}, "the norm stats lack actions"),
        ({"stats": {n: NormStats(s.mean, s.std) for n, s in STATS.items()}}, "quantiles, which the norm stats lack"),
        ({"state_in_prompt": False}, "always spells the state"),
    ],
)
def test_chain_that_cannot_work_is_refused(tokenizer, change, message):
    with pytest.raises(InputError, match=message):
        chain(tokenizer, **change)


@pytest.fixture(scope="module")
def policy(tokenizer):
    model = loaded(ARCH, params(ARCH))
    return Policy(model, RobotRequests(chain(tokenizer), ARCH), action_horizon=HORIZON, max_batch=2, num_steps=STEPS)


def greedily(arch, steps):
    model = pi0.build(arch)
    return jax.jit(lambda params, seen: sample_tokens(model, params, Observation.of(seen), max_decoding_steps=steps))


def test_answers_are_the_models_greedy_tokens_alone_and_in_a_batch(policy, tokenizer):
    requests = [observation(seed) for seed in range(2)]
    prepared = [policy.prepare(request) for request in requests]
    together = policy.infer_batch(prepared)
    greedy = greedily(ARCH, STEPS)
    for request, entry, answer in zip(requests, prepared, together, strict=True):
        tokens = greedy(params(ARCH), {key: array[None] for key, array in entry.inputs.items()})
        expected = chain(tokenizer).outputs(np.asarray(tokens)[0], state=request["state"])
        np.testing.assert_array_equal(answer["actions"], expected)
        np.testing.assert_array_equal(policy.infer(request)["actions"], expected)
        assert answer["actions"].shape == (HORIZON, 3)
        assert "the model wrote no actions" in wire.unpack(wire.pack(answer))["note"]
    assert policy.metadata["noise_shape"] is None


def test_answer_with_actions_has_no_note(policy, tokenizer, monkeypatch):
    actions = np.random.default_rng(1).uniform(-1, 1, (HORIZON, 3))
    found = inputs(tokenizer, actions=actions)
    written = found["tokenized_prompt"][found["token_loss_mask"]]
    monkeypatch.setattr(policy, "_sampled", lambda *_: written[None])
    answer = policy.infer(observation())
    assert "note" not in answer
    assert np.abs(answer["actions"] - actions).max() < 0.3


def test_noise_and_model_ready_requests_are_refused(policy):
    with pytest.raises(InputError, match="draws no noise; leave noise out of the request"):
        policy.prepare(observation() | {"noise": np.zeros((HORIZON, 3), np.float32)})
    with pytest.raises(InputError, match="serve it with --robot"):
        ModelRequests(ARCH, Lengths(HORIZON, TOKENS))


def test_sequence_that_has_ended_stays_empty_while_others_go_on(monkeypatch):
    """What a request is batched with must not write behind its end."""
    arch = toys.architecture("pi0_fast")
    seen = toys.data(arch, 4).arrays
    free = np.asarray(greedily(arch, 6)(params(arch), seen))
    row = next(i for i in range(4) if not np.isin(free[i, 1], np.delete(free, i, axis=0)))
    monkeypatch.setattr("clp_jax.models.pi0.fast._END_OF_SEQUENCE", int(free[row, 1]))
    found = np.asarray(greedily(arch, 6)(params(arch), seen))
    end = int(np.argmax(free[row] == free[row, 1]))
    np.testing.assert_array_equal(found[row, : end + 1], free[row, : end + 1])
    assert not found[row, end + 1 :].any()
    np.testing.assert_array_equal(np.delete(found, row, axis=0), np.delete(free, row, axis=0))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two steps on a LeRobot set; the toy's vocabulary of actions was fitted to others, and fits."""
    folder = tmp_path_factory.mktemp("fast")
    write_params(folder / "full", toys.params(ARCH))
    write(folder / "set", "v3.0", {"state": 3, "action": 3}, {"top": "image", "wrist": "video"}, size=(16, 16))
    robot = {"images": ROBOT.images, "state": ["state"], "actions": ["action"], "delta": [2, -1]}
    (folder / "robot.json").write_text(json.dumps(robot))
    flags = ["--robot", folder / "robot.json", "--tokenizer", WORDS, "--fast-tokenizer", FAST, "--action-horizon", "4"]
    paths = ["--checkpoint", folder / "full", "--data", folder / "set", "--out", folder / "run"]
    length = ["--max-token-len", TOKENS, "--steps", "2", "--batch-size", "8", "--ema-decay", "None", "--no-augment"]
    assert main([str(word) for word in ("finetune", *paths, *flags, *length)]) == 0
    return folder


def test_run_carries_its_action_tokenizer_and_is_served_with_it(run):
    step = run / "run/1"
    for name in FILES:
        assert (step / "assets/fast" / name).read_bytes() == (FAST / name).read_bytes()
    serve = Serve(checkpoint=str(step), robot=str(run / "robot.json"), tokenizer=str(WORDS), num_steps=2, max_batch=1)
    policy = make_policy(serve, read_spec(step))
    assert (policy.metadata["action_horizon"], policy.requests.prompt_length) == (HORIZON, TOKENS)
    assert policy.infer(observation())["actions"].shape == (HORIZON, 3)


def test_analysis_reads_the_same_data(run, tmp_path):
    words = ["prune", "--checkpoint", run / "run/1", "--data", run / "set", "--robot", run / "robot.json"]
    words += ["--tokenizer", WORDS, "--action-horizon", "4", "--max-token-len", TOKENS, "--keep-layers", "2"]
    assert main([str(word) for word in (*words, "--out", tmp_path / "pruned")]) == 0
    assert read_architecture(read_spec(tmp_path / "pruned")).depths["vlm"] == 2
    assert (tmp_path / "pruned/assets/fast/tokenizer.json").exists()


def test_tokenizer_of_actions_is_refused_where_actions_are_no_tokens(tmp_path, capsys):
    write_params(tmp_path / "flow", toys.params(toys.architecture()))
    words = ["serve", "--checkpoint", tmp_path / "flow", "--robot", "libero", "--fast-tokenizer", FAST]
    assert main([str(word) for word in words]) == 2
    assert "--fast-tokenizer is not for a pi0, whose actions are no tokens" in capsys.readouterr().err


def test_model_says_what_it_samples():
    assert family_of(ARCH).num_steps(ARCH) == 256
    assert "answers with tokens" in (family_of(ARCH).why_no_actions(ARCH) or "")
