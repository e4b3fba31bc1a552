"""The life of a run: start or resume, step, look, save, stop."""

import collections
import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from clp_jax.aliases import Array, Tree
from clp_jax.checkpoint import Spec
from clp_jax.data import TrainingData
from clp_jax.errors import InputError, blamed_on
from clp_jax.loading import read_parameters
from clp_jax.models import Architecture
from clp_jax.sharding import Rules, batch_sharding
from clp_jax.training.adapters import init_adapters
from clp_jax.training.optimizer import OptimizerSettings, learning_rate
from clp_jax.training.profiling import StepTrace
from clp_jax.training.program import Program, build_program
from clp_jax.training.saving import Steps
from clp_jax.training.state import TrainState
from clp_jax.training.step import StepSettings
from clp_jax.training.stopping import stop_on_sigterm
from clp_jax.training.teaching import Teaching
from clp_jax.trees import flatten, unflatten

_IN_FLIGHT = 2
"""Steps that the host may be ahead of the devices: enough to keep them busy, few enough to stop soon."""
_UNTIMED = 2
"""Steps of which the time is not taken: the first one compiles, beside the second the logs are opened."""
_TIMED = 10
"""Steps over which their time is averaged at least, for the host sees the end of one some time after it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What is to be done, in numbers.

    Attributes:
      steps: of the whole run, those before a resumption included.
      batch_size: observations of a step, over all devices of all processes.
      optimizer: the update rule.
      step: what is static in a step.
      frozen_dtype: of parameters that are not trained; None keeps theirs.
      sharding_rules: exceptions from openpi's rule.
      seed: of the order of the data, of noise, times and augmentation.
      workers: threads that read ahead.
      log_every: steps between two log entries.
      evaluate_every: steps between two losses on held-out data; 0 for none.
      save_every: steps between two saves.
    """

    steps: int
    batch_size: int = 32
    optimizer: OptimizerSettings = dataclasses.field(default_factory=OptimizerSettings)
    step: StepSettings = dataclasses.field(default_factory=StepSettings)
    frozen_dtype: str | None = "bfloat16"
    sharding_rules: Rules = ()
    seed: int = 42
    workers: int = 4
    log_every: int = 100
    evaluate_every: int = 1000
    save_every: int = 1000


@dataclasses.dataclass(frozen=True)
class Report:
    """How a run ended.

    Attributes:
      state: after the last step.
      done: steps done; fewer than asked for after SIGTERM.
      saved: number of the newest saved step.
    """

    state: TrainState
    done: int
    saved: int


def train(
    spec: Spec,
    architecture: Architecture,
    data: TrainingData,
    run: Run,
    saved: Steps,
    *,
    mesh: jax.sharding.Mesh,
    record: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    log: Callable[[int, Mapping[str, float]], None],
    evaluate: Callable[[dict], Mapping[str, float]] | None = None,
    teacher: Spec | None = None,
    paused: Callable[[], None] | None = None,
    trace: StepTrace = StepTrace(),
) -> Report:
    """Train until ``run.steps`` steps are done, from the newest saved step if there is one.

    Args:
      spec: checkpoint to begin from.
      architecture: of the model that is trained, adapters that the checkpoint lacks included.
      data: training observations.
      run: see `Run`.
      saved: where steps are saved and found.
      mesh: devices of all processes.
      record: makes a step's ``clp.json`` from what is to be remembered for a resumption.
      log: takes the steps done and scalars.
      evaluate: scalars of parameters on held-out data.
      teacher: the checkpoint of the model that teaches, where ``run.step`` says that one does.
      paused: called after held-out losses and while a save is written, but not at the end.
      trace: of some steps.

    Raises:
      Diverged: a value of loss, gradient or parameters is not finite, which is never saved.
    """
    check_batch_size(run, mesh)
    program = _program(architecture, run, mesh)
    batches = _batches(data, run, workers=run.workers)
    # Before the state, beside which there may be no room for what is read.
    taught_by = () if teacher is None else (_read_teacher(teacher, run.step.teaching, program.teacher, mesh),)
    if saved.latest is None:
        state = program.start(_initial_params(spec, architecture, program.abstract.params, run.seed, mesh))
    else:
        state = _restored(saved, saved.latest, program.abstract, batches)
    watch = _Watch(run, log)
    with stop_on_sigterm(mesh) as stop, trace.open():
        for number in range(int(state.step), run.steps):
            with trace.step(number):
                rows, waited = _timed(next, batches)
                watch.begin(waited)
                batch = _on_devices(rows, mesh)
                state, info = program.step(state, batch, stop.array(), *taught_by)
                watch.add(number, info)
            last = number + 1 == run.steps or watch.stopped
            look = evaluate if last or _due(number, run.evaluate_every) else None
            saves = last or _due(number, run.save_every)
            if look is not None or saves or trace.ends_with(number):
                watch.drain()  # nothing is saved before all up to it is known to be finite
            if trace.ends_with(number):
                trace.finish()
            if look is not None:
                averaged = state.params if state.ema_params is None else state.ema_params
                found, seconds = _timed(look, averaged)
                log(number, {**found, "held_out_seconds": seconds})
            if saves:
                place = {"step": number, "position": batches.get_state().decode()}
                _, seconds = _timed(saved.save, state, record(place))
                log(number, {"save_seconds": seconds})
            if last:
                break
            if paused is not None and (look is not None or saves):
                paused()
        saved.wait()  # nor may SIGTERM end it half-way
    assert saved.latest is not None
    return Report(state, int(state.step), saved.latest)


