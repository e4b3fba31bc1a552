"""Requests as openpi's clients send them, through the model and back, against recordings of openpi's Policy.infer."""

import contextlib
import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import pytest
import smolvla_recordings
import toys
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from recordings import GOLDEN, SAMPLE_TOLERANCE, checkpoint, recording
from served import loaded, robot_requests, rows

from clp_jax.errors import InputError
from clp_jax.models import Lengths
from clp_jax.models.pi0 import architecture_of
from clp_jax.models.pi0.robots import ALOHA, ALOHA_SIM, DROID, LIBERO, METAWORLD
from clp_jax.processing import norm_stats
from clp_jax.processing.norm_stats import NormStats
from clp_jax.serving import wire
from clp_jax.serving.policy import Policy, buckets
from clp_jax.serving.requests import ModelRequests, RobotRequests, flat

STATS = GOLDEN / "ckpt/pi05_released/assets/physical-intelligence/libero/norm_stats.json"
PROMPT = json.loads((GOLDEN / "golden_tokenizers.json").read_text())["libero_prompt"]
TAGS = {"pi0": ["pi0", "pi0_extradelta"], "pi05": ["pi05", "pi05_nodsi"]}


@pytest.fixture(scope="module", params=TAGS)
def libero(request):
    """A recorded model with its parameters in bfloat16, as openpi serves them, and its chains by tag."""
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), checkpoint(f"{request.param}_released"))
    architecture, stats = architecture_of(params, dtype="float32"), norm_stats.load(STATS)
    length = 64 if request.param == "pi05" else 48

    def requests(tag):
        delta = (True,) * 6 + (False,) if tag == "pi0_extradelta" else ()
        requests = robot_requests(architecture, dataclasses.replace(LIBERO, delta=delta), stats, length=length)
        return dataclasses.replace(
            requests, processing=dataclasses.replace(requests.processing, state_in_prompt=tag == "pi05")
        )

    chains = {tag: requests(tag) for tag in TAGS[request.param]}
    policy = Policy(loaded(architecture, params), next(iter(chains.values())), action_horizon=10, max_batch=1)
    return policy, chains


@pytest.mark.slow
def test_libero_actions_are_openpis(libero, monkeypatch):
    policy, chains = libero
    g = recording("transforms")
    request = {key: g[f"libero_in/{key}"] for key in ("observation/state", "observation/image")}
    request |= {"observation/wrist_image": g["libero_in/observation/wrist_image"], "prompt": PROMPT}
    for tag, requests in chains.items():
        monkeypatch.setattr(policy, "requests", requests)
        answer = policy.infer(request, noise=g["libero_noise"])
        theirs, stats = g[f"libero_policy_actions/{tag}"], requests.processing.norm_stats["actions"]
        # The model's tolerance in the robot's units.
        scale = (stats.q99 - stats.q01) / 2 if requests.processing.quantiles else stats.std
        assert answer["actions"].shape == theirs.shape == (10, 7)
        assert np.max(np.abs(answer["actions"] - theirs) / scale[:7]) < SAMPLE_TOLERANCE, tag
        assert answer["state"] == g["libero_in/observation/state"].tolist()
        assert answer["policy_timing"]["infer_ms"] > 0


def images(*keys, shape=(6, 8, 3)):
    rng = np.random.default_rng(len(keys))
    return {key: rng.integers(0, 256, shape).astype(np.uint8) for key in keys}


def vectors(**sizes):
    return {key.replace("__", "/"): np.linspace(0.1, 0.9, size) for key, size in sizes.items()}


