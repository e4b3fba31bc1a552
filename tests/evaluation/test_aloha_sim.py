"""The real gym-aloha against openpi's client: its pictures, its starts, and its own program behind our server."""

import importlib.util
import json

import numpy as np
import pytest
import simulated

from clp_jax.checkpoint import read_spec
from clp_jax.cli import main
from clp_jax.commands.serve import Serve, make_policy
from clp_jax.errors import InputError
from clp_jax.evaluation.aloha_sim import AlohaSim, with_bars
from clp_jax.evaluation.rendering import import_mujoco
from clp_jax.serving.server import ServerSettings, serving

if importlib.util.find_spec("gym_aloha") is None:  # not imported: MuJoCo chooses how to draw when it is
    pytest.skip("needs gym_aloha", allow_module_level=True)
try:
    import_mujoco()
except InputError as error:
    pytest.skip(f"needs gym_aloha and a library to draw: {error}", allow_module_level=True)

SEED, HORIZON = 3, 12


@pytest.fixture(scope="module")
def cube():
    environment = AlohaSim("transfer-cube", seed=SEED, height=96)
    yield environment
    environment.close()


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    checkpoint = simulated.write_checkpoint(tmp_path_factory.mktemp("aloha"), "aloha-sim", 14)
    serve = Serve(checkpoint=str(checkpoint), robot="aloha-sim", action_horizon=HORIZON, num_steps=1, max_batch=1)
    with serving(make_policy(serve, read_spec(str(checkpoint))), ServerSettings(port=0)) as port:
        yield port


def test_episodes_and_pictures_are_those_of_openpis_client(cube):
    """Its client makes the environment once, and resets it with the numbers of one generator."""
    from gym_aloha.env import AlohaEnv

    theirs = AlohaEnv("transfer_cube", obs_type="pixels_agent_pos")
    rng = np.random.default_rng(SEED)
    for episode in range(2):
        seen, _ = theirs.reset(seed=int(rng.integers(2**32 - 1)))
        cube.reset(episode)
        for _ in range(2):
            action = seen["agent_pos"].astype(np.float32) + np.float32(0.05)
            seen, *_ = theirs.step(action)
            assert cube.step(action) is False
        assert np.array_equal(cube.request()["state"], seen["agent_pos"])
    full = AlohaSim("transfer-cube", seed=SEED)
    full._physics.set_state(theirs._env.physics.get_state())
    full._physics.forward()
    assert np.array_equal(full.picture(), seen["pixels"]["top"])
    full.close()
    theirs._env.physics.free()


def test_a_cube_in_the_other_hand_is_success(cube):
    cube.reset(0)
    cube._env._env.task.get_reward = lambda physics: 4
    try:
        assert cube.step(cube.request()["state"]) is True and cube.over
    finally:
        del cube._env._env.task.get_reward


def test_an_action_under_which_the_simulation_breaks_ends_the_episode(cube):
    cube.reset(0)
    for step in range(100):
        assert cube.step(np.full(14, 10.0 * (-1) ** step, np.float32)) is False
        if cube.over:
            break
    assert cube.over
    cube.reset(0)
    assert not cube.over and not cube.step(cube.request()["state"])


def test_what_is_sent_is_what_openpis_client_sends(cube):
    tools = pytest.importorskip("openpi_client.image_tools", reason="needs openpi_client")
    picture = np.random.default_rng(0).integers(0, 256, (480, 640, 3)).astype(np.uint8)
    assert np.array_equal(with_bars(picture, 224), tools.resize_with_pad(picture, 224, 224))
    cube.reset(0)
    sent = cube.request()
    assert list(sent) == ["state", "images"] and sent["images"]["cam_high"].shape == (3, 224, 224)


def test_openpis_client_acts_through_our_server(cube, port):
    """Its websocket client and its broker of chunks, as its example puts them together."""
    broker = pytest.importorskip("openpi_client.action_chunk_broker", reason="needs openpi_client")
    client = pytest.importorskip("openpi_client.websocket_client_policy", reason="needs openpi_client")
    policy = client.WebsocketClientPolicy("127.0.0.1", port)
    walking = broker.ActionChunkBroker(policy, 10)
    cube.reset(0)
    for _ in range(15):
        action = walking.infer(cube.request())["actions"]
        assert action.shape == (14,)
        cube.step(action)
    policy._ws.close()


def test_the_suite_runs_against_our_server(port, tmp_path):
    out = tmp_path / "found"
    words = ["--suite", "aloha-sim", "--tasks", "transfer-cube", "insertion", "--episodes", "1", "--max-steps", "12"]
    words += ["--processes", "1", "--image-size", "48", "--fast-rendering", "--server", f"127.0.0.1:{port}"]
    assert main(["evaluate", *words, "--out", str(out)]) == 0
    found = json.loads((out / "results.json").read_text())
    assert (found["replan"], found["all"]["steps"], found["latency"]["requests"]) == (10, 24, 4)
    assert found["policy"]["robot"] == "aloha-sim" and len(found["policy"]["checkpoint"]) == 64
    assert (out / "films/insertion-0000.mp4").exists() and (out / "transfer-cube.png").exists()