def check_batch_size(run: Run, mesh: jax.sharding.Mesh) -> None:
    """Raise unless every device gets the same share of every microbatch.

    Raises:
      InputError: says what divides.
    """
    devices, parts = math.prod(mesh.shape.values()), run.step.accumulate
    if run.batch_size < 1 or parts < 1 or run.batch_size % (devices * parts):
        raise InputError(
            f"--batch-size {run.batch_size} is not a multiple of {devices * parts} "
            f"({devices} devices times --accumulate {parts})."
        )


def check_sharding(architecture: Architecture, run: Run, mesh: jax.sharding.Mesh) -> None:
    """Raise unless the rules of a run split its state over the devices; nothing is compiled.

    Raises:
      InputError: the axis of a rule does not exist or does not divide, or a rule matches nothing.
    """
    _program(architecture, run, mesh)


def _program(architecture: Architecture, run: Run, mesh: jax.sharding.Mesh) -> Program:
    return build_program(architecture, run.optimizer, run.step, run.frozen_dtype, run.seed, mesh, run.sharding_rules)


def check_rows(data: TrainingData, run: Run) -> None:
    """Raise unless the data fill a batch of every set; nothing is read.

    Raises:
      InputError: there are too few observations, or the seed is out of range.
    """
    _batches(data, run, workers=0)


def _batches(data: TrainingData, run: Run, *, workers: int) -> Any:
    """The batches of this process."""
    process = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    return data.batches(run.batch_size, seed=run.seed, workers=workers, augmented=run.step.augment, **process)


def _timed(function: Callable[..., Any], *args: Any) -> tuple[Any, float]:
    """What a function returns, and its seconds."""
    began = time.perf_counter()
    return function(*args), time.perf_counter() - began


def _due(number: int, every: int) -> bool:
    """openpi's rule: step numbers that ``every`` divides, but not the very first."""
    return every > 0 and number > 0 and number % every == 0


def _restored(saved: Steps, step: int, wanted: TrainState, batches: Any) -> TrainState:
    """The state after a saved step; the batches go on behind it."""
    state = saved.restore(wanted, step)
    position = saved.record(step)["training"]["position"]
    with blamed_on(f"the position in the data of step {step}", "resume from another step"):
        batches.set_state(position.encode())
    return state


def _initial_params(spec: Spec, architecture: Architecture, wanted: Tree, seed: int, mesh: jax.sharding.Mesh) -> dict:
    """The checkpoint's parameters, and adapters that it has not, in the dtypes and shardings of the run."""
    flat = flatten(read_parameters(spec, architecture, mesh))
    if len(flat) < len(flatten(wanted)):
        flat |= flatten(init_adapters(architecture, jax.random.split(jax.random.key(seed))[1], mesh))
    return _cast(unflatten({path: flat[path] for path in flatten(wanted)}), wanted)


