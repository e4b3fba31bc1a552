"""``clp finetune``: train a checkpoint, pruned or not, on one device or a pod."""

import contextlib
import dataclasses
import functools
import logging
import sys
from collections.abc import Mapping
from typing import Any

from etils import epath
from rich.console import Console
from rich.markup import escape

from clp_jax.checkpoint import read_spec
from clp_jax.commands.data_flags import DataFlags
from clp_jax.commands.depths_flags import DepthsFlags
from clp_jax.commands.finetune_inputs import Inputs, Trained, read_inputs, read_trained_architecture, trained_parameters
from clp_jax.commands.finetune_output import Log, conclude, introduce, report_writer
from clp_jax.commands.model_flags import ModelFlags
from clp_jax.commands.teacher_flags import TeacherFlags
from clp_jax.commands.upstream_flags import UpstreamFlags, with_upstream_defaults
from clp_jax.distributed import DistributedFlags, is_first, join, on_first
from clp_jax.errors import InputError
from clp_jax.models import Architecture, Remat, family_of
from clp_jax.outputs import check_apart
from clp_jax.plan import PrunePlan
from clp_jax.progress import progress
from clp_jax.provenance import training_record
from clp_jax.report.run import read_run
from clp_jax.sharding import Rules, make_mesh
from clp_jax.training import (
    OptimizerSettings,
    Run,
    Steps,
    StepSettings,
    check_batch_size,
    check_rows,
    check_schedule,
    check_sharding,
    train,
)
from clp_jax.training.assets import assets_writer
from clp_jax.training.held_out import held_out_loss
from clp_jax.training.logs import BOARD, Logs, import_wandb
from clp_jax.training.profiling import StepTrace
from clp_jax.training.resumption import Entry, check_same_run
from clp_jax.training.run_folder import run_folder
from clp_jax.training.saving import saved_record

_MAY_CHANGE = (
    *("steps", "log_every", "evaluate_every", "save_every", "keep_period"),
    *("out", "resume", "overwrite", "against", "profile", "wandb", "fsdp_devices", "shard", "skip_dead", "workers"),
    *(field.name for field in dataclasses.fields(DistributedFlags)),
)
"""Flags that do not change what a run computes, held-out losses included, so that a resumed run may have others."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finetune(TeacherFlags, DepthsFlags, DataFlags, ModelFlags, UpstreamFlags, DistributedFlags):
    """Train a checkpoint on data. Defaults are those of the model's authors.

    A killed run goes on with the same flags and --resume.
    """

    checkpoint: str
    """Checkpoint to begin from: step folder or its params, local or gs://."""
    data: tuple[str, ...]
    """LeRobot data set (folder or hub id), or .npz of model-ready observations; or several of one robot."""
    out: str
    """Folder of the run: <step>/{params,train_state,assets,clp.json}, logs and report.html."""
    steps: int
    """Steps of the whole run."""
    norm_stats: str | None = "data"
    """What normalises a LeRobot data set: its own statistics ("data"), a norm_stats.json, or None: the checkpoint's."""
    action_samples: int = 1
    """Draws of noise and time per observation; all share one pass over its images and prompt."""
    accumulate: int = 1
    """Parts of a batch that run one after another, to save memory."""
    fsdp_devices: int = 1
    """Devices over which each large parameter is split."""
    shard: tuple[str, ...] = ()
    """Exceptions from openpi's rule as NAME=AXIS with a regular expression: '.*/input_embedding=0', '.*/w=none'."""
    resume: bool = False
    """Go on from the newest saved step; from the beginning if none was saved."""
    overwrite: bool = False
    """Delete --out first if it exists."""
    lora: bool = False
    """Add LoRA adapters: for π0 to both experts, and train them, the image encoder and the projections; for GR00T to
    queries, keys and values of the action head, and train nothing else."""
    lora_ranks: tuple[int, ...] = ()
    """Ranks of new adapters, of the VLM and of the action expert or head; 16 32 if absent, as in openpi. For GR00T 0 is
    none, a third rank is the image encoder's, and 0 32 0 if absent, as in NVIDIA's script."""
    freeze: tuple[str, ...] = ()
    """Parameters that are not trained: regular expressions over whole names, e.g. 'PaliGemma/img/.*'."""
    train: tuple[str, ...] = ()
    """Exceptions from --freeze."""
    augment: bool = True
    """Whether images are changed as the model's authors do in training: π0's are cropped, rotated and recoloured,
    SmolVLA's stay as they are."""
    dropout: bool = True
    """Whether values are left out at random where the model's authors do: in GR00T's action head, at the rates of its
    config.json; π0 and SmolVLA have no dropout."""
    dtype: str | None = None
    """Activation dtype, bfloat16 or float32; float32 on CPUs, else bfloat16."""
    remat: Remat = "all"
    """What the backward pass computes again: all of a block, all but its matrix products, or nothing."""
    skip_dead: bool | None = None
    """Leave out what the VLM's last block computes for nobody. Default: where that saves time."""
    holdout_ratio: float = 0.05
    """Share of the episodes kept for the held-out loss."""
    holdout_data: str | None = None
    """Data set of the held-out loss, normalised as --data is; no episode of --data is kept for it then."""
    evaluate_observations: int = 64
    """Observations of the held-out loss at most; of several data sets as many of each, whose losses --weights weigh."""
    evaluate_every: int = 1000
    """Steps between two held-out losses; 0 for none."""
    log_every: int = 100
    """Steps between two log entries."""
    save_every: int = 1000
    """Steps between two saves."""
    keep_period: int | None = 5000
    """Keep saved steps that this divides; of the others only the newest stays."""
    profile: int = 0
    """Steps to trace, after the first two, for TensorBoard's profile plugin and XProf; 0 for none."""
    workers: int = 4
    """Threads that read data ahead."""
    seed: int = 42
    """Random seed of the order of the data, of noise, times and augmentation."""
    against: str | None = None
    """Folder of another run, such as the full model's, whose curves report.html shows behind this run's; if absent that
    from which the checkpoint was pruned, where its data are the same."""
    wandb: str | None = None
    """Also log to this wandb project."""

    def what_is_read(self) -> list[str]:
        """Checkpoints and data, which may not lie where the run is written, for --overwrite removes what is there."""
        others = [path for path in (self.holdout_data, self.teacher) if path is not None]
        return [self.checkpoint, *(path for path in (*self.data, *others) if epath.Path(path).expanduser().exists())]


