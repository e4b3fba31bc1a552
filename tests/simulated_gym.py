"""An environment with Gymnasium's interface that no suite knows, and a policy behind a server that needs no JAX."""

import contextlib
import os
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import websockets.exceptions
import websockets.sync.server

from clp_jax.serving import wire

LOG = "SIMULATED_GYM_LOG"
"""Environment variable: a file that gets the task and seed of every reset."""
TALKS = "SIMULATED_GYM_TALKS"
"""Environment variable: write `SAID` to standard output at every reset, as some simulators do."""
SAID = "[simulator] no private macro file found"


class Walk:
    """A walk from a place that the seed draws in [0, 1); it arrives at 3, and falls below -1."""

    action_space = types.SimpleNamespace(shape=(2,), dtype=np.dtype(np.float32))
    spec = types.SimpleNamespace(max_episode_steps=20)
    instruction = "walk"

    def __init__(self, task: str = ""):
        self.task, self.unwrapped = task, self

    def reset(self, seed: int):
        if LOG in os.environ:
            with Path(os.environ[LOG]).open("a") as log:
                log.write(f"{self.task} {seed}\n")
        if TALKS in os.environ:
            os.write(1, f"{SAID}\n".encode())
        self.place, self.steps = float(np.random.default_rng(seed).random()), 0
        return self._seen(), {}

    def step(self, action: np.ndarray):
        assert action.dtype == np.float32
        self.place, self.steps = self.place + float(action[0]), self.steps + 1
        arrived, fallen = self.place >= 3, self.place < -1
        return self._seen(), 0.0, arrived or fallen, False, {"is_success": np.array([arrived])}

    def close(self):
        pass

    def _seen(self):
        picture = np.full((12, 16, 3), min(255, max(0, int(50 * self.place))), np.uint8)
        return {"state": np.array([self.place, self.steps]), "pixels": {"front": picture}}


class Silent(Walk):
    """It does not tell success."""

    def step(self, action: np.ndarray):
        return *super().step(action)[:-1], {}


class Bare(Walk):
    """Its observation is one array, it has neither a picture nor a limit nor an instruction."""

    spec = instruction = None

    def _seen(self):
        return np.array([self.place, self.steps])


class Grid(Walk):
    """Its observation is neither a picture nor a state."""

    def _seen(self):
        return np.zeros((3, 4))


def none():
    """Of no environment."""


not_callable = 3


@contextlib.contextmanager
def serving(
    step: float, *, dies_after: int | None = None, seconds: float = 0.0, metadata: dict | None = None
) -> Iterator[str]:
    """A policy that walks ``step`` a time, at HOST:PORT, and thinks for so long; after so many answers it is gone."""
    answered = threading.Semaphore(10**9 if dies_after is None else dies_after)

    def handle(socket):
        socket.send(wire.pack(metadata or {"walks": step}))
        with contextlib.suppress(websockets.exceptions.ConnectionClosed):
            for message in socket:
                assert "state" in wire.unpack(message) or "observation.state" in wire.unpack(message)
                if not answered.acquire(blocking=False):
                    socket.socket.close()
                    return
                time.sleep(seconds)
                socket.send(wire.pack({"actions": np.tile(np.array([step, 0.0], np.float32), (6, 1))}))

    with websockets.sync.server.serve(handle, "127.0.0.1", 0, compression=None) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"127.0.0.1:{server.socket.getsockname()[1]}"
        server.shutdown()
        thread.join()