def _read_teacher(spec: Spec, teaching: Teaching | None, wanted: Tree, mesh: jax.sharding.Mesh) -> dict:
    """The teacher's parameters, in the dtype and shardings of the run."""
    assert teaching is not None, "a teacher whose weight in the loss nobody said"
    return _cast(read_parameters(spec, teaching.architecture, mesh), wanted)


def _cast(params: Tree, wanted: Tree) -> dict:
    shardings = jax.tree.map(lambda like: like.sharding, wanted)
    cast = jax.jit(
        lambda tree: jax.tree.map(lambda x, like: x.astype(like.dtype), tree, wanted), out_shardings=shardings
    )
    return cast(params)


def _on_devices(batch: Mapping[str, np.ndarray], mesh: jax.sharding.Mesh) -> dict[str, Array]:
    """This process's rows as a part of the global batch."""
    rows = batch_sharding(mesh)
    return {key: jax.make_array_from_process_local_data(rows, value) for key, value in batch.items()}


class Diverged(InputError):
    """A value of loss, gradient or parameters is not finite."""


class _Watch:
    """Reads what steps report, a few steps behind the devices, so that looking never makes them wait.

    All processes read the same values at the same step, so all stop at the same one.
    """

    def __init__(self, run: Run, log: Callable[[int, Mapping[str, float]], None]):
        self.stopped = False
        self._run, self._log = run, log
        self._pending: collections.deque[tuple[int, Mapping[str, Array]]] = collections.deque()
        self._window: list[dict[str, float]] = []
        self._seconds: collections.deque[float] = collections.deque(maxlen=max(run.log_every, _TIMED))
        self._waits: list[float] = []
        self._last_read: float | None = None
        self._read_so_far = 0

    def begin(self, waited: float) -> None:
        """A step is about to be dispatched: after a pause, time runs from here on.

        Args:
          waited: seconds for its data, hidden by the steps before it as long as it is less than they take.
        """
        if self._last_read is not None:
            self._waits.append(waited)
        elif self._read_so_far >= _UNTIMED:
            self._last_read = time.perf_counter()

    def add(self, number: int, info: Mapping[str, Array]) -> None:
        self._pending.append((number, info))
        if len(self._pending) > _IN_FLIGHT:
            self._read(1)

    def drain(self) -> None:
        """Read all there is; the pause does not count as time of a step."""
        self._read(len(self._pending))
        self._last_read = None

    def _read(self, count: int) -> None:
        """The oldest ones. Of several, seen at once, each took its part of the time since the last look."""
        steps = [self._pending.popleft() for _ in range(count)]
        found = jax.device_get([info for _, info in steps])
        now = time.perf_counter()
        if self._last_read is not None:
            self._seconds.extend([(now - self._last_read) / count] * count)
        self._read_so_far += count
        self._last_read = now if self._read_so_far >= _UNTIMED else None
        for (number, _), info in zip(steps, found, strict=True):
            self._take(number, {name: float(value) for name, value in info.items()})

    def _take(self, number: int, values: dict[str, float]) -> None:
        self.stopped |= values.pop("stop") > 0
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad:
            raise Diverged(
                f"step {number}: {bad[0]} is {values[bad[0]]}; stopped, and nothing after the last saved step was "
                "kept. Look at the data around it, or lower --peak-lr: in a new run, from the checkpoint or from the "
                "last saved step, for --resume would take the same way again."
            )
        self._window.append(values)
        if number % self._run.log_every == 0 or number + 1 == self._run.steps:
            self._write(number)

    def _write(self, number: int) -> None:
        means = {name: float(np.mean([values[name] for values in self._window])) for name in self._window[0]}
        means["learning_rate"] = float(learning_rate(self._run.optimizer)(number))
        if self._seconds:
            means["step_seconds"] = float(np.mean(self._seconds))
            means["samples_per_second"] = self._run.batch_size / means["step_seconds"]
        if self._waits:
            means["data_seconds"] = float(np.mean(self._waits))
        self._window, self._waits = [], []
        self._log(number, means)