def run(config: Finetune) -> None:
    """Run the command."""
    with contextlib.ExitStack() as lifetime:
        _run(config, lifetime)


def _run(config: Finetune, lifetime: contextlib.ExitStack) -> None:
    """Train; the folder of the run is taken when all that is read is known to be good, and given back at the end."""
    config = config.with_teachers_weight()
    check_apart(config.out, config.what_is_read(), may_lie_inside=True)
    _begin(config)
    console = Console(quiet=not is_first())
    spec = read_spec(config.checkpoint)
    architecture = read_trained_architecture(config, spec)
    not_decayed = config.not_decayed
    begun = saved_record(config.out) if config.resume else None
    config, chosen = _with_defaults(config, architecture, begun)
    inputs = read_inputs(config, spec, architecture, begun)
    if inputs.begun is None:
        check_schedule(OptimizerSettings.among(vars(config)))
    mesh = make_mesh(config.fsdp_devices)
    trained = trained_parameters(config, architecture, not_decayed)
    todo = _todo(config, inputs, trained)
    check_batch_size(todo, mesh)
    check_sharding(architecture, todo, mesh)
    check_rows(inputs.data, todo)
    trace = _trace(config, inputs.begun)
    out = lifetime.enter_context(run_folder(config.out, resume=config.resume, overwrite=config.overwrite))
    saved = Steps(out, write_assets=_assets_writer(config, inputs), keep_period=config.keep_period)
    entry = inputs.entry(dataclasses.asdict(config))
    start = 0 if saved.latest is None else saved.latest + 1
    if start > config.steps:
        raise InputError(
            f"{config.out} has done {start} steps, more than --steps {config.steps}; give at least as many."
        )
    introduce(console, config, chosen, inputs, trained, mesh, start)
    if saved.latest is not None:
        _go_on(console, saved.record(saved.latest)["steps"][-1], entry)
    record = functools.partial(_record, inputs, entry)
    lines = Console(stderr=True, quiet=not is_first())
    with progress("training", total=max(config.steps - start, 0), unit="steps", console=lines) as advance:
        log = Log(
            lines,
            Logs(out, start=start, wandb_project=config.wandb, config=entry.config) if is_first() else None,
            report_writer(out, record({}), config.against) if is_first() else None,
            advance,
            inputs.step_flops(trained.count / trained.total, action_samples=config.action_samples),
            start,
        )
        ended = train(
            spec,
            architecture,
            inputs.data,
            todo,
            saved,
            mesh=mesh,
            record=record,
            log=log,
            evaluate=held_out_loss(architecture, inputs.held, mesh, batch_size=config.batch_size, cuts=inputs.cuts),
            teacher=None if inputs.teacher is None else inputs.teacher.spec,
            paused=log.paused,
            trace=trace,
        )
    saved.close()
    log.close()
    conclude(console, config, out, ended, trace)


