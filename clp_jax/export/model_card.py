"""``README.md`` of an export: what was removed and why, sizes before and after, how to load it, licences."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from clp_jax.errors import blamed_on
from clp_jax.export.reference import CHECK_FILE
from clp_jax.export.result import Check, Options
from clp_jax.export.weights import Weights
from clp_jax.flops import parameter_count, sample_flops
from clp_jax.models import Architecture, Lengths, configurations, family_of, views
from clp_jax.plan import PrunePlan
from clp_jax.provenance import conventions_of, healing, trained_with

_CAMERAS = 3

_UNCHECKED = """

Made with `--check bits`: there is no check.npz to compare with. Export again without that flag for one."""


def model_card(
    weights: Weights, target: str, options: Options, check: Check, *, load: str, unlike: Sequence[str]
) -> str:
    """The card of an export.

    Args:
      weights: what was written.
      target: of the export.
      options: what weights cannot tell.
      check: what was compared.
      load: Markdown on how to load it.
      unlike: sentences on what the target does not do or have of what the conventions ask for.
    """
    record = weights.spec.plan_record
    family = family_of(weights.architecture)
    name = family.TITLES[weights.architecture.kind]
    source = weights.spec.path
    with blamed_on(f"clp.json of {source}", "copy the checkpoint again", verb="does not describe it"):
        removed, sizes = _removed(record), _sizes(weights, options, record)
        is_cut = record is not None and not PrunePlan.from_json(record["plan"]).is_identity
    parts = [
        f"# A pruned {name} for {target}" if is_cut else f"# {name} for {target}",
        f"Made by `clp export --to {target}` of clp_jax (CLP, arXiv 2606.20246) from `{source}`.",
        "## Load\n\n" + load + ("" if options.run or CHECK_FILE not in load else _UNCHECKED),
        *(["## Conventions\n\n" + said] if (said := _conventions(weights, options, unlike)) else []),
        "## What was removed\n\n" + removed,
        "## Size\n\n" + sizes,
        "## Checked\n\n" + _checked(check),
        "## Licences\n\n" + family.LICENCES + _OURS,
    ]
    return "\n\n".join(parts) + "\n"


_OURS = """
The code files in this folder are part of clp_jax, Apache-2.0. The data that the model was fine-tuned on may have terms
of its own."""


def _conventions(weights: Weights, options: Options, unlike: Sequence[str]) -> str | None:
    """What the checkpoint was trained with, and what of it the target does not do; None where nobody said."""
    conventions = options.conventions
    if conventions is None or conventions.robot is None:
        return None if options.assumed is None else f"Assumed: {options.assumed}"
    named = configurations().get(conventions.config or "")
    whose = "As trained" if named is None else f"Those of {named.upstream}'s configuration `{conventions.config}`"
    if (own := _lengths_of_files(weights, len(conventions.robot.images))) not in (None, options.lengths):
        whose = f"As asked; the checkpoint's own files say {own.horizon} actions and {own.prompt} tokens"
    return "\n\n".join([f"{whose}: {conventions}.", *unlike])


def _lengths_of_files(weights: Weights, cameras: int) -> Lengths | None:
    """Those of the last training, else of the configuration; None where conventions are recorded, or nothing is."""
    record = weights.spec.plan_record
    if weights.spec.folder is None or conventions_of(record) is not None:
        return None
    own, trained = family_of(weights.architecture).lengths(weights.architecture, cameras), trained_with(record)
    return Lengths(trained.get("action_horizon", own.horizon), trained.get("max_token_len", own.prompt))


def _removed(record: Mapping[str, Any] | None) -> str:
    if record is None:
        return "Nothing: the checkpoint has no `clp.json`."
    lines = ["| tower | blocks before | after | removed |", "|---|---|---|---|"]
    for name, tower in record["plan"]["towers"].items():
        removed = [i for i in range(tower["depth"]) if i not in tower["keep"]]
        lines.append(f"| {name} | {tower['depth']} | {len(tower['keep'])} | {', '.join(map(str, removed)) or 'none'} |")
    for number, step in enumerate(record.get("steps", ()), 1):
        lines += ["", f"Step {number}: {_reason(step)}"]
    return "\n".join(lines)


def _reason(step: Mapping[str, Any]) -> str:
    """Criterion, scores and data of one pruning; data and length of one fine-tuning."""
    if step.get("command") == "finetune":
        flags = step["config"]
        how = f", taught by `{flags['teacher']}` with weight {flags['teacher_weight']}" if flags.get("teacher") else ""
        how += f", in turn at the depths {', '.join(flags['depths'])}" if flags.get("depths") else ""
        return (
            f"fine-tuned from `{step['source']}` on `{flags['data']}`{how}, at most {flags['steps']} steps of "
            f"{flags['batch_size']} observations."
        )
    criterion = step.get("criterion")
    by_hand = criterion in (None, "manual")
    text = f"pruned, in the block numbers of `{step['source']}`: "
    text += "the blocks were given by hand." if by_hand else f"criterion `{criterion}`."
    data = step.get("calibration") or {}
    if "observations" in data:
        text += f" Calibrated on {data['observations']} observations."
    if loss := data.get("loss"):
        text += f" Loss on {loss['data']} data before any fine-tuning: {loss['full']:.4f} with all blocks, "
        text += f"{loss['pruned']:.4f} without those removed."
    if step.get("healed"):
        text += f" Then {healing(step['healed'])}."
    groups = (step["plan"].get("scores") or {}).items()
    lines = [line for name, found in groups if isinstance(found, Mapping) for line in _scores(name, found)]
    return text + ("\n\n" + "\n".join(lines) if lines else "")


def _scores(name: str, found: Mapping[str, Any]) -> list[str]:
    """One line per group of towers: the score of every block, and what was predicted."""
    lines = []
    if isinstance(blocks := found.get("scores"), list):
        numbers = ", ".join(
            f"{i}: {'none' if score is None else format(score, '.3g')}" for i, score in enumerate(blocks)
        )
        lines.append(f"* {name}, score of each block by itself (higher: rather removed): {numbers}")
    if isinstance(cost := found.get("predicted_cost"), float):
        lines.append(f"* {name}, predicted cost of removing them: {cost:.3g} ({found.get('unit', 'no unit')})")
    return lines


def _sizes(weights: Weights, options: Options, record: Mapping[str, Any] | None) -> str:
    after = weights.architecture
    depths = {name: tower["depth"] for name, tower in record["plan"]["towers"].items()} if record else {}
    before = after.with_depths(depths)
    rows = [("blocks", _depths(before), _depths(after))]
    rows.append(("parameters", f"{parameter_count(before):,}", f"{parameter_count(after):,}"))
    family = family_of(after)
    if family.why_no_actions(after) is None:
        cameras = len(views(after, _CAMERAS))
        flops = [
            sample_flops(a, options.lengths, cameras=cameras, num_steps=options.num_steps) for a in (before, after)
        ]
        what = f"GFLOP to sample a chunk ({cameras} cameras, {options.num_steps} steps)"
        rows.append((what, *(f"{count / 1e9:,.4g}" for count in flops)))
    lines = ["| | before pruning | here |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
    dtypes = ", ".join(sorted({leaf.dtype.name for leaf in weights.leaves.values()}))
    adapters = " LoRA adapters are merged into the weights." if weights.architecture != weights.source else ""
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in weights.leaves.values())
    return "\n".join(lines) + f"\n\nStored as {dtypes}, {size / 1e6:,.0f} MB.{adapters} {_SPEED}"


_SPEED = """No speed was measured for this card: `clp benchmark --part serving --checkpoint PRUNED --against FULL`
measures latency and throughput of both checkpoints on your machine."""


def _depths(architecture: Architecture) -> str:
    return ", ".join(f"{name} {depth}" for name, depth in architecture.depths.items())


def _checked(check: Check) -> str:
    text = str(check)
    if check.largest_difference is None:
        return f"{text}\n\n**Not compared:** {check.what}. Reason: {check.missing}."
    return f"{text} Largest difference of the {check.what}: {check.largest_difference:.1e}."
