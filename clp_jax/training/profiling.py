"""A trace of some training steps, for TensorBoard's profile plugin and XProf."""

import contextlib
import os
from collections.abc import Iterator

import jax

from clp_jax.errors import InputError
from clp_jax.folders import is_remote

SKIPPED = 2
"""Steps that come first and are not traced: they compile."""


class StepTrace:
    """Traces whole steps of a run, once; every process writes what its devices did.

    Args:
      folder: of the trace: ``plugins/profile/<time>/*.xplane.pb`` below it.
      start: first step of the run that is to come.
      steps: how many to trace; 0 for none.
      end: number of steps of the run.

    Attributes:
      written: whether there is a trace.

    Raises:
      InputError: the run has too few steps, or the folder is remote.
    """

    def __init__(self, folder: str | os.PathLike[str] = "", *, start: int = 0, steps: int = 0, end: int = 0):
        if steps and is_remote(folder):
            raise InputError(f"--profile writes to a local folder, and {folder} is remote; give another --out.")
        if steps and start + SKIPPED + steps > end:
            raise InputError(
                f"--profile {steps} traces steps behind the first {SKIPPED}, so it needs {SKIPPED + steps}; "
                f"the run has {end - start} to do."
            )
        self._folder = folder
        self._steps = range(start + SKIPPED, start + SKIPPED + steps)
        self._running, self.written = False, False

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Around all steps: a trace that an error cuts short is ended."""
        try:
            yield
        finally:
            self.finish()

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around what the host does for a step."""
        if self._steps and number == self._steps[0]:
            jax.profiler.start_trace(os.fspath(self._folder))
            self._running = True
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield

    def ends_with(self, number: int) -> bool:
        """Whether a step is the last one that is traced."""
        return bool(self._steps) and number == self._steps[-1]

    def finish(self) -> None:
        """Write the trace, if one is running; the devices must have done its last step."""
        if self._running:
            self._running, self.written = False, True
            jax.profiler.stop_trace()
