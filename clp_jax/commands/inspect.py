"""``clp inspect``: what a checkpoint is, and how two of them differ.

Exit codes:
  0  described; with --against the names, shapes and dtypes are equal, and the files beside the arrays (statistics,
     tokenizers, configurations), and with --values every bit
  1  with --against: something differs
  2  what was given cannot be used, as for every command
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated

import tyro
from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from clp_jax.checkpoint import Spec, read_spec
from clp_jax.checkpoint.verifying import Verified, verify
from clp_jax.commands.results import print_json
from clp_jax.comparing import Comparison, Cut, Values, compare
from clp_jax.errors import InputError
from clp_jax.history import Step, length_of, places_of
from clp_jax.inspecting import Inspection, Part, inspect_checkpoint
from clp_jax.processing.conventions import Conventions
from clp_jax.progress import in_megabytes, progress
from clp_jax.provenance import healing

_SHOWN = 12
_NAMES_SHOWN = 5
_DONE = {"prune": "pruned", "finetune": "fine-tuned"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspect:
    """Say what a checkpoint is, without loading a tensor, or how two differ (exit code 1 if they do)."""

    checkpoint: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CHECKPOINT")]
    """openpi step folder or its params, local or gs://; a policy folder of lerobot; NVIDIA's GR00T folder."""
    against: str | None = None
    """Another checkpoint: also say where names, shapes and dtypes differ, and whether one is a cut of the other."""
    values: bool = False
    """With --against: also compare every bit, a few arrays at a time."""
    verify: bool = False
    """Read all arrays and the files beside them, and compare them with the checksums that clp wrote."""
    vlm_config: str | None = None
    """Folder or config.json of the vision-language model, for checkpoints that name it without holding it."""
    json: bool = False
    """Print JSON instead of tables."""


def run(config: Inspect) -> None:
    """Run the command.

    Raises:
      SystemExit: with code 1 if two checkpoints differ.
    """
    if config.values and config.against is None:
        raise InputError("--values compares two checkpoints: give the other with --against.")
    spec = read_spec(config.checkpoint)
    verified = _verify(spec) if config.verify else None
    found = inspect_checkpoint(spec, vlm_config=config.vlm_config)
    comparison = None
    if config.against is not None:
        other = read_spec(config.against)
        inspect_checkpoint(other)
        comparison = compare(spec, other, values=config.values, vlm_config=config.vlm_config)
    if config.json:
        value = found.to_json() | ({} if comparison is None else {"against": comparison.to_json()})
        value |= {} if verified is None else {"verified": verified._asdict()}
        print_json(value)
    else:
        _print(Console(), found, comparison)
        if verified is not None:
            others = f", and {verified.files:,} files beside them" if verified.files else ""
            found = f"{verified.arrays:,} arrays, {decimal(verified.bytes)}{others}, all as they were written"
            print(f"verified: {found}" if others else f"verified: {found}; no file beside them has a checksum")
    if comparison is not None and not comparison.same:
        raise SystemExit(1)


def _verify(spec: Spec) -> Verified:
    with progress("verifying", total=None, unit="MB") as advance:
        return verify(spec, in_megabytes(advance))


def _print(console: Console, found: Inspection, comparison: Comparison | None) -> None:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, text in _facts(found):
        grid.add_row(name, escape(text))
    console.print(grid)
    console.print(_towers(found))
    if found.not_read is not None:
        console.print(f"[yellow]not read:[/] lengths, cameras and dimensions: {escape(found.not_read)}")
    if comparison is not None:
        console.print()
        for line in _compared(comparison, found.path):
            console.print(escape(line), highlight=False, soft_wrap=True)


