"""``clp plan-scale``: what a model needs on a slice of TPUs that is not here, from the TPU compiler itself."""

import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from clp_jax.aliases import Tree
from clp_jax.checkpoint import read_spec
from clp_jax.commands.model_flags import ModelFlags
from clp_jax.commands.results import print_json
from clp_jax.commands.unused import refuse_unused
from clp_jax.errors import InputError
from clp_jax.loading import read_architecture, stored_tree
from clp_jax.models import RELEASED, Architecture, Remat, abstract_params
from clp_jax.outputs import staged
from clp_jax.plan import PrunePlan
from clp_jax.planning import groups_of, per_group
from clp_jax.progress import progress
from clp_jax.prune import apply_plan
from clp_jax.scale.chips import CPU, GIB
from clp_jax.scale.forecast import Forecast, forecast, smallest
from clp_jax.scale.picture import draw
from clp_jax.scale.programs import Task, Workload, programs
from clp_jax.scale.topologies import CHIPS, Topology, devices_of, parse, usual_names
from clp_jax.sharding import make_mesh

_HELD = ("parameters", "optimiser", "average")
"""What every program holds, or holds none of."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanScale(ModelFlags):
    """Compile what analyse, prune --heal, finetune or serve run for TPU slices, and print what it needs.

    No TPU is touched. Times are lower bounds from the makers' numbers, not predictions. One program takes a
    minute or two to compile.
    """

    checkpoint: str
    """A checkpoint, or the name of a released model (pi0, pi05, pi0-fast, smolvla, gr00t-n1.5) for its sizes alone."""
    topology: tuple[str, ...]
    """Slices: v5e:4x4 v5p:2x2x2 v6e-256..., or a kind alone (v5e), which finds the smallest that fits from 1 chip to
    256; cpu:8 tries everything out where there is no TPU compiler."""
    against: str | None = None
    """The checkpoint that --checkpoint was pruned from, to see both side by side."""
    keep_layers: str | None = None
    """Also the same model with so many blocks of the language stack: 12 or 12,9. Where several groups of towers are cut
    on their own, each by name: llm=6+vl=3+dit=12, and further such words after a comma."""
    task: Task = "finetune"
    """analyse, heal (what prune --heal runs, beside the full model), finetune, lora (finetune with new adapters) or
    infer (what serve runs)."""
    batch_size: int = 32
    """Observations of a step over all chips; of a request's batch in infer."""
    fsdp_devices: int | None = None
    """Chips over which each large parameter is split; all if absent."""
    accumulate: int = 1
    """finetune, lora: parts of a batch that run one after another."""
    ema_decay: float | Literal["upstream"] | None = "upstream"
    """finetune, lora: None plans without the average of the parameters, which π0's authors keep and the others' do
    not."""
    augment: bool = True
    """finetune, lora: whether the images are cropped, rotated and recoloured."""
    teacher: str | None = None
    """finetune, lora: a checkpoint or a released model that teaches, as with clp finetune --teacher."""
    remat: Remat = "all"
    """finetune, lora: what the backward pass computes again."""
    params_dtype: Literal["keep", "float32", "bfloat16"] = "keep"
    """analyse, heal and infer: parameters as stored, or in another dtype. Training always keeps float32."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype of activations."""
    num_steps: int | None = None
    """infer: integration steps from noise to actions; the model's own number if absent."""
    group_size: int = 4
    """analyse: observations of a group."""
    action_horizon: int | None = None
    """Actions of a chunk; the model's own if absent."""
    max_token_len: int | None = None
    """Tokens of a prompt; the model's own if absent."""
    out: str | None = None
    """Folder to create: plan-scale.json and plan-scale.png."""
    json: bool = False
    """Print what plan-scale.json would hold instead of tables."""
    overwrite: bool = False
    """Replace --out if it exists."""


_READ_BY = {
    **dict.fromkeys(("accumulate", "ema_decay", "augment", "teacher", "remat"), ("finetune", "lora")),
    "params_dtype": ("analyse", "heal", "infer"),
    "num_steps": ("infer",),
    "group_size": ("analyse",),
}
"""Tasks that a flag is for, where it is not for all."""