# What openpi's example clients send (policies/*_policy.py, make_*_example), and for METAWORLD the data set's keys.
CLIENTS = {
    "libero": (LIBERO, 8, images("observation/image", "observation/wrist_image") | vectors(observation__state=8)),
    "aloha": (
        ALOHA,
        14,
        {"images": images("cam_high", "cam_low", "cam_left_wrist", "cam_right_wrist", shape=(3, 6, 8))}
        | vectors(state=14),
    ),
    "aloha-sim": (ALOHA_SIM, 14, {"images": images("cam_high", shape=(3, 6, 8))} | vectors(state=14)),
    "droid": (
        DROID,
        8,
        images("observation/exterior_image_1_left", "observation/wrist_image_left")
        | vectors(observation__joint_position=7, observation__gripper_position=1),
    ),
    "metaworld": (METAWORLD, 4, images("observation.image") | vectors(**{"observation.state": 4})),
}


@functools.cache
def requests_of(name) -> tuple[RobotRequests, dict]:
    robot, dim, request = CLIENTS[name]
    architecture = dataclasses.replace(toys.architecture(), action_dim=32, vocab_size=512)
    stats = {key: NormStats(np.zeros(dim), np.ones(dim)) for key in ("state", "actions")}
    return robot_requests(architecture, robot, stats), request | {"prompt": "do something"}


@pytest.mark.parametrize("name", CLIENTS)
def test_what_openpis_clients_send_is_read(name):
    requests, request = requests_of(name)
    inputs, state = requests.inputs(flat(request))
    seen = {key.removeprefix("image/") for key in inputs if key.startswith("image/")}
    assert seen == set(requests.processing.robot.images) == set(requests.cameras)
    assert all(inputs[f"image/{camera}"].any() and inputs[f"image_mask/{camera}"] for camera in seen)
    assert len(state) == CLIENTS[name][1]
    assert requests.actions(np.zeros((10, 32)), state).shape == (10, requests.processing.robot.action_dim)


def test_a_prompt_that_is_too_long_is_cut_with_a_warning_or_refused(caplog):
    requests, request = requests_of("libero")
    long = request | {"prompt": "open the drawer " * 50}
    tokenizer = requests.processing.tokenizer
    for _ in range(3):
        inputs, _ = requests.inputs(flat(long))
    assert inputs["tokenized_prompt"].tolist() == tokenizer.encode(long["prompt"])[:48]
    assert inputs["tokenized_prompt_mask"].all()
    assert len(caplog.messages) == 1
    assert (
        f"'{long['prompt'][:80]}' has " in caplog.messages[0] and "more than 48: the rest is cut" in caplog.messages[0]
    )
    strict = dataclasses.replace(requests, long_prompts="refuse")
    with pytest.raises(InputError, match="more than 48; send a shorter one, or serve with a larger --max-token-len"):
        strict.inputs(flat(long))
    strict.inputs(flat(request))
    assert len(caplog.messages) == 1


def test_bytes_of_a_prompt_and_a_gripper_of_true_or_false_are_read():
    requests, request = requests_of("droid")
    plain, _ = requests.inputs(flat(request | {"prompt": "schließe die Tür", "observation/gripper_position": 1.0}))
    sent = {"prompt": "schließe die Tür".encode(), "observation/gripper_position": True}
    for gripper in (True, np.bool_(1), np.array([True])):
        inputs, state = requests.inputs(flat(request | sent | {"observation/gripper_position": gripper}))
        assert state[7] == 1.0
        np.testing.assert_equal(inputs, plain)


def packed_by_openpis_client(array: np.ndarray) -> np.ndarray:
    """What the server reads of an array that openpi's msgpack_numpy sends; ours sends no text in arrays."""
    entries = {"__ndarray__": True, "data": array.tobytes(), "dtype": array.dtype.str, "shape": array.shape}
    return wire.unpack(msgpack.packb({key.encode(): value for key, value in entries.items()}))


def test_a_prompt_may_be_the_one_entry_of_an_array_or_a_list():
    requests, request = requests_of("libero")
    text = "schließe die Tür 🚪"
    expected, _ = requests.inputs(flat(request | {"prompt": text}))
    arrays = [np.array(text), np.array([text]), np.array([[text]], ">U30"), np.array(text.encode())]
    for sent in ([text], [text.encode()], [np.array(text)], *map(packed_by_openpis_client, arrays)):
        np.testing.assert_equal(requests.inputs(flat(request | {"prompt": sent}))[0], expected)


