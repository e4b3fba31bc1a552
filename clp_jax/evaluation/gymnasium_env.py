"""Any environment with Gymnasium's interface: its observations are the requests, by its own keys.

``--env module:factory`` calls the factory, with a task's name where --tasks has some, and gets a ``gymnasium.Env``:
``reset(seed)``, ``step``, ``close``, ``action_space`` with a shape. Nothing of Gymnasium is imported here.
"""

import functools
import importlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from clp_jax.errors import InputError, blamed_on
from clp_jax.evaluation.rollouts import start_seed
from clp_jax.evaluation.suite import Asked, Suite
from clp_jax.folders import leads_out

_SUCCESS = ("is_success", "success")
"""What environments call it in the ``info`` of a step."""
_PLAIN = {3: "observation.image", 1: "observation.state"}
"""Keys of an observation without any, by its axes."""


def suite(name: str, asked: Asked) -> Suite:
    """The tasks of a factory of environments.

    Args:
      name: ``module:factory``, as an import from the working folder finds it.
      asked: with the tasks that the factory takes; without, it is called without a task, which is then called as it is.

    Raises:
      InputError: there is no such module, or a task's name cannot be a file's.
    """
    module, _, factory = name.partition(":")
    if not module or not factory.isidentifier():
        raise InputError(f"--env is written module:factory, for example my_robot.simulator:make, not {name!r}.")
    odd = [task for task in asked.tasks if leads_out(task) or "/" in task]
    if odd:
        raise InputError(f"--tasks {odd[0]!r} cannot be the name of a file, as a task's page of pictures has it.")
    if str(Path.cwd()) not in sys.path:  # that of `python -m clp_jax` has it, that of `clp` has not
        sys.path.insert(0, str(Path.cwd()))
    with blamed_on(f"--env {name}", "give a module that Python can import", verb="cannot be imported"):
        if importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError(f"there is no module {module}")
    tasks = tuple(dict.fromkeys(asked.tasks)) or (factory,)
    make = functools.partial(_make, name=name, takes_task=bool(asked.tasks), seed=asked.seed, max_steps=asked.max_steps)
    return Suite(name, tasks, make)


def _make(task: str, *, name: str, takes_task: bool, seed: int, max_steps: int | None) -> "GymnasiumEnvironment":
    module, _, factory = name.partition(":")
    make = getattr(importlib.import_module(module), factory, None)
    if not callable(make):
        raise InputError(f"--env {name}: {module} has no function {factory}.")
    env = make(task) if takes_task else make()
    if not (hasattr(env, "reset") and hasattr(env, "step")):
        raise InputError(f"--env {name}: {factory} returns {type(env).__name__}, not a gymnasium.Env.")
    limit = max_steps or _limit(env)
    if limit is None:
        raise InputError(f"--env {name}: the environment does not say how long an episode is; give --max-steps.")
    return GymnasiumEnvironment(env, task, seed=seed, max_steps=limit)


def _limit(env: Any) -> int | None:
    """Actions of an episode: as the environment was registered, or as a ``TimeLimit`` among its wrappers has it."""
    told = getattr(getattr(env, "spec", None), "max_episode_steps", None) or getattr(env, "_max_episode_steps", None)
    return told or (_limit(env.env) if hasattr(env, "env") else None)


class GymnasiumEnvironment:
    """One task. An episode's start is decided by (task, seed, episode) alone, through the seed of ``reset``.

    The observation is the request: a dict by its own keys (a robot file says which is what), one array as
    ``observation.image`` or ``observation.state``. The instruction is the observation's ``prompt`` or the environment's
    ``instruction``. Success is what ``info`` says it is.

    Args:
      env: a ``gymnasium.Env``.
      task: its name.
      seed: of the starts.
      max_steps: actions of an episode.
    """

    def __init__(self, env: Any, task: str, *, seed: int, max_steps: int):
        self._env, self._task, self._seed = env, task, seed
        self.max_steps, self.over, self.draws_fast = max_steps, False, True
        fps = (getattr(env, "metadata", None) or {}).get("render_fps")
        self.fps: float | None = None if fps is None else float(fps)  # some divide NumPy's numbers
        self.instruction: str | None = getattr(getattr(env, "unwrapped", env), "instruction", None)
        self._seen: Any = None

    def start_seed(self, episode: int) -> int:
        """The seed of an episode's ``reset``."""
        return start_seed(self._seed, self._task, episode)

    def reset(self, episode: int) -> None:
        """Begin an episode."""
        self._seen, _ = self._env.reset(seed=self.start_seed(episode))
        self.over = False

    def step(self, action: Float[np.ndarray, " d"]) -> bool:
        """Do an action, as it is and in the action space's dtype; whether the task is solved.

        Raises:
          InputError: it is none of the action space's shape, or the environment does not tell success.
        """
        space = self._env.action_space
        if np.shape(action) != space.shape:
            raise InputError(f"actions of {self._task} have shape {space.shape}, not {np.shape(action)}.")
        self._seen, _, terminated, truncated, info = self._env.step(np.asarray(action).astype(space.dtype))
        told = [info[key] for key in _SUCCESS if key in info]
        if not told:
            raise InputError(
                f"a step of {self._task} tells neither {' nor '.join(_SUCCESS)} in its info; add one with a wrapper."
            )
        self.over = bool(terminated or truncated)
        return bool(np.asarray(told[0]).item())

    def request(self) -> dict[str, Any]:
        """The observation, and the instruction.

        Raises:
          InputError: it is neither a dict, nor a picture or a state.
        """
        if isinstance(self._seen, Mapping):
            request = dict(self._seen)
        elif (seen := np.asarray(self._seen)).ndim in _PLAIN:
            request = {_PLAIN[seen.ndim]: seen}
        else:
            raise InputError(
                f"an observation of {self._task} has shape {seen.shape}; give a dict, a picture or a state."
            )
        return request if self.instruction is None else {"prompt": self.instruction} | request

    def picture(self) -> UInt8[np.ndarray, "h w 3"]:
        """The first picture of the observation, else what ``render`` gives.

        Raises:
          InputError: there is neither.
        """
        found = next(_pictures(self._seen), None)
        if found is None and getattr(self._env, "render_mode", None) == "rgb_array":
            found = np.asarray(self._env.render())
        if found is None:
            raise InputError(f"{self._task} has no picture: give --filmed 0, or the render mode rgb_array.")
        return found

    def close(self) -> None:
        """Free the environment."""
        self._env.close()


def _pictures(seen: Any) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
    """Arrays [h, w, 3] or [3, h, w] of uint8 in an observation, with channels last."""
    if isinstance(seen, Mapping):
        for value in seen.values():
            yield from _pictures(value)
    elif isinstance(seen, np.ndarray) and seen.dtype == np.uint8 and seen.ndim == 3:
        if seen.shape[2] == 3:
            yield seen
        elif seen.shape[0] == 3:
            yield np.moveaxis(seen, 0, 2)
