"""Episodes in parallel processes; whoever waits for actions is answered together.

A process holds one simulator. It asks with an observation, does the first actions of the answer, and asks again. The
parent knows no simulator, the simulators' processes know no JAX.
"""

import collections
import contextlib
import multiprocessing
import multiprocessing.connection
import traceback
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np

from clp_jax.errors import InputError
from clp_jax.evaluation.rollouts import Answer, Asking, Episode, Make, checked_actions, play


def run_episodes(
    make: Make,
    jobs: Iterable[tuple[str, int]],
    answer: Answer,
    asking: Asking,
    *,
    processes: int,
    max_batch: int,
) -> Iterator[Episode]:
    """Run episodes to their end.

    Args:
      make: of environments.
      jobs: task and number of each episode.
      answer: the policy.
      asking: how it is asked.
      processes: simulators at a time.
      max_batch: requests answered together at most.

    Yields:
      Episodes as they end.

    Raises:
      InputError: what an environment raises; of any other exception in one: task, episode, kind and place.
      ChildProcessError: a simulator's process ended, as when memory is short.
    """
    left = collections.deque(jobs)
    with _workers(make, asking, min(processes, len(left))) as workers:
        busy = [pipe for pipe in workers if _give_job(pipe, left)]
        while busy:
            waiting = []
            for pipe in multiprocessing.connection.wait(busy):
                assert isinstance(pipe, Connection)
                kind, content = _receive(pipe, workers[pipe])
                if kind == "ask":
                    waiting.append((pipe, content))
                    continue
                yield content
                if not _give_job(pipe, left):
                    busy.remove(pipe)
            for start in range(0, len(waiting), max_batch):
                together = waiting[start : start + max_batch]
                answers = answer([request for _, request in together])
                for (pipe, _), actions in zip(together, answers, strict=True):
                    pipe.send(checked_actions(actions, asking.replan))


@contextlib.contextmanager
def _workers(make: Make, asking: Asking, count: int) -> Iterator[dict[Connection, BaseProcess]]:
    """Processes that wait for jobs, by our end of each one's pipe; they end with the block."""
    spawn = multiprocessing.get_context("spawn")  # a fork would inherit JAX's threads
    workers: dict[Connection, BaseProcess] = {}
    try:
        for _ in range(count):
            ours, theirs = spawn.Pipe()
            workers[ours] = spawn.Process(target=_work, args=(make, asking, theirs), daemon=True)
            workers[ours].start()
            theirs.close()
        yield workers
    finally:
        for pipe in workers:
            pipe.close()
        for worker in workers.values():
            worker.terminate()
            worker.join()


def _give_job(pipe: Connection, left: "collections.deque[tuple[str, int]]") -> bool:
    if not left:
        return False
    with contextlib.suppress(BrokenPipeError):  # it broke: `_receive` tells why
        pipe.send(left.popleft())
    return True


def _receive(pipe: Connection, worker: BaseProcess) -> tuple[str, Any]:
    try:
        kind, content = pipe.recv()
    except (EOFError, ConnectionResetError):
        worker.join()
        raise ChildProcessError(
            f"a simulator's process ended with exit code {worker.exitcode}; if memory is short, take fewer --processes"
        ) from None
    if kind == "input error":
        raise InputError(content)
    if kind == "broken":
        told, where = content
        raise InputError(f"the simulator broke in {told}; --debug shows where") from RuntimeError(where)
    return kind, content


def _work(make: Make, asking: Asking, pipe: Connection) -> None:
    """The life of a simulator's process: until the parent closes the pipe."""
    task = wanted = number = environment = None

    def ask(request: dict[str, Any]) -> np.ndarray:
        pipe.send(("ask", request))
        return pipe.recv()

    with contextlib.suppress(BrokenPipeError, ConnectionResetError, KeyboardInterrupt):
        try:
            while True:
                wanted, number = pipe.recv()
                if wanted != task or environment is None:
                    if environment is not None:
                        environment.close()
                    task, environment = wanted, make(wanted)
                pipe.send(("done", play(environment, wanted, number, asking, ask)))
        except InputError as error:
            pipe.send(("input error", str(error)))
        except Exception as error:  # noqa: BLE001, for simulators raise anything, and if the pipe did, nobody hears this
            pipe.send(("broken", (f"{wanted}, episode {number}: {_in_a_line(error)}", traceback.format_exc())))


def _in_a_line(error: Exception) -> str:
    """Kind and first line of an exception, and the line of code that raised it."""
    said, place = traceback.format_exception_only(error)[-1], traceback.extract_tb(error.__traceback__)[-1]
    return f"{said.strip().splitlines()[0]} ({Path(place.filename).name}, line {place.lineno})"
