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
      InputError: what an environment raises, for example that its simulator is not installed.
      RuntimeError: a simulator broke.
      ChildProcessError: a simulator's process was killed.
    """
    left = collections.deque(jobs)
    with _workers(make, asking, min(processes, len(left))) as pipes:
        busy = [pipe for pipe in pipes if _give_job(pipe, left)]
        while busy:
            waiting = []
            for pipe in multiprocessing.connection.wait(busy):
                assert isinstance(pipe, multiprocessing.connection.Connection)
                kind, content = _receive(pipe)
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
def _workers(make: Make, asking: Asking, count: int) -> Iterator[list[multiprocessing.connection.Connection]]:
    """Processes that wait for jobs, and end with the block."""
    spawn = multiprocessing.get_context("spawn")  # a fork would inherit JAX's threads
    pipes, workers = [], []
    try:
        for _ in range(count):
            ours, theirs = spawn.Pipe()
            worker = spawn.Process(target=_work, args=(make, asking, theirs), daemon=True)
            worker.start()
            theirs.close()
            pipes.append(ours)
            workers.append(worker)
        yield pipes
    finally:
        for pipe in pipes:
            pipe.close()
        for worker in workers:
            worker.terminate()
            worker.join()


def _give_job(pipe: multiprocessing.connection.Connection, left: "collections.deque[tuple[str, int]]") -> bool:
    if not left:
        return False
    with contextlib.suppress(BrokenPipeError):  # it broke: `_receive` tells why
        pipe.send(left.popleft())
    return True


def _receive(pipe: multiprocessing.connection.Connection) -> tuple[str, Any]:
    try:
        kind, content = pipe.recv()
    except (EOFError, ConnectionResetError):
        raise ChildProcessError(
            "a simulator's process was killed; if memory is short, take fewer --processes"
        ) from None
    if kind == "input error":
        raise InputError(content)
    if kind == "broken":
        raise RuntimeError(f"a simulator broke:\n{content}")
    return kind, content


def _work(make: Make, asking: Asking, pipe: multiprocessing.connection.Connection) -> None:
    """The life of a simulator's process: until the parent closes the pipe."""
    task, environment = None, None

    def ask(request: dict[str, Any]) -> np.ndarray:
        pipe.send(("ask", request))
        return pipe.recv()

    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError, KeyboardInterrupt):
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
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise
        except Exception:
            pipe.send(("broken", traceback.format_exc()))
            raise
