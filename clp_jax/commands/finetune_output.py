"""What ``clp finetune`` says: what a run is before it begins, its numbers on the way, and where its end lies."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from etils import epath
from rich.console import Console
from rich.markup import escape

from clp_jax.commands.depths_flags import describe
from clp_jax.commands.finetune_inputs import Inputs, Trained
from clp_jax.errors import reason_of
from clp_jax.history import REPORT
from clp_jax.report.run import read_run, run_before, write_run_report
from clp_jax.training.held_out import HELD_OUT_AT
from clp_jax.training.logs import BOARD, Logs
from clp_jax.training.loop import Report
from clp_jax.training.optimizer import OptimizerSettings, what_is_odd
from clp_jax.training.profiling import StepTrace
from clp_jax.training.throughput import utilisation

_SHOWN = (
    *("loss", "task_loss", "teacher_loss", "states_loss", "grad_norm", "learning_rate", "samples_per_second", "mfu"),
    *("data_seconds", "held_out_loss", "save_seconds"),
)


def introduce(
    console: Console, config: Any, chosen: str, inputs: Inputs, trained: Trained, mesh: jax.sharding.Mesh, start: int
) -> None:
    """Print what a run is.

    Args:
      console: to print on.
      config: flags of the command.
      chosen: settings that are upstream's, as text.
      inputs: what it reads.
      trained: which parameters it trains.
      mesh: of devices.
      start: first step.
    """
    data = inputs.data
    shape = " x ".join(f"{size} {name}" for name, size in mesh.shape.items())
    console.print(f"{jax.device_count()} {jax.devices()[0].device_kind} as {shape}, {jax.process_count()} processes")
    other = "" if config.holdout_data is None else f"; held-out loss on {escape(config.holdout_data)}"
    sets = [f"{rows:,}" for rows, _ in data.held_shares]
    of_sets = f" ({' + '.join(sets)} of the sets)" if sets and len(data.held) else ""
    console.print(f"{len(data):,} observations for training, {len(data.held):,} held out{of_sets}{other}")
    if of_sets and "0" in sets:
        console.print(
            "[yellow]note:[/] the held-out loss leaves out the sets that have too few episodes to hold one out"
        )
    if config.evaluate_every and config.holdout_ratio and not inputs.held:
        console.print("[yellow]note:[/] there are too few episodes to hold one out, so there is no held-out loss")
    for odd in what_is_odd(OptimizerSettings.among(vars(config)), config.steps):
        console.print(f"[yellow]note:[/] {odd}", highlight=False, soft_wrap=True)
    if data.conventions is not None and data.conventions.robot is not None:
        console.print(f"Conventions: {data.conventions}", highlight=False, markup=False, soft_wrap=True)
    if inputs.teacher is not None:
        console.print(str(inputs.teacher), highlight=False, markup=False, soft_wrap=True)
    for plan in inputs.plans:
        console.print(describe(plan, inputs.architecture), highlight=False, markup=False, soft_wrap=True)
    console.print(f"{trained.count:,} of {trained.total:,} parameters are trained")
    if trained.count < trained.total and config.frozen_dtype != "keep":
        console.print(
            f"The others are stored as {config.frozen_dtype}, as openpi does (--frozen-dtype keep: as they are)"
        )
    if chosen:
        console.print(f"Settings of the model's authors: {escape(chosen)}", highlight=False)
    if config.resume:
        console.print(
            f"Resuming after step {start - 1}" if start else "No step was saved yet: starting from the beginning"
        )


class Log:
    """Scalars of the loop to the files, the screen and the run's page.

    Args:
      console: to print on.
      logs: files of the first process; None on the others.
      report: writes the page; None on the others.
      advance: of the progress.
      flops: of one observation in a step.
      start: first step.
    """

    def __init__(
        self,
        console: Console,
        logs: Logs | None,
        report: Callable[[], None] | None,
        advance: Callable[[int], None],
        flops: float,
        start: int,
    ):
        self._console, self._logs, self._report = console, logs, report
        self._advance, self._flops, self._shown = advance, flops, start

    def __call__(self, number: int, values: Mapping[str, float]) -> None:
        """Takes what is known after a step."""
        values = dict(values)
        if (rate := values.get("samples_per_second")) is not None:
            values["model_flops_per_second"] = rate * self._flops
            if (share := utilisation(rate * self._flops)) is not None:
                values["mfu"] = share
        if self._logs is None:
            return
        self._logs.write(number, values)
        self._advance(number + 1 - self._shown)
        self._shown = number + 1
        shown = [name for name in _SHOWN if name in values]
        shown += [name for name in values if name.startswith(HELD_OUT_AT)]
        text = ", ".join(f"{name} {values[name]:.4g}" for name in shown)
        if text:
            self._console.print(f"step {number}: {text}", highlight=False, soft_wrap=True)

    def paused(self) -> None:
        """Write the page; where it cannot be, say so and go on, for the other processes would wait for this one."""
        try:
            self._write_page()
        except Exception as error:  # noqa: BLE001 - no fault of a page may end a training
            text = f"note: {REPORT} was not written: {reason_of(error)}"
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Close the files and write the page for the last time."""
        if self._logs is not None:
            self._logs.close()
        self._write_page()

    def _write_page(self) -> None:
        if self._report is not None:
            self._report()


def report_writer(out: epath.Path, record: Mapping[str, Any], against: str | None) -> Callable[[], None]:
    """What writes a run's ``report.html`` as the run stands when it is called.

    Args:
      out: folder of the run.
      record: content of the ``clp.json`` of its steps.
      against: folder of the run that is shown behind it; None takes what `run_before` finds.
    """
    other = run_before(record) if against is None else read_run(against)
    return lambda: write_run_report(out, record, other)


def conclude(console: Console, config: Any, out: epath.Path, report: Report, trace: StepTrace) -> None:
    """Print where the run stands at its end."""
    if report.done < config.steps:
        console.print(
            f"Stopped by SIGTERM after {report.done} of {config.steps} steps, all saved; go on with --resume."
        )
    console.print(f"Checkpoint: [bold]{escape(str(out / str(report.saved)))}[/]", soft_wrap=True)
    if trace.written:
        console.print(f"Profile: [bold]tensorboard --logdir {escape(str(out / BOARD))}[/]", soft_wrap=True)
    console.print(f"Report: [bold]{escape(str(out / REPORT))}[/]", soft_wrap=True)
