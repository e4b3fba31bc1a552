"""SimplerEnv's conventions on an environment with ManiSkill's spaces; its assets are in no package."""

import sys
import types

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from clp_jax.cli import main
from clp_jax.errors import InputError
from clp_jax.evaluation import simpler
from clp_jax.evaluation.rollouts import Asking, play
from clp_jax.evaluation.suite import Asked


class Pose:
    """ManiSkill's, of one environment: position [1, 3] and quaternion [1, 4] with w first."""

    def __init__(self, p, q):
        self.p, self.q = np.array([p], np.float32), np.array([q], np.float32)

    def inv(self):
        turn = self._turn().inv()
        return Pose(-turn.apply(self.p[0]), np.roll(turn.as_quat(), 1))

    def __mul__(self, other):
        return Pose(self.p[0] + self._turn().apply(other.p[0]), np.roll((self._turn() * other._turn()).as_quat(), 1))

    def _turn(self):
        return Rotation.from_quat(np.roll(self.q[0], -1))


class Bridge:
    """Solved by closing the hand; remembers how it was reset and what was done."""

    action_space = types.SimpleNamespace(shape=(7,), dtype=np.dtype(np.float32))

    def __init__(self):
        base = Pose([0.1, 0.0, 0.8], [0, 0, 0, 1])  # turned by 180 degrees about z
        hand = Pose([-0.2, 0.0, 1.0], [0, 0, 0, 1])
        robot = types.SimpleNamespace(pose=base, links_map={"ee_gripper_link": types.SimpleNamespace(pose=hand)})
        self.unwrapped, self.agent = self, types.SimpleNamespace(robot=robot)
        self.done = []

    def get_language_instruction(self):
        return ["put carrot on plate"]

    def reset(self, *, seed, options):
        self.seed, self.options = seed, options
        return self._seen(), {}

    def step(self, action):
        self.done.append(action)
        closed = np.array([action[6] == -1])
        return self._seen(), np.zeros(1), closed, np.array([False]), {"success": closed}

    def _seen(self):
        picture = np.zeros((1, 480, 640, 3), np.uint8)
        picture[:, :, 320:] = 200
        qpos = np.array([[0, 0, 0, 0, 0, 0, 0.037, 0.015]], np.float32)
        return {"agent": {"qpos": qpos}, "sensor_data": {"3rd_view_camera": {"rgb": picture}}}


def made(rotation="euler"):
    return simpler.Simpler(Bridge(), "carrot", seed=0, max_steps=60, size=224, rotation=rotation)


def test_what_is_sent_and_what_is_done():
    environment, seen = made(), []

    def ask(request):
        seen.append(request)
        return np.array([[0.01, 0, 0, 0, 0, 0.1, 0.9], [0, 0, 0, 0, 0, 0, 0.2], [0] * 7])

    episode = play(environment, "carrot", 5, Asking(replan=3, filmed=9), ask)
    assert (episode.success, episode.steps) == (True, 2) and environment._env.options == {"episode_id": 5}
    assert [action[6] for action in environment._env.done] == [1, -1]
    (request,) = seen
    assert request["prompt"] == "put carrot on plate"
    assert request["observation/image"].shape == (224, 224, 3) and request["observation/image"][0, -1, 0] == 200
    np.testing.assert_allclose(request["observation/state"], [0.3, 0, 0.2, 1, 0, 0, 0, 0.5], atol=1e-6)


@pytest.mark.parametrize("rotation", ["euler", "axis-angle"])
def test_rotations_are_read_as_the_policy_means_them(rotation):
    environment, turn = made(rotation), np.array([0.3, -0.5, 0.4])
    environment.reset(0)
    environment.step(np.array([0, 0, 0, *turn, 1.0]))
    meant = Rotation.from_euler("XYZ", turn) if rotation == "euler" else Rotation.from_rotvec(turn)
    done = Rotation.from_euler("XYZ", environment._env.done[0][3:6])
    assert (meant.inv() * done).magnitude() < 1e-6
    with pytest.raises(InputError, match="have 7 dimensions"):
        environment.step(np.zeros(8))


def test_the_limit_is_that_of_the_flag_and_not_of_maniskill(monkeypatch):
    made = []

    def make(name, **options):
        made.append((name, options))
        return Bridge()

    monkeypatch.setitem(sys.modules, "gymnasium", types.SimpleNamespace(make=make))
    monkeypatch.setitem(sys.modules, "mani_skill.envs", types.ModuleType("mani_skill.envs"))
    for task, asked, steps in (("eggplant", None, 120), ("carrot", 99, 99)):
        environment = simpler._make(task, seed=0, max_steps=asked, size=224, rotation="euler")
        assert environment.max_steps == made[-1][1]["max_episode_steps"] == steps
        assert made[-1][0] == simpler.TASKS[task].id and environment.fps == 5


def test_missing_downloads_are_named_and_nothing_is_asked(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MS_ASSET_DIR", str(tmp_path))
    words = ["evaluate", "--suite", "simpler", "--server", "b:1", "--out", str(tmp_path / "o")]
    assert main(words) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "download_asset bridge_v2_real2sim -y and python -m" in told
    (tmp_path / "data/tasks/bridge_v2_real2sim_dataset").mkdir(parents=True)
    assert main(words) == 2
    assert "run python -m mani_skill.utils.download_asset widowx250s -y; or" in capsys.readouterr().err
    (tmp_path / "data/robots/widowx").mkdir(parents=True)
    assert simpler.suite(Asked()).starts == 24 and simpler.suite(Asked(tasks=("eggplant",))).starts == 64
    assert main([*words, "--tasks", "soup"]) == 2
    assert "has no task soup; it has carrot, spoon, stack, eggplant" in capsys.readouterr().err
