"""SimplerEnv's four WidowX tasks (Bridge) in ManiSkill 3 (mani-skill 3.0.1, digital_twins/bridge_dataset_eval).

The picture of the camera beside the robot, stretched to a square; as state the hand in the frame of the robot's base
and how open it is. A policy answers with a step of the hand [m], its rotation, and an openness in [0, 1], five times a
second. Success counts whenever it happens; published numbers differ in that. Two downloads are in no package.
"""

import functools
import importlib
import os
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Float, UInt8

from clp_jax.errors import InputError
from clp_jax.evaluation.gymnasium_env import GymnasiumEnvironment
from clp_jax.evaluation.suite import Asked, Suite

Rotation = Literal["euler", "axis-angle"]
"""How a policy means its rotation: as ManiSkill 3 reads it (XYZ, each about the axes turned before), or as the first
SimplerEnv did. They agree to first order."""


class _Task(NamedTuple):
    id: str
    steps: int
    starts: int


TASKS = {
    "carrot": _Task("PutCarrotOnPlateInScene-v1", 60, 24),
    "spoon": _Task("PutSpoonOnTableClothInScene-v1", 60, 24),
    "stack": _Task("StackGreenCubeOnYellowCubeBakedTexInScene-v1", 60, 24),
    "eggplant": _Task("PutEggplantInBasketScene-v1", 120, 64),
}
_DOWNLOADS = {
    "bridge_v2_real2sim": "data/tasks/bridge_v2_real2sim_dataset",
    "widowx250s": "data/robots/widowx",
}
"""What ``mani_skill.utils.download_asset`` fetches, and where to."""
_INSTALL = "pip install mani-skill==3.0.1 torch"
_SENT_SIZE = 224
_FPS = 5
_FINGERS = (0.015, 0.037)
"""Where a finger is [m] when the hand is closed and open."""
_HAND = "ee_gripper_link"


def suite(asked: Asked) -> Suite:
    """The WidowX tasks, all four by default.

    Raises:
      InputError: no such task, or downloads are missing, with the commands that fetch them.
    """
    tasks = tuple(dict.fromkeys(asked.tasks)) or tuple(TASKS)
    unknown = [task for task in tasks if task not in TASKS]
    if unknown:
        raise InputError(f"SimplerEnv has no task {', '.join(unknown)}; it has {', '.join(TASKS)}.")
    _check_downloads()
    make = functools.partial(
        _make,
        seed=asked.seed,
        max_steps=asked.max_steps,
        size=asked.image_size or _SENT_SIZE,
        rotation=asked.rotation,
    )
    starts = min(TASKS[task].starts for task in tasks)
    needs = {"mani_skill": _INSTALL}
    return Suite("simpler", tasks, make, starts=starts, memory=3 * 2**30, needs=needs)


def _check_downloads() -> None:
    """ManiSkill itself would ask on the standard input."""
    home = Path(os.environ.get("MS_ASSET_DIR", "~/.maniskill")).expanduser()
    missing = [name for name, place in _DOWNLOADS.items() if not (home / place).exists()]
    if missing:
        todo = " and ".join(f"python -m mani_skill.utils.download_asset {name} -y" for name in missing)
        raise InputError(
            f"SimplerEnv needs files that are not in {home}: where mani-skill is installed, run {todo}; or set "
            "$MS_ASSET_DIR."
        )


def _make(task: str, *, seed: int, max_steps: int | None, size: int, rotation: str) -> "Simpler":
    for name in ("OMP_NUM_THREADS", "LP_NUM_THREADS"):
        os.environ.setdefault(name, "1")  # a step is five times slower where threads fight for cores
    try:
        gymnasium = importlib.import_module("gymnasium")
        importlib.import_module("mani_skill.envs")
    except ImportError as error:
        raise InputError(f"ManiSkill is not installed ({error}); {_INSTALL}.") from error
    steps = max_steps or TASKS[task].steps
    env = gymnasium.make(
        TASKS[task].id,
        max_episode_steps=steps,
        obs_mode="rgb+segmentation",
        num_envs=1,
        sim_backend="physx_cpu",
        render_backend="cpu",
    )
    return Simpler(env, task, seed=seed, max_steps=steps, size=size, rotation=rotation)


class Simpler(GymnasiumEnvironment):
    """One task; an episode's number is that of its places.

    Args:
      env: ManiSkill's environment of the task, one at a time.
      task: one of `TASKS`.
      seed: of what is drawn besides.
      max_steps: actions of an episode.
      size: pixels of the edge of a picture as it is sent.
      rotation: what the policy's rotations are.
    """

    def __init__(self, env: Any, task: str, *, seed: int, max_steps: int, size: int, rotation: str):
        if rotation not in get_args(Rotation):
            raise InputError(f"--rotation {rotation} is unknown; give {' or '.join(get_args(Rotation))}.")
        super().__init__(env, task, seed=seed, max_steps=max_steps)
        self._size, self._rotation, self.fps = size, rotation, _FPS

    def reset(self, episode: int) -> None:
        """Begin an episode."""
        self._seen, _ = self._env.reset(seed=self.start_seed(episode), options={"episode_id": episode})
        self.over = False
        self.instruction = str(self._env.unwrapped.get_language_instruction()[0])

    def step(self, action: Float[np.ndarray, " d"]) -> bool:
        """Do an action: three numbers of motion [m], three of rotation [rad], and how open the hand shall be.

        Raises:
          InputError: it has not seven dimensions.
        """
        if np.shape(action) != (7,):
            raise InputError(f"SimplerEnv's actions have 7 dimensions, not {np.shape(action)}.")
        motion, turn, openness = action[:3], action[3:6], action[6]
        if self._rotation == "axis-angle":
            from scipy.spatial.transform import Rotation as Turn

            turn = Turn.from_rotvec(turn).as_euler("XYZ")
        return super().step(np.concatenate([motion, turn, [1.0 if openness > 0.5 else -1.0]]))

    def state(self) -> Float[np.ndarray, "8"]:
        """The hand in the frame of the base: position [m], quaternion (w, x, y, z), and openness in [0, 1]."""
        robot = self._env.unwrapped.agent.robot
        hand = robot.pose.inv() * robot.links_map[_HAND].pose
        closed, opened = _FINGERS
        fingers = np.asarray(self._seen["agent"]["qpos"], np.float64)[0, -2:]
        openness = np.clip((fingers.mean() - closed) / (opened - closed), 0.0, 1.0)
        return np.concatenate([np.asarray(hand.p, np.float64)[0], np.asarray(hand.q, np.float64)[0], [openness]])

    def picture(self) -> UInt8[np.ndarray, "h w 3"]:
        """What the camera sees."""
        return np.asarray(self._seen["sensor_data"]["3rd_view_camera"]["rgb"])[0]

    def request(self) -> dict[str, Any]:
        """What a policy is asked."""
        from PIL import Image

        square = Image.fromarray(self.picture()).resize((self._size, self._size), Image.Resampling.LANCZOS)
        return {
            "observation/image": np.asarray(square),
            "observation/state": self.state(),
            "prompt": self.instruction,
        }