def run(config: PlanScale) -> None:
    """Run the command."""
    _refuse_unused(config)
    console, lines = Console(quiet=config.json), Console(stderr=True)
    slices = _slices(config.topology)
    _only_cpu(max((one.chips for names in slices for one in names if one.chip is CPU), default=0))
    models = _models(config)
    fields = ("task", "batch_size", "accumulate", "ema_decay", "augment", "group_size", "num_steps", "action_horizon")
    cut_from = None
    if config.task == "heal" and len(models) > 1:
        cut_from = models.pop(next(iter(models)))
    workload = Workload(
        **{name: getattr(config, name) for name in fields},
        prompt_length=config.max_token_len,
        teacher=None if config.teacher is None else _model(config.teacher, config)[0],
        cut_from=cut_from,
    )
    found: list[Forecast] = []
    with contextlib.ExitStack() as lifetime:
        folder = None
        if config.out is not None:
            folder = lifetime.enter_context(staged(config.out, by="clp plan-scale", overwrite=config.overwrite))
        with progress("compiling", total=None, unit="programs", console=lines) as advance:
            for model in models.items():
                for candidates in slices:
                    plan = functools.partial(_forecasts, config, workload, model, advance)
                    found += _first_that_fits(candidates, plan)
        if all(one.problem and not one.needed for one in found):
            raise InputError(found[0].problem)
        if folder is not None:
            _save(config, found, Path(folder))
    if config.json:
        print_json(_to_json(config, found))
    _show(found, console)
    if config.out is not None:
        out = escape(config.out)
        console.print(f"Saved: [bold]{out}/plan-scale.json[/] and [bold]{out}/plan-scale.png[/]")


def _refuse_unused(config: PlanScale) -> None:
    others = [name for name, tasks in _READ_BY.items() if config.task not in tasks]
    refuse_unused(config, others, f"nothing in --task {config.task} depends on {{it}}")
    if all(name in RELEASED for name in (config.checkpoint, config.against, config.teacher) if name is not None):
        fields = [field.name for field in dataclasses.fields(ModelFlags)]
        refuse_unused(config, fields, "the sizes of a released model are known")


def _slices(words: tuple[str, ...]) -> list[list[Topology]]:
    """Each a slice of its own, or the candidates of a kind from small to large."""
    names = [name for word in words for name in word.split(",") if name]
    if not names:
        raise InputError("--topology names no slice; write for example --topology v5e:4x4.")
    return [[parse(one) for one in (usual_names(name) if name in CHIPS else (name,))] for name in names]


def _only_cpu(devices: int) -> None:
    """Keep this process away from the chips of the machine it runs on, before JAX looks for any."""
    jax.config.update("jax_platforms", "cpu")
    flag = "xla_force_host_platform_device_count"
    if devices > 1 and flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --{flag}={devices}".strip()


def _models(config: PlanScale) -> dict[str, tuple[Architecture, Tree]]:
    """Architecture and stored parameters by name, the unpruned one first."""
    models: dict[str, tuple[Architecture, Tree]] = {}
    named = {name: _model(name, config) for name in (config.against, config.checkpoint) if name is not None}
    short = {Path(name).name for name in named}
    for path, (architecture, params) in named.items():
        name = Path(path).name if len(short) == len(named) else path  # both may be the params of some step
        models[_label(name, architecture)] = architecture, params
        for word in (config.keep_layers or "").split(",") if path == config.checkpoint else ():
            if not word:
                continue
            keep = _first_blocks(architecture, word, config)
            plan = PrunePlan.of(architecture.kind, architecture.depths, keep, coupled=architecture.coupled)
            smaller = architecture.with_depths({tower: len(blocks) for tower, blocks in keep.items()})
            models[_label(name, smaller)] = smaller, apply_plan(params, plan)
    return models


def _first_blocks(architecture: Architecture, word: str, config: PlanScale) -> dict[str, range]:
    """So many blocks of every tower that is always cut: 9, or llm=5+vl=3+dit=8 where towers are cut on their own."""
    groups, blocks = groups_of(architecture)[0], architecture.depths
    pairs = {name: number for name, _, number in (part.rpartition("=") for part in word.strip().split("+"))}
    if list(pairs) == [""] and len(groups) > 1:
        example = "+".join(f"{group[0]}={pairs['']}" for group in groups)
        raise InputError(f"--keep-layers {word} does not say of which tower; write --keep-layers {example}.")
    chosen = per_group(pairs[""] if list(pairs) == [""] else pairs, groups, "keep_layers")
    keep = {}
    for group, number in chosen.items():
        depth = blocks[group[0]]
        if not number.isdigit() or not 0 < int(number) <= depth:
            raise InputError(f"--keep-layers {config.keep_layers}: give numbers from 1 to {depth}, like 12,9.")
        keep |= dict.fromkeys(group, range(int(number)))
    return keep


def _model(name: str, config: PlanScale) -> tuple[Architecture, Tree]:
    if name in RELEASED:
        architecture = dataclasses.replace(RELEASED[name], dtype=config.dtype)
        params = abstract_params(architecture)
    else:
        spec = read_spec(name)
        architecture = read_architecture(spec, dtype=config.dtype, **config.model_settings())
        params = stored_tree(spec, architecture)
    if config.params_dtype != "keep":
        params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(config.params_dtype)), params)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    return dataclasses.replace(architecture, remat=config.remat), params


def _label(name: str, architecture: Architecture) -> str:
    blocks = "+".join(str(architecture.depths[group[0]]) for group in groups_of(architecture)[0])
    return f"{name}, {blocks} blocks"