def test_prompt_of_the_robot_stands_in_for_a_missing_one_and_is_no_other_robots_business():
    requests, request = requests_of("aloha-sim")
    request = {key: value for key, value in request.items() if key != "prompt"}
    told = requests.inputs(flat(request | {"prompt": "Transfer cube"}))[0]["tokenized_prompt"]
    np.testing.assert_array_equal(requests.inputs(flat(request))[0]["tokenized_prompt"], told)
    requests, request = requests_of("libero")
    request = {key: value for key, value in request.items() if key != "prompt"}
    with pytest.raises(InputError, match="the request lacks prompt; it holds image, state, wrist_image"):
        requests.inputs(flat(request))
    for prompt in ("go", ""):  # an empty one is one, too
        robot = dataclasses.replace(requests.processing.robot, prompt=prompt)
        told = dataclasses.replace(requests, processing=dataclasses.replace(requests.processing, robot=robot))
        assert "prompt" not in told.keys
        told.inputs(flat(request))


IMAGE = np.zeros((6, 8, 3), np.uint8)
BAD_LIBERO = {
    "lacks image": {"observation/image": None},
    "no camera's image": {"observation/image": np.zeros((1, 500, 3), np.uint8)},
    "expected height, width and 3 channels": {"observation/image": IMAGE[..., :2]},
    "expected uint8": {"observation/image": IMAGE.astype(np.uint16)},
    "image is int64, expected unsigned": {"observation/image": IMAGE.astype(np.int64)},
    "outside [0, 1]": {"observation/image": IMAGE - np.float32(1)},
    "wrist_image is float outside": {"observation/wrist_image": IMAGE + np.float32(np.nan)},
    "state has 7 dimensions, libero has 8": {"observation/state": np.zeros(7)},
    "state has shape (2, 4)": {"observation/state": np.zeros((2, 4))},
    "state holds NaN": {"observation/state": np.full(8, np.inf)},
    "state is str, expected floats": {"observation/state": "home"},
    "state is a ragged list": {"observation/state": [[1.0], [1.0, 2.0]]},
    "state is list, expected": {"observation/state": [None] * 8},
    "prompt has 2 entries, expected one text": {"prompt": ["go", "on"]},
    "prompt has 0 entries": {"prompt": np.empty(0, "U2")},
    "prompt is a float": {"prompt": np.zeros(1)},
    "state is ndarray, expected floats": {"observation/state": np.array(["home"] * 8)},
    "the bytes of prompt are no UTF-8: invalid start byte at byte 0": {"prompt": b"\xff"},
    "holds 'state' twice": {"state": np.zeros(8)},
    "is int, not text": {7: 1},
    "maps more than 4 deep": {"a": {"b": {"c": {"d": {}}}}},
    "48 tokens cannot hold it": {"prompt": "go " * 2000},
    "the normalised state holds NaN or infinite": {"observation/state": np.full(8, 1e300)},
}


def test_statistics_that_may_be_padded_still_say_how_many_dimensions_a_state_has_at_least():
    architecture = dataclasses.replace(toys.architecture(), action_dim=32, vocab_size=512)
    _, request = requests_of("libero")
    for varies in (8, 32):
        std = np.r_[np.ones(varies), np.zeros(32 - varies)]
        stats = {key: NormStats(np.zeros(32), std) for key in ("state", "actions")}
        requests = robot_requests(architecture, CLIENTS["libero"][0], stats)
        if varies == 8:
            requests.inputs(flat(request))
        else:
            with pytest.raises(InputError, match="the state has 8 dimensions, libero has 32"):
                requests.inputs(flat(request))
    with pytest.raises(InputError, match="the state has 7 dimensions"):
        robot_requests(architecture, CLIENTS["libero"][0], stats).inputs(
            flat(request | {"observation/state": np.zeros(7)})
        )


