"""An environment that is in no suite: its observations are the requests, its info tells success."""

import importlib.util
import json

import numpy as np
import pytest
import simulated_gym
from simulated_gym import serving

from clp_jax.cli import main
from clp_jax.errors import InputError
from clp_jax.evaluation import gymnasium_env
from clp_jax.evaluation.rollouts import Asking, play
from clp_jax.evaluation.suite import Asked


def made(name, **asked):
    suite = gymnasium_env.suite(f"simulated_gym:{name}", Asked(**asked))
    return suite.make(suite.tasks[0])


def walking(step, seen=None):
    def ask(request):
        if seen is not None:
            seen.append(request)
        return np.tile(np.array([step, 0.0]), (6, 1))

    return ask


@pytest.mark.parametrize(
    ("step", "success", "steps"), [(0.5, True, {5, 6}), (-0.5, False, {3, 4}), (0.01, False, {20})]
)
def test_an_episode_ends_where_the_environment_ends_it(step, success, steps):
    episode = play(made("Walk"), "Walk", 0, Asking(replan=6), walking(step))
    assert episode.success == success and episode.steps in steps


def test_requests_are_observations_with_the_instruction():
    seen: list[dict] = []
    play(made("Walk", tasks=("a",)), "a", 0, Asking(replan=4), walking(0.5, seen))
    assert seen[0]["prompt"] == "walk" and seen[0]["pixels"]["front"].shape == (12, 16, 3)
    assert seen[0]["state"].tolist() == [seen[0]["state"][0], 0.0]


def test_pictures_in_maps_are_blanked():
    seen: list[dict] = []
    play(made("Walk"), "Walk", 0, Asking(replan=4, blank_images=True), walking(0.5, seen))
    assert not any(request["pixels"]["front"].any() for request in seen) and seen[-1]["state"].all()


def test_an_environment_whose_rate_is_a_number_of_numpy_is_filmed(monkeypatch):
    monkeypatch.setattr(simulated_gym.Walk, "metadata", {"render_fps": 1 / np.float32(0.05)}, raising=False)
    episode = play(made("Walk"), "Walk", 0, Asking(replan=5, filmed=1), walking(0.5))
    assert episode.film is not None


def test_one_array_is_a_state():
    seen: list[dict] = []
    play(made("Bare", max_steps=9), "Bare", 0, Asking(replan=4), walking(0.5, seen))
    assert set(seen[0]) == {"observation.state"}


def test_starts_are_those_of_seed_task_and_number():
    starts = []
    for seed, task, number in ((0, "a", 0), (0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1)):
        environment = made("Walk", tasks=(task,), seed=seed)
        environment.reset(number)
        starts.append(environment.request()["state"][0])
    assert starts[0] == starts[1] and len(set(starts)) == 4


@pytest.mark.parametrize(
    ("name", "asked", "action", "message"),
    [
        ("Walk", {}, np.zeros(3), r"actions of Walk have shape \(2,\), not \(3,\)"),
        ("Silent", {}, np.zeros(2), "tells neither is_success nor success"),
        ("Bare", {}, None, "give --max-steps"),
        ("Grid", {}, None, r"an observation of Grid has shape \(3, 4\); give a dict, a picture or a state"),
        ("none", {}, None, "none returns NoneType, not a gymnasium.Env"),
        ("not_callable", {}, None, "has no function not_callable"),
        ("nothing", {}, None, "has no function nothing"),
    ],
)
def test_environments_that_cannot_be_played_are_told(name, asked, action, message):
    with pytest.raises(InputError, match=message):
        play(made(name, **asked), name, 0, Asking(replan=1), lambda request: [action])


def test_what_has_no_picture_is_not_filmed():
    environment = made("Bare", max_steps=9)
    environment.reset(0)
    with pytest.raises(InputError, match="give --filmed 0, or the render mode rgb_array"):
        environment.picture()
    environment._env.render_mode, environment._env.render = "rgb_array", lambda: np.ones((1, 1, 3), np.uint8)
    assert environment.picture().tolist() == [[[1, 1, 1]]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--env", "simulated_gym"), "is written module:factory"),
        (("--env", "no_such_module:make"), "there is no module no_such_module; give a module that Python can import"),
        (("--env", "simulated_gym:Walk", "--tasks", "../a"), "cannot be the name of a file"),
        (
            ("--env", "simulated_gym:Walk", "--image-size", "9", "--fast-rendering"),
            "--image-size and --fast-rendering: --env is made without them; let the factory make what you want, or",
        ),
        (
            ("--env", "simulated_gym:Walk", "--libero-suite", "libero_10", "--rotation", "axis-angle"),
            "--libero-suite and --rotation: --env is made without them",
        ),
        (("--env", "simulated_gym:Walk", "--suite", "metaworld"), "either --suite, or --env"),
        ((), "either --suite, or --env"),
    ],
)
def test_flags_that_cannot_be_are_refused(words, message, tmp_path, capsys):
    assert main(["evaluate", "--server", "b:1", "--out", str(tmp_path / "o"), *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_an_environment_of_gymnasium_itself(tmp_path, monkeypatch):
    """Through the command, from a file in the working folder; its limit is that of Gymnasium's own wrapper."""
    if importlib.util.find_spec("gymnasium") is None:
        pytest.skip("needs metaworld, which brings gymnasium")
    (tmp_path / "my_robot_of_gymnasium.py").write_text(
        "import gymnasium, numpy, simulated_gym\n"
        "class Env(simulated_gym.Walk, gymnasium.Env):\n"
        "    action_space = gymnasium.spaces.Box(-1, 1, (2,), numpy.float32)\n"
        "    unwrapped, spec = gymnasium.Env.unwrapped, None\n"
        "    def __init__(self):\n        self.task = ''\n"
        "    def reset(self, seed=None, options=None):\n        return super().reset(seed=seed)\n"
        "def make():\n    return gymnasium.wrappers.TimeLimit(Env(), 30)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    words = ["--env", "my_robot_of_gymnasium:make", "--episodes", "2", "--processes", "1", "--out", "found"]
    with serving(0.3) as server:
        assert main(["evaluate", *words, "--server", server]) == 0
    assert json.loads((tmp_path / "found/results.json").read_text())["all"]["successes"] == 2
    assert (tmp_path / "found/make.png").exists()