def _facts(found: Inspection) -> Iterable[tuple[str, str]]:
    """What is known beside the towers, in the order in which people ask."""
    yield "checkpoint", found.path
    yield "model", found.title if found.kind is None else f"{found.title} ({found.kind})"
    yield "stored as", f"{found.form}, {found.arrays:,} arrays"
    if found.not_read is None:
        state = "none of its own" if found.state_dim is None else _count(found.state_dim, "dimension")
        actions = "tokens" if found.action_dim is None else _count(found.action_dim, "dimension")
        assumed = "" if found.lengths_said else " (upstream's default: the checkpoint does not say)"
        yield "actions", f"chunks of {_count(found.action_horizon or 0, 'action')}{assumed}, {actions}"
        yield "state", state
        yield "prompt", f"{found.max_token_len} tokens with padding{assumed}"
        any_order = "any, read in the order of their names"
        yield "cameras", any_order if found.cameras is None else ", ".join(found.cameras) or "none"
    if found.conventions is not None:
        yield "conventions", _conventions(found.conventions)
    if found.adapters:
        yield "LoRA adapters", f"{found.adapters:,} arrays, {found.adapter_parameters:,} parameters"
    for statistics in found.statistics:
        dims = ", ".join(f"{name} {count}" for name, count in statistics.dimensions.items())
        yield "statistics", f"{statistics.file}: {statistics.problem or dims}"
    if not found.statistics:
        yield "statistics", "none beside the weights"
    yield "training state", "beside the weights" if found.train_state else "none beside the weights"
    yield "fingerprint", found.fingerprint
    if not found.history:
        yield "history", "no clp.json: not cut or trained by clp_jax"
    for number, step in enumerate(found.history, 1):
        yield "history" if number == 1 else "", f"{number}. {_step(step)}"
    for place in places_of(found.reports):
        yield "report", place


def _conventions(conventions: Conventions) -> str:
    """What the last training used, and from which columns."""
    robot = conventions.robot
    if robot is None:
        return f"model-ready observations: {conventions}"
    whose = f"robot {robot.name}" if conventions.config is None else f"openpi's {conventions.config}"
    images = [f"{camera} from {key}" for camera, key in robot.images.items()]
    read = [*images, f"state from {', '.join(robot.state) or 'nothing'}", f"actions from {', '.join(robot.actions)}"]
    return f"{whose}: {conventions}; {', '.join(read)}"


def _towers(found: Inspection) -> Table:
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for column in ("tower", "blocks", "alternating", "cut with", "parameters", "size", "arrays by dtype"):
        right, folds = column in ("blocks", "parameters", "size"), column in ("tower", "cut with", "arrays by dtype")
        table.add_column(column, justify="right" if right else "left", no_wrap=not folds)
    for part in found.parts:
        kinds = "" if part.name is None else "not known" if part.period is None else _kinds(part.period)
        table.add_row(
            escape(part.name or "outside of towers"),
            _blocks(part),
            kinds,
            escape(", ".join(part.cut_with)),
            f"{part.parameters:,}",
            decimal(part.bytes),
            _dtypes(part.dtypes),
        )
    table.add_section()
    table.add_row("all", "", "", "", f"{found.parameters:,}", decimal(found.bytes), _dtypes(found.dtypes))
    return table


def _kinds(period: int) -> str:
    return "no" if period == 1 else f"{period} kinds"


def _blocks(part: Part) -> str:
    cut = part.original_depth is not None and part.original_depth != part.depth
    return "" if part.depth is None else f"{part.depth} of {part.original_depth}" if cut else str(part.depth)


def _dtypes(dtypes: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(dtypes.items()))


def _step(step: Step) -> str:
    """One thing that was done, as a sentence."""
    source = "" if step.source is None else f" from {step.source}"
    data = "" if step.data is None else f" on {step.data}"
    if step.removed is None:
        length = f" for {length}" if (length := length_of(step)) else ""
        return f"{_DONE.get(step.command, step.command)}{source}{length}{data}{_cuts(step)}"
    lists = _alike({tower: blocks for tower, blocks in step.removed.items() if blocks})
    gone = "; ".join(f"{_words(towers)} without {_numbers(blocks)}" for blocks, towers in lists)
    chosen = "" if step.criterion is None else f", chosen by {step.criterion}{data}"
    healed = "" if step.healed is None else f"; {healing(step.healed, step.healed_on)}"
    return f"{_DONE.get(step.command, step.command)}{source}: {gone or 'nothing removed'}{chosen}{healed}"


def _cuts(step: Step) -> str:
    """The smaller depths that a fine-tuning trained, too."""
    cuts = ["; ".join(f"{_words(towers)} of {len(kept)}" for kept, towers in _alike(cut)) for cut in step.cuts]
    return "".join(f"; in turn with {cut} blocks" for cut in cuts)