def _begin(config: Finetune) -> None:
    """Join the other processes, and raise now, not after minutes of reading, on what is not there."""
    if config.wandb is not None:
        import_wandb()
    _one_line_for_a_failed_save()
    join(config)

    def look() -> None:
        if config.against is not None:
            read_run(config.against)

    on_first(look, "read the run of --against")


def _one_line_for_a_failed_save() -> None:
    """Orbax logs, with tracebacks, what it raises as well; and every write still under way finds its loop closed."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    others = sys.unraisablehook
    if others.__module__ == __name__:  # of an earlier run of this process
        return

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            others(unraisable)

    sys.unraisablehook = hook


def _record(inputs: Inputs, entry: Entry, training: Mapping[str, Any]) -> dict[str, Any]:
    """Content of a step's ``clp.json``."""
    architecture = inputs.architecture
    plan = PrunePlan.of(architecture.kind, architecture.depths, coupled=architecture.coupled)
    return training_record(inputs.spec.plan_record, plan, entry.to_json(), training).to_json()


def _assets_writer(config: Finetune, inputs: Inputs) -> Any:
    """What writes the files beside the parameters of a saved step."""
    return assets_writer(
        inputs.spec,
        inputs.architecture,
        inputs.data,
        vlm_config=config.vlm_config,
        tokenizer=config.tokenizer,
        embodiment=config.embodiment,
    )


def _todo(config: Finetune, inputs: Inputs, trained: Trained) -> Run:
    return Run(
        steps=config.steps,
        batch_size=config.batch_size,
        optimizer=OptimizerSettings.among(vars(config)),
        step=StepSettings(
            ema_decay=config.ema_decay,
            action_samples=config.action_samples,
            accumulate=config.accumulate,
            augment=config.augment,
            frozen=trained.frozen,
            frozen_rows=tuple(sorted(trained.frozen_rows.items())),
            teaching=None if inputs.teacher is None else inputs.teacher.teaching,
            cuts=inputs.cuts,
        ),
        frozen_dtype=None if config.frozen_dtype == "keep" else config.frozen_dtype,
        sharding_rules=_rules(config.shard),
        seed=config.seed,
        workers=config.workers,
        log_every=config.log_every,
        evaluate_every=config.evaluate_every,
        save_every=config.save_every,
    )


def _trace(config: Finetune, begun: Mapping[str, Any] | None) -> StepTrace:
    start = 0 if begun is None else begun["training"]["step"] + 1
    return StepTrace(epath.Path(config.out).expanduser() / BOARD, start=start, steps=config.profile, end=config.steps)


def _rules(words: tuple[str, ...]) -> Rules:
    rules = []
    for word in words:
        pattern, _, axis = word.rpartition("=")
        if not pattern or not (axis == "none" or axis.isdigit()):
            raise InputError(
                f"--shard {word} is not NAME=AXIS; write for example '.*/input_embedding=0' or '.*/w=none'."
            )
        rules.append((pattern, None if axis == "none" else int(axis)))
    return tuple(rules)


def _with_defaults(
    config: Finetune, architecture: Architecture, begun: Mapping[str, Any] | None
) -> tuple[Finetune, str]:
    """The flags with the family's values where none was given, and these as a text.

    A resumed run keeps the schedule that it began with: the family may count it from --steps, which can change.
    """
    recorded = {} if begun is None or not begun["steps"] else begun["steps"][-1].get("config", {})
    unsaid = [name for name in ("warmup_steps", "decay_steps") if getattr(config, name) is None]
    kept = {name: recorded[name] for name in unsaid if recorded.get(name) is not None}
    defaults = family_of(architecture).training_defaults(architecture, config.steps)
    config, chosen = with_upstream_defaults(dataclasses.replace(config, **kept), defaults)
    others = [f"{name.replace('_', ' ')} {value}" for name, value in kept.items() if value != defaults[name]]
    return config, "; ".join([chosen, f"{', '.join(others)}, as the run began"] if others else [chosen])


def _go_on(console: Console, before: Mapping[str, Any], entry: Entry) -> None:
    """Say what is odd about a resumption, or refuse it."""
    note = check_same_run(before, entry, may_change=_MAY_CHANGE, defaults=_defaults())
    if note is not None:
        console.print(f"[yellow]note:[/] {escape(note)}")


def _defaults() -> dict[str, Any]:
    """Flags that a run from before they existed did not record."""
    known = {field.name: field.default for field in dataclasses.fields(Finetune)}
    given = {name: value for name, value in known.items() if value is not dataclasses.MISSING}
    return given | dataclasses.asdict(OptimizerSettings())
