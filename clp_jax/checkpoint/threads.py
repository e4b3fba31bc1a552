"""Work in a few threads, reported in the one that waits for it."""

import os
import queue
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor


def run_in_threads(jobs: Sequence[Iterable[int]], report: Callable[[int], None]) -> None:
    """Exhausts iterables in a few threads and reports each number they yield, in the calling thread.

    The first exception stops all of them at their next item and is raised here.

    Args:
      jobs: what to exhaust, in the order to begin.
      report: called with each item.
    """
    items: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()
    stopped = False

    def exhaust(job: Iterable[int]) -> None:
        try:
            for item in job:
                items.put(item)
                if stopped:
                    return
            items.put(None)
        except BaseException as error:  # noqa: BLE001  raised again in the calling thread
            items.put(error)

    with ThreadPoolExecutor(min(4, (os.cpu_count() or 1) + 1)) as pool:
        try:
            for job in jobs:
                pool.submit(exhaust, job)
            running = len(jobs)
            while running:
                item = items.get()
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    running -= 1
                else:
                    report(item)
        finally:
            stopped = True
            pool.shutdown(wait=True, cancel_futures=True)