@pytest.mark.parametrize("message", BAD_LIBERO)
def test_request_that_is_no_observation_is_refused_in_one_line(message):
    requests, request = requests_of("libero")
    request = {key: value for key, value in (request | BAD_LIBERO[message]).items() if value is not None}
    with pytest.raises(InputError) as caught:
        requests.inputs(flat(request))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


NUMBERS = st.sampled_from(["?", "u1", "i4", "f2", "f4", "f8"]).flatmap(
    lambda name: hnp.arrays(name, hnp.array_shapes(min_dims=0, min_side=0, max_side=8))
)
ANYTHING = (
    st.none() | st.integers() | st.floats() | st.text() | st.binary() | st.lists(st.floats(), max_size=9) | NUMBERS
)
NEARLY = st.sampled_from([IMAGE, IMAGE[:3, :3], IMAGE.astype(np.float16), np.full(8, 1e300), [0.5] * 8, "go"])


@given(values=st.fixed_dictionaries(dict.fromkeys(("image", "wrist_image", "state", "prompt"), NEARLY | ANYTHING)))
def test_whatever_the_values_a_request_is_read_or_refused(values):
    requests, _ = requests_of("libero")
    with contextlib.suppress(InputError):
        inputs, state = requests.inputs(flat(values))
        assert np.isfinite(inputs["state"]).all()
        assert state.shape == (8,)


BAD_MODEL_READY = {
    "expected uint8 (8, 8, 3)": {"image/base_0_rgb": np.zeros((9, 8, 3), np.uint8)},
    "is float32 (8, 8, 3), expected uint8": {"image/base_0_rgb": np.zeros((8, 8, 3), np.float32)},
    "image_mask/base_0_rgb is int64 (), expected bool": {"image_mask/base_0_rgb": 1},
    "expected float32 (6,)": {"state": np.zeros(6)},
    "state holds NaN": {"state": np.full(6, np.nan, np.float32)},
    "expected int32 (5,)": {"tokenized_prompt": np.zeros(4, np.int32)},
    "beyond the vocabulary of 23": {"tokenized_prompt": np.full(5, 23, np.int32)},
    "nothing to act on": {
        f"image_mask/{camera}": False for camera in ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
    }
    | {"tokenized_prompt_mask": np.zeros(5, bool)},
}


@pytest.mark.parametrize("message", BAD_MODEL_READY)
def test_model_ready_request_that_does_not_fit_is_refused(message):
    requests = ModelRequests(toys.architecture(), Lengths(toys.HORIZON, toys.PROMPT))
    with pytest.raises(InputError) as caught:
        requests.inputs(flat(rows(1)[0] | BAD_MODEL_READY[message]))
    assert message in str(caught.value)


def test_cameras_with_dots_in_their_names_are_found_in_a_request():
    """lerobot's cameras are called observation.images.top; a request's keys are read with dots as slashes."""
    arch = smolvla_recordings.architecture()
    requests = ModelRequests(arch, Lengths(7, 24))
    request = {key: array[0] for key, array in smolvla_recordings.inputs().items() if key in requests.keys}
    inputs, _ = requests.inputs(flat(request))
    assert inputs.keys() == set(requests.keys)
    with pytest.raises(InputError, match="lacks image/observation/images/top"):
        requests.inputs(flat({key: value for key, value in request.items() if key != "image/observation.images.top"}))


def test_impossible_sizes_are_refused():
    flow = toys.architecture()
    with pytest.raises(InputError, match="--num-steps is 0"):
        Policy(loaded(flow, {}), ModelRequests(flow, Lengths(4, 5)), action_horizon=4, num_steps=0)


@pytest.mark.parametrize("largest", range(1, 20))
def test_buckets_end_at_the_largest_and_grow_at_most_twofold(largest):
    sizes = buckets(largest)
    assert (sizes[0], sizes[-1]) == (1, largest)
    assert all(a < b <= 2 * a for a, b in itertools.pairwise(sizes))
