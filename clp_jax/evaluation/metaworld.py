"""MetaWorld as a robot sees it: a picture, the gripper's place and opening, an instruction.

MetaWorld's own observation holds the positions of objects and goal; only the scripted experts get it. Facts: metaworld
3.1.1, sawyer_xyz_env.py.
"""

import functools
import importlib
import zlib
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from clp_jax.errors import InputError
from clp_jax.evaluation.rendering import Renderer, free_camera, import_mujoco
from clp_jax.evaluation.suite import Asked, Suite

FPS = 80
"""Actions per second: five steps of 2.5 ms each."""
MAX_STEPS = 500
IMAGE_SIZE = 64
STATE_DIM = ACTION_DIM = 4
_MEMORY = 2**29
"""Bytes of a simulator's process."""

INSTRUCTIONS = {
    "assembly": "put the ring onto the peg",
    "basketball": "put the ball into the basket",
    "bin-picking": "move the cube into the other bin",
    "box-close": "put the lid onto the box",
    "button-press": "press the button",
    "button-press-topdown": "press the button from above",
    "button-press-topdown-wall": "press the button behind the wall from above",
    "button-press-wall": "press the button behind the wall",
    "coffee-button": "press the button of the coffee machine",
    "coffee-pull": "pull the mug away from the coffee machine",
    "coffee-push": "push the mug under the coffee machine",
    "dial-turn": "turn the dial",
    "disassemble": "take the ring off the peg",
    "door-close": "close the door",
    "door-lock": "lock the door",
    "door-open": "open the door",
    "door-unlock": "unlock the door",
    "drawer-close": "close the drawer",
    "drawer-open": "open the drawer",
    "faucet-close": "close the faucet",
    "faucet-open": "open the faucet",
    "hammer": "hammer in the nail",
    "hand-insert": "put the gripper into the hole",
    "handle-press": "press the handle down",
    "handle-press-side": "press the handle down from the side",
    "handle-pull": "pull the handle up",
    "handle-pull-side": "pull the handle up from the side",
    "lever-pull": "pull the lever up",
    "peg-insert-side": "put the peg into the hole",
    "peg-unplug-side": "pull the peg out of the hole",
    "pick-out-of-hole": "take the puck out of the hole",
    "pick-place": "lift the puck to the goal",
    "pick-place-wall": "lift the puck over the wall to the goal",
    "plate-slide": "slide the plate into the cabinet",
    "plate-slide-back": "slide the plate out of the cabinet",
    "plate-slide-back-side": "slide the plate out of the cabinet sideways",
    "plate-slide-side": "slide the plate into the cabinet sideways",
    "push": "push the puck to the goal",
    "push-back": "pull the puck back to the goal",
    "push-wall": "push the puck around the wall to the goal",
    "reach": "reach the goal",
    "reach-wall": "reach the goal behind the wall",
    "shelf-place": "put the cube onto the shelf",
    "soccer": "push the ball into the net",
    "stick-pull": "pull the thermos with the stick",
    "stick-push": "push the thermos with the stick",
    "sweep": "sweep the cube off the table",
    "sweep-into": "sweep the cube into the hole",
    "window-close": "close the window",
    "window-open": "open the window",
}

_MARKED = (
    *("coffee-pull", "pick-out-of-hole", "pick-place", "pick-place-wall", "push", "push-back", "push-wall", "reach"),
    *("reach-wall", "stick-pull", "stick-push"),
)
"""Tasks whose goal is a place in the air or on the table: only here MetaWorld's markers are drawn, a small ball. In the
others the marker would tell the task without the instruction."""


def suite(asked: Asked) -> Suite:
    """MetaWorld's tasks.

    Args:
      asked: with names of tasks, or the word all.

    Raises:
      InputError: no such task.
    """
    if not asked.tasks:
        raise InputError("say which --tasks of MetaWorld, for example drawer-open drawer-close, or all.")
    tasks = tuple(INSTRUCTIONS) if asked.tasks == ("all",) else tuple(dict.fromkeys(asked.tasks))
    check_tasks(list(tasks))
    make = functools.partial(
        MetaWorld,
        seed=asked.seed,
        image_size=asked.image_size or IMAGE_SIZE,
        max_steps=asked.max_steps or MAX_STEPS,
    )
    needs = dict.fromkeys(("mujoco", "metaworld"), 'pip install "clp-jax[metaworld]"')
    return Suite("metaworld", tasks, make, memory=_MEMORY, robot="metaworld", needs=needs)