def _first_that_fits(candidates: list[Topology], plan: Callable[[Topology], list[Forecast]]) -> list[Forecast]:
    """Forecasts up to the first slice on which everything fits."""
    found: list[Forecast] = []
    for one in candidates:
        found += (more := plan(one))
        if all(entry.fits for entry in more):
            break
    return found


def _forecasts(
    config: PlanScale,
    workload: Workload,
    named: tuple[str, tuple[Architecture, Tree]],
    advance: Callable[[int], None],
    topology: Topology,
) -> list[Forecast]:
    """All programs of the task on one slice; a batch that does not divide over it is told in place of numbers."""
    model, (architecture, params) = named
    devices = devices_of(topology)
    fsdp = config.fsdp_devices or len(devices)
    found = []
    try:
        mesh = make_mesh(fsdp, devices)
        todo = programs(workload, architecture, params, mesh)
    except InputError as error:
        return [Forecast(topology.name, topology.chips, fsdp, model, hbm=topology.chip.hbm, problem=str(error))]
    for make in todo:
        found.append(forecast(make(), topology, model, fsdp))
        advance(1)
    return found


def _show(forecasts: list[Forecast], console: Console) -> None:
    held = [*_HELD, *(["teacher"] if any(one.held.get("teacher") for one in forecasts) else [])]
    _print(
        console,
        "Memory of one chip, GiB",
        (*held, "activations", "free"),
        [(one, _memory_cells(one, held)) for one in forecasts if one.needed],
    )
    counted = [one for one in forecasts if one.memory]
    _print(
        console,
        "One call on one chip: it takes longer than the longest of these times",
        ("TFLOP", "compute", "HBM", "network", "at least"),
        [(one, _time_cells(one)) for one in counted],
    )
    kinds = sorted({kind for one in counted for kind in one.collectives})
    if kinds:
        _print(
            console,
            "Collectives of one call, GB of whole arrays on one chip",
            (*kinds, "leave the chip"),
            [(one, _collective_cells(one, kinds)) for one in counted],
        )
    for one in forecasts:
        if one.problem:
            console.print(f"{one.topology}, {one.model}: {one.problem}", soft_wrap=True, highlight=False, markup=False)
    found = smallest(forecasts)
    for model in dict.fromkeys(one.model for one in forecasts):
        console.print(f"Smallest of these slices on which {escape(model)} fits: [bold]{found.get(model, 'none')}[/]")


def _print(console: Console, title: str, columns: Sequence[str], rows: list[tuple[Forecast, list[str]]]) -> None:
    """A table with a line per program; what is the same everywhere stands in no column."""
    programs = len({one.program for one, _ in rows}) > 1
    table = Table(title=title, title_justify="left")
    # What a line is about stays readable on a narrow terminal, where headings take several lines.
    table.add_column("slice", no_wrap=True)
    table.add_column("model", min_width=max((len(word) for one, _ in rows for word in one.model.split()), default=0))
    if programs:
        table.add_column("program")
    for column in columns:
        table.add_column(column.replace("-", "-\n").replace(" ", "\n"), justify="right", no_wrap=True)
    for one, cells in rows:
        table.add_row(one.topology, escape(one.model), *([one.program] if programs else []), *cells)
    console.print(table)


def _memory_cells(one: Forecast, held: Sequence[str]) -> list[str]:
    sizes = [one.held.get(name, 0) for name in held]
    shown = [f"{size / GIB:.2f}" for size in (*sizes, one.activations)]
    return [*shown, f"{one.free / GIB:.2f}" if one.fits else f"[red]{one.free / GIB:.2f}[/]"]


def _time_cells(one: Forecast) -> list[str]:
    seconds, of = one.bound
    times = [f"{1e3 * x:.1f} ms" for x in (one.compute_seconds, one.memory_seconds, one.network_seconds)]
    return [f"{one.flops / 1e12:.2f}", *times, f"{1e3 * seconds:.1f} ms, {of}"]


def _collective_cells(one: Forecast, kinds: list[str]) -> list[str]:
    return [*(f"{one.collectives.get(kind, 0) / 1e9:.3f}" for kind in kinds), f"{one.sent / 1e9:.3f}"]


def _to_json(config: PlanScale, forecasts: list[Forecast]) -> dict[str, Any]:
    return {
        "config": dataclasses.asdict(config),
        "versions": {"jax": jax.__version__, "libtpu": _libtpu_version()},
        "forecasts": [one.to_json() for one in forecasts],
        "smallest": smallest(forecasts),
    }


def _save(config: PlanScale, forecasts: list[Forecast], folder: Path) -> None:
    (folder / "plan-scale.json").write_text(json.dumps(_to_json(config, forecasts), indent=2) + "\n")
    draw(forecasts, f"{config.task}, planned for TPUs by their compiler", folder / "plan-scale.png")


def _libtpu_version() -> str | None:
    import importlib.metadata

    try:
        return importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        return None
