"""A simulator without physics, and a checkpoint that can act in it: what the tests of evaluation share."""

import dataclasses
import os
import shutil
from pathlib import Path

import numpy as np

from clp_jax.errors import InputError

HORIZON = 6


@dataclasses.dataclass
class Counting:
    """Task ``n`` is solved after n actions; ``never`` is not; observations count actions and episodes."""

    task: str
    max_steps: int = 12
    instruction: str = "count"
    over: bool = False
    fps: float | None = None
    draws_fast: bool = True

    def __post_init__(self):
        if self.task == "missing":
            raise InputError("the simulator is not installed; pip install it.")

    def reset(self, episode: int) -> None:
        if self.task == "crash":
            raise ZeroDivisionError("physics")
        if self.task == "lost":
            raise ConnectionResetError("its own server")
        if self.task == "exit":
            os._exit(9)
        self.episode, self.steps, self.done = episode, 0, []

    def step(self, action: np.ndarray) -> bool:
        assert action.shape == (4,)
        self.steps += 1
        self.done.append(action)
        return self.task != "never" and self.steps >= int(self.task)

    def picture(self) -> np.ndarray:
        return np.full((8, 8, 3), 10 * self.steps + self.episode, np.uint8)

    def request(self) -> dict:
        state = np.array([self.steps, self.episode, 0, 0], np.float32)
        return {"observation.image": self.picture(), "observation.state": state, "prompt": self.instruction}

    def close(self) -> None:
        pass


def write_checkpoint(folder: Path, asset_id: str = "metaworld", dims: int = 4) -> Path:
    """A random π0 for a robot of so many dimensions, with tokenizer and statistics."""
    # Not above: the simulators' processes import this file, and would wait for JAX.
    import toys
    from recordings import GOLDEN
    from served import params

    from clp_jax.checkpoint import write_params
    from clp_jax.processing import norm_stats, tokenizer
    from clp_jax.processing.norm_stats import NormStats

    architecture = dataclasses.replace(toys.architecture(), vocab_size=512, action_dim=max(6, dims))
    stats, assets = NormStats(np.zeros(dims), np.ones(dims), -np.ones(dims), np.ones(dims)), folder / "assets"
    norm_stats.save(assets / asset_id, {"state": stats, "actions": stats})
    shutil.copy(GOLDEN / "tokenizer/tiny_spm.model", assets / tokenizer.FILE)
    write_params(folder / "checkpoint", params(architecture), assets=assets)
    return folder / "checkpoint"