class MetaWorld:
    """One task. Where things lie is decided by (task, seed, episode) alone, not by what was run before.

    Args:
      task: one of `INSTRUCTIONS`.
      seed: of the episodes.
      image_size: pixels of the picture's edge.
      max_steps: actions of an episode, at most MetaWorld's 500.

    Raises:
      InputError: no such task, or MetaWorld or its renderer is missing.
    """

    over, fps, draws_fast = False, FPS, True

    def __init__(self, task: str, *, seed: int = 0, image_size: int = IMAGE_SIZE, max_steps: int = MAX_STEPS):
        check_tasks([task])
        if not 1 <= max_steps <= MAX_STEPS:
            raise InputError(f"{max_steps} steps an episode cannot be; MetaWorld ends after {MAX_STEPS}.")
        mujoco = import_mujoco()
        self.task, self.seed, self.max_steps = task, seed, max_steps
        self.instruction = INSTRUCTIONS[task]
        self._env = _import("metaworld.env_dict").ALL_V3_ENVIRONMENTS[f"{task}-v3"]()
        # What set_task does, but with episodes of ours: the goal is observed (by experts) and places are drawn.
        self._env._set_task_called = self._env.seeded_rand_vec = True
        self._env._partially_observable = self._env._freeze_rand_vec = False
        self._env.__dict__.pop("sawyer_observation_space", None)  # cached, with a goal of zeros
        self._reset_data, self._forward = mujoco.mj_resetData, mujoco.mj_forward
        self._renderer = Renderer(self._env.model, image_size, sites=task in _MARKED)
        self._camera = free_camera((0.0, 0.65, 0.12), distance=1.2, azimuth=135.0, elevation=-35.0)
        self._full: Float[np.ndarray, "39"]

    def reset(self, episode: int) -> None:
        """Begin an episode."""
        env = self._env
        # Twice, as MetaWorld's own reset does: some tasks place their goal by where the last reset put the object.
        for _ in range(2):
            env.np_random = np.random.default_rng([self.seed, zlib.crc32(self.task.encode()), episode])
            self._reset_data(env.model, env.data)
            env.reset_model()
        env.curr_path_length = 0
        self._forward(env.model, env.data)  # reset_model moves objects without telling the picture
        for name, position in env._target_site_config:
            env._set_pos_site(name, position)
        env._prev_obs = env._get_curr_obs_combined_no_goal()
        self._full = np.asarray(env._get_obs(), np.float64)

    def step(self, action: Float[np.ndarray, " d"]) -> bool:
        """Do an action (displacement of the gripper and effort of its fingers, within [-1, 1]); whether it succeeded.

        Raises:
          InputError: it has not four dimensions.
        """
        if np.shape(action) != (ACTION_DIM,):
            raise InputError(f"MetaWorld's actions have {ACTION_DIM} dimensions, not {np.shape(action)}.")
        self._full, _, _, _, info = self._env.step(np.clip(action, -1.0, 1.0))
        return bool(info["success"])

    def state(self) -> Float[np.ndarray, "4"]:
        """The gripper's position [m] and opening in [0, 1]."""
        return self._full[:STATE_DIM].astype(np.float32)

    def picture(self) -> UInt8[np.ndarray, "size size 3"]:
        """What the camera sees."""
        return self._renderer(self._env.data, self._camera)

    def request(self) -> dict[str, Any]:
        """What a policy is asked, by the keys of the robot ``metaworld``."""
        return {
            "observation.image": self.picture(),
            "observation.state": self.state(),
            "prompt": self.instruction,
        }

    def close(self) -> None:
        """Free the renderer."""
        self._renderer.close()


class Expert:
    """MetaWorld's scripted policy of a task, which sees where everything is."""

    def __init__(self, environment: MetaWorld):
        policies = _import("metaworld.policies").ENV_POLICY_MAP
        self._environment, self._policy = environment, policies[f"{environment.task}-v3"]()

    def action(self) -> Float[np.ndarray, "4"]:
        """What it would do now, within [-1, 1]."""
        return np.clip(self._policy.get_action(self._environment._full), -1.0, 1.0).astype(np.float32)


def check_tasks(tasks: list[str]) -> None:
    """Raise on a name that is no task.

    Raises:
      InputError: names it and lists the tasks.
    """
    unknown = [task for task in tasks if task not in INSTRUCTIONS]
    if unknown:
        raise InputError(f"MetaWorld has no task {', '.join(unknown)}; it has {', '.join(INSTRUCTIONS)}.")


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f'MetaWorld is not installed ({error}); pip install "clp-jax[metaworld]".') from error
