"""What a simulator offers. A new one is a file with ``suite(Asked) -> Suite``, and its name in the command."""

import dataclasses
import importlib.util
import os
from collections.abc import Mapping

from clp_jax.errors import InputError
from clp_jax.evaluation.rollouts import Make
from clp_jax.memory import free_memory


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a user asks of a simulator.

    Attributes:
      tasks: names; none leaves them to the suite.
      seed: of whatever is drawn at an episode's start.
      max_steps: actions of an episode; None leaves it to the suite.
      image_size: pixels of a picture's edge; None leaves it to the suite.
      fast: draw what a CPU draws fast, though no policy was trained on it.
      part: which of a simulator's suites, where it has several.
      rotation: how a policy means its rotations, where a simulator has met several ways.
    """

    tasks: tuple[str, ...] = ()
    seed: int = 0
    max_steps: int | None = None
    image_size: int | None = None
    fast: bool = False
    part: str | None = None
    rotation: str = "euler"


@dataclasses.dataclass(frozen=True)
class Suite:
    """Tasks of a simulator, and how they are played.

    Attributes:
      name: in results and titles.
      tasks: their names, each fit for a file's.
      make: of their environments; a function that another process can import.
      starts: episodes that a task has; None are as many as anybody asks for.
      replan: actions done before the policy is asked again, where nobody says.
      memory: bytes of one simulator's process.
      robot: the robot whose keys its requests have; None where keys are the environment's own.
      needs: modules that its environments import, each with how to install it.
    """

    name: str
    tasks: tuple[str, ...]
    make: Make
    starts: int | None = None
    replan: int = 5
    memory: int = 2**30
    robot: str | None = None
    needs: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def check_installed(self) -> None:
        """Raise an `InputError` unless the simulator is here, before anybody waits for the policy."""
        for module, how in self.needs.items():
            if importlib.util.find_spec(module) is None:
                raise InputError(f"{self.name} needs {module}, which is not installed; {how}.")

    def check_episodes(self, episodes: int) -> None:
        """Raise an `InputError` if a task has fewer starts."""
        if self.starts is not None and episodes > self.starts:
            raise InputError(f"--episodes is {episodes}, but a task of {self.name} has {self.starts} initial states.")

    def processes(self, asked: int | None) -> int:
        """Simulators at a time: as asked, or one a core and at least four, as far as free memory goes.

        >>> Suite("heavy", (), lambda task: None, memory=2**60).processes(None)
        1
        """
        if asked is not None:
            return asked
        return max(1, min(max(4, os.cpu_count() or 1), free_memory() // self.memory))