def _compared(comparison: Comparison, here: str) -> Iterable[str]:
    """The comparison in sentences."""
    other, lines = comparison.other, comparison.differences
    if comparison.same_structure:
        yield f"Names, shapes and dtypes are those of {other}."
    else:
        yield (
            f"{_count(len(lines), 'array')} of {'the model' if comparison.names == 'model' else 'the files'} "
            f"{'differs' if len(lines) == 1 else 'differ'}; expected is {other}, got is {here}:"
        )
        yield from (f"  {line}" for line in lines[:_SHOWN])
        if len(lines) > _SHOWN:
            yield f"  ... and {len(lines) - _SHOWN:,} more; --json lists them all."
    for name, how in (comparison.beside or {}).items():
        yield f"  {name} {how}" if how == "differs" else f"  {name} is only in {here if how == 'only here' else other}"
    if comparison.same_content:
        yield _alike_as_far(comparison)
    if comparison.cut is not None:
        yield from _cut(comparison.cut, here, other)
    if comparison.values is not None:
        yield from _values(comparison.values, comparison.cut, here, other)


def _alike_as_far(comparison: Comparison) -> str:
    """What equal fingerprints mean, which do not cover every byte."""
    if comparison.same and comparison.values is not None:
        return f"It is a copy of {comparison.other}."
    if comparison.values is not None or comparison.beside:
        return "The fingerprints of the arrays are equal."
    return f"The fingerprints are equal, as of a copy of {comparison.other}; --values compares every bit."


def _cut(cut: Cut, here: str, other: str) -> Iterable[str]:
    made, source = (here, other) if cut.other_is_source else (other, here)
    since = "".join(f" and {done}" for done, was in (("healed", cut.healed), ("trained since", cut.trained)) if was)
    yield f"As its clp.json says, {made} was made of {source}{since}:"
    for blocks, towers in _alike(cut.blocks):
        yield f"  {_words(towers)}: {_numbers(blocks)} of {source}"
    if not cut.blocks:
        yield "  no block was removed"


def _values(values: Values, cut: Cut | None, here: str, other: str) -> Iterable[str]:
    """What the bits say."""
    for names, where in ((values.only_here, here), (values.only_there, other)):
        if names:
            yield f"{_count(len(names), 'array')} only in {where}: {_first(names)}"
    if values.different:
        both = f"{_count(values.compared, 'array')} in both"
        yield f"{len(values.different):,} of {both} differ: {_first(values.different)}"
    else:
        yield f"All {_count(values.compared, 'array')} in both are equal bit for bit."
    if cut is None:
        return
    source = other if cut.other_is_source else here
    for blocks, towers in _alike({tower: kept for tower, kept in cut.blocks.items() if tower in values.block_faults}):
        for tower in towers:
            wrong = [blocks[place] for place in values.block_faults[tower]]
            yield f"  {tower}: what was {_numbers(wrong)} of {source} differs from it"
    for blocks, towers in _alike({name: kept for name, kept in cut.blocks.items() if name not in values.block_faults}):
        yield f"  {_words(towers)}: every kept block equals its block of {source} bit for bit: {_numbers(blocks)}"


def _alike(blocks: Mapping[str, tuple[int, ...]]) -> list[tuple[tuple[int, ...], list[str]]]:
    """Lists of blocks with the towers that have them."""
    towers: dict[tuple[int, ...], list[str]] = {}
    for tower, kept in blocks.items():
        towers.setdefault(kept, []).append(tower)
    return list(towers.items())


def _first(names: Sequence[str]) -> str:
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more:,} more" if more > 0 else "")


def _words(names: Sequence[str]) -> str:
    return " and ".join([*([", ".join(names[:-1])] if names[:-1] else []), names[-1]])


def _numbers(blocks: Sequence[int]) -> str:
    """Blocks in words, neighbours joined.

    >>> _numbers((0, 1, 2, 5))
    'blocks 0 to 2, 5'
    """
    runs: list[list[int]] = []
    for block in blocks:
        if runs and block == runs[-1][-1] + 1:
            runs[-1].append(block)
        else:
            runs.append([block])
    texts = [f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return f"block{'' if len(blocks) == 1 else 's'} {', '.join(texts)}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
