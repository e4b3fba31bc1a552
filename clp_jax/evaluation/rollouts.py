"""One episode: a policy is asked with an observation, the first actions of its answer are done, it is asked again."""

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from clp_jax.errors import InputError
from clp_jax.evaluation.films import Camera, Film

Answer = Callable[[Sequence[Mapping[str, Any]]], Sequence[np.ndarray]]
"""Requests in, a chunk of actions [horizon, d] for each out."""


@runtime_checkable
class Answering(Protocol):
    """A policy, in this process or behind a server.

    Attributes:
      metadata: what a server tells its clients.
      latencies: seconds of each answer so far.
    """

    metadata: Mapping[str, Any]
    latencies: list[float]

    def __call__(self, requests: Sequence[Mapping[str, Any]]) -> Sequence[np.ndarray]:
        """A chunk of actions [horizon, d] for each request."""
        ...

    def close(self) -> None:
        """Free it."""
        ...


@runtime_checkable
class Environment(Protocol):
    """One task of a simulator.

    Attributes:
      instruction: what the robot is told; None leaves it to the policy's robot.
      max_steps: actions after which an episode has failed.
      over: whether the episode ended before that without success, as when something fell.
      fps: actions per second of the robot's time; None is not known.
      draws_fast: whether a picture costs little, so that films have one of every action.
    """

    instruction: str | None
    max_steps: int
    over: bool
    fps: float | None
    draws_fast: bool

    def reset(self, episode: int) -> None:
        """Begin the episode of this number, the same in every run."""
        ...

    def step(self, action: np.ndarray) -> bool:
        """Do an action; whether the task is solved."""
        ...

    def request(self) -> dict[str, Any]:
        """What a policy is asked, ``prompt`` included if there is an instruction."""
        ...

    def picture(self) -> np.ndarray:
        """What a person would look at [h, w, 3] uint8."""
        ...

    def close(self) -> None:
        """Free it."""
        ...


Make = Callable[[str], Environment]
"""Makes the environment of a task; a function that another process can import."""


def start_seed(seed: int, task: str, number: int) -> int:
    """A seed in [0, 2**32) for the start of an episode, which depends on nothing but these."""
    return int(np.random.SeedSequence([seed, zlib.crc32(task.encode()), number]).generate_state(1)[0])


@dataclasses.dataclass(frozen=True)
class Asking:
    """How a policy is asked.

    Attributes:
      replan: actions that are done before it is asked again.
      seed: of the noise, which depends on it, task, episode and step alone.
      noise_shape: of the noise that is sent along; None sends none.
      prompt: instead of every task's own.
      blank_images: send black pictures.
      filmed: episodes of each task, from the first on, whose pictures are kept.
    """

    replan: int
    seed: int = 0
    noise_shape: tuple[int, ...] | None = None
    prompt: str | None = None
    blank_images: bool = False
    filmed: int = 0


@dataclasses.dataclass(frozen=True)
class Episode:
    """What came of one.

    Attributes:
      task: its task.
      number: its number.
      success: whether it was solved.
      steps: actions done, the solving one included.
      asked: how often the policy was.
      film: where it was filmed.
    """

    task: str
    number: int
    success: bool
    steps: int
    asked: int
    film: Film | None = None


def play(
    environment: Environment, task: str, number: int, asking: Asking, ask: Callable[[dict[str, Any]], np.ndarray]
) -> Episode:
    """One episode in this process; its film has a picture of every action, or of every request where they are costly.

    Args:
      environment: of the task.
      task: for the noise and the result.
      number: of the episode.
      asking: how the policy is asked.
      ask: request in, actions out.
    """
    environment.reset(number)
    steps, asked, success = 0, 0, False
    apart = 1 if environment.draws_fast else asking.replan
    camera = Camera(environment.fps and environment.fps / apart) if number < asking.filmed else None
    while steps < environment.max_steps and not (success or environment.over):
        actions = ask(_as_asked(environment.request(), asking, task, number, steps))
        asked += 1
        for action in actions[: min(asking.replan, environment.max_steps - steps)]:
            if camera is not None and steps % apart == 0:
                camera.shoot(environment.picture())
            success, steps = environment.step(action), steps + 1
            if success or environment.over:
                break
    if camera is not None:
        camera.shoot(environment.picture())
    return Episode(task, number, success, steps, asked, None if camera is None else camera.film())


def _as_asked(request: dict[str, Any], asking: Asking, task: str, number: int, step: int) -> dict[str, Any]:
    """With the changes that `Asking` wants."""
    if asking.blank_images:
        request = _blank(request)
    if asking.prompt is not None:
        request = request | {"prompt": asking.prompt}
    if asking.noise_shape is not None:
        rng = np.random.default_rng([asking.seed, zlib.crc32(task.encode()), number, step])
        request = request | {"noise": rng.standard_normal(asking.noise_shape, np.float32)}
    return request


def _blank(request: Mapping[str, Any]) -> dict[str, Any]:
    """With black pictures, in maps inside it too."""
    return {
        key: _blank(value) if isinstance(value, Mapping) else np.zeros_like(value) if np.ndim(value) == 3 else value
        for key, value in request.items()
    }


def checked_actions(actions: np.ndarray, replan: int) -> np.ndarray:
    """The actions [horizon, d], or an error about what no robot should do.

    Raises:
      InputError: fewer than ``replan``, not of two axes, or not finite.
    """
    actions = np.asarray(actions)
    if actions.ndim != 2 or len(actions) < replan:
        raise InputError(f"the policy answers with actions of shape {actions.shape}, fewer than --replan {replan}.")
    if not np.isfinite(actions).all():
        raise InputError("the policy's actions hold NaN or infinite values.")
    return actions
