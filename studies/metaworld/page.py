"""``results.json`` to ``RESULTS.md`` and its plots; nothing else is read, so every number can be recomputed."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clp_jax.evaluation.statistics import wilson
from studies.metaworld import protocol, tuned_page
from studies.metaworld.tables import Rows, blocks, final_loss, header, row, success, success_difference

_WITH_FIRST = "the last, among masks with block 0"


def write(results: Path, out: Path) -> None:
    """Write the page.

    Args:
      results: of `collect`.
      out: folder of ``RESULTS.md`` and ``plots``.
    """
    from studies.metaworld import plots

    found = json.loads(results.read_text())
    (out / "plots").mkdir(exist_ok=True)
    plots.ratings(found, out / "plots" / "ratings.png")
    if _ranked(found):
        plots.masks(found, out / "plots" / "masks.png")
    plots.curves(found, out / "plots" / "curves.png")
    (out / "RESULTS.md").write_text(text(found))


def text(found: dict[str, Any]) -> str:
    """The page in Markdown."""
    parts = [_head(found), _screening(found), _ratings()]
    parts += [_arms(found, regime, depth) for regime, depth in _settings(found)]
    parts.append(_paired(found))
    if _ranked(found):
        parts.append(_ranks(found))
    parts.append(_speed(found))
    if "tuned" in found:
        parts.append(tuned_page.text(found["tuned"]))
    return "\n\n".join(parts) + "\n"


def runs_of(found: dict[str, Any], regime: str, name: str) -> Rows:
    """The runs of an arm, by seed."""
    return sorted((r for r in found["runs"] if (r["regime"], r["name"]) == (regime, name)), key=lambda r: r["seed"])


def ranks(found: dict[str, Any]) -> dict[tuple[str, str], dict[str, tuple[float, float, float]]]:
    """Spearman's correlation over the random masks of predicted damage with real losses, with a bootstrap interval.

    Returns:
      Data of the criterion and criterion to real damage ("zero-shot" or a number of steps) to (correlation, low, high).
    """
    rows = _ranked(found)
    real = {"zero-shot": [row["zero_shot"]["scarce"] for row, _ in rows]}
    for step in sorted((int(s) for s in rows[0][1]["held_out_loss"]), key=int):
        real[str(step + 1)] = [run["held_out_loss"][str(step)] for _, run in rows]
    final = np.array([final_loss(run) for _, run in rows])
    with_first = np.array([row["name"].startswith("00-") for row, _ in rows])
    table = {}
    for data in ("scarce", "base"):
        for criterion in rows[0][0]["predicted"][data]:
            predicted = np.array([row["predicted"][data][criterion] for row, _ in rows])
            cells = {what: _spearman(predicted, np.array(loss)) for what, loss in real.items()}
            table[data, criterion] = cells | {_WITH_FIRST: _spearman(predicted[with_first], final[with_first])}
    return table


def paired_success(found: dict[str, Any], arm: str, reference: str) -> tuple[float, float, float]:
    """How much more often an arm succeeds than another from the same starts: every setting, seed, task and start.

    Returns:
      Difference of the rates, and 95 % of a bootstrap over the starts of all tasks. Tasks, seeds and settings stay: it
      says nothing about other ones.
    """
    return success_difference(_pairs(found, arm, reference))


def paired_loss(found: dict[str, Any], arm: str, reference: str, regime: str, depth: int) -> float | None:
    """Geometric mean over the common seeds of the ratio of two arms' held-out losses; None without any."""
    pairs = list(_pairs(found, arm, reference, ((regime, depth),)))
    return float(np.exp(np.mean([np.log(final_loss(x) / final_loss(y)) for x, y in pairs]))) if pairs else None


def _settings(found: dict[str, Any]) -> list[tuple[str, int]]:
    return [(r, d) for d in protocol.DEPTHS for r in protocol.REGIMES if _of(found, r, d)]


def _pairs(
    found: dict[str, Any], arm: str, reference: str, settings: Sequence[tuple[str, int]] | None = None
) -> Iterable[tuple[dict[str, Any], dict[str, Any]]]:
    """Runs of two arms in the same setting and of the same seed."""
    for regime, depth in _settings(found) if settings is None else settings:
        arms = found["arms"][str(depth)]
        if arm in arms:
            others = {run["seed"]: run for run in runs_of(found, regime, arms[reference])}
            yield from ((x, others[x["seed"]]) for x in runs_of(found, regime, arms[arm]) if x["seed"] in others)


def _paired(found: dict[str, Any]) -> str:
    reference, settings = "clp", _settings(found)
    main = found["arms"][str(protocol.DEPTHS[0])]
    arms = [arm for arm in main if arm != reference and (arm == "greedy (base tasks)" or "(base tasks)" not in arm)]
    lines = [
        "## Against the paper's rule",
        "",
        (
            "Every arm minus `clp` from the same starts, over all settings and the seeds that both have (95 % of a "
            "bootstrap over the starts); then the ratio of held-out losses, below 1 is better than `clp`. 0 and 1 also "
            "where both keep the same blocks."
        ),
        "",
        *header(["arm", "success [points]", *(f"loss, {depth} blocks, {regime}" for regime, depth in settings)]),
    ]
    rates = {arm: paired_success(found, arm, reference) for arm in arms}
    for arm in sorted(arms, key=lambda arm: -rates[arm][0]):
        ratios = [paired_loss(found, arm, reference, *setting) for setting in settings]
        cells = ["-" if ratio is None else f"{ratio:.3f}" for ratio in ratios]
        lines.append(row([arm, "{:+.1f} ({:+.1f}, {:+.1f})".format(*(100 * x for x in rates[arm])), *cells]))
    return "\n".join(lines)


def _spearman(x: np.ndarray, y: np.ndarray, draws: int = 2000) -> tuple[float, float, float]:
    rng = np.random.default_rng(0)
    chosen = rng.integers(0, len(x), (draws, len(x)))
    low, high = np.nanquantile(_correlation(x[chosen], y[chosen]), [0.025, 0.975])
    return float(_correlation(x, y)), float(low), float(high)


def _correlation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Spearman's, along the last axis."""
    from scipy.stats import rankdata

    x, y = (rankdata(z, axis=-1) - (z.shape[-1] + 1) / 2 for z in (x, y))
    with np.errstate(invalid="ignore"):  # a draw of one mask alone has none
        return (x * y).sum(-1) / np.sqrt((x * x).sum(-1) * (y * y).sum(-1))


def _ranked(found: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Random masks that were fine-tuned, each with its run of the first seed."""
    runs = {r["name"]: r for r in found["runs"] if (r["regime"], r["seed"]) == ("scarce", protocol.SEEDS[0])}
    return [(row, runs[row["name"]]) for row in found["masks"] if row["name"] in runs]


def _of(found: dict[str, Any], regime: str, depth: int) -> dict[str, tuple[list[str], Rows]]:
    """Runs of a regime at a depth, by name, with the arms that share them; only what was simulated."""
    arms = found["arms"].get(str(depth), {})
    shared: dict[str, list[str]] = {}
    for arm, name in arms.items():
        shared.setdefault(name, []).append(arm)
    if depth == protocol.DEPTHS[0]:
        shared["full-equal-time"] = ["full, equal time"]
    rows = {name: (labels, runs_of(found, regime, name)) for name, labels in shared.items()}
    rows = {name: (labels, runs) for name, (labels, runs) in rows.items() if success(runs)[1]}
    return rows if set(rows) - {"full"} else {}


def _head(found: dict[str, Any]) -> str:
    packages = ", ".join(f"{name} {number}" for name, number in found["conditions"]["packages"].items())
    held = found["pre_training"]["held_out_loss"]
    parameters = ", ".join(f"{int(depth)} blocks {count:,}" for depth, count in found["parameters"].items())
    return "\n".join(
        [
            "# Does a pruned π0 learn as well, faster?",
            "",
            (
                "Generated by `python -m studies.metaworld page` from `results.json`; what it means is in "
                "[README.md](README.md)."
            ),
            "",
            (
                f"Machine: {found['conditions']['machine']}; Python {found['conditions']['python']}, {packages}. "
                f"Parameters: {parameters}."
            ),
            "",
            (
                f"Pre-training: {protocol.BASE_STEPS:,} steps on {len(protocol.BASE_TASKS)} tasks, "
                f"{protocol.BASE_EPISODES} demonstrations each; held-out loss {held[min(held, key=int)]:.3f} after "
                f"{int(min(held, key=int)):,} steps, {held[max(held, key=int)]:.3f} at the end."
            ),
        ]
    )


def _screening(found: dict[str, Any]) -> str:
    screen = found["screen"]
    kinds = {"float32": "as trained, in float32", "as-is": "as it is", "blank": "black picture"}
    kinds |= {"wrong": "another task's instruction"}
    kinds = {kind: label for kind, label in kinds.items() if kind in screen}
    lines = ["## The base on its own tasks", ""]
    if "float32" in kinds:
        lines += ["The base that is committed has bfloat16 weights; all columns but the first are its own.", ""]
    lines += header(["task", *kinds.values()])
    for task in protocol.BASE_TASKS:
        cells = [f"{len(screen[kind]['solved'][task])}/{screen[kind]['episodes']}" for kind in kinds]
        lines.append(row([task, *cells]))
    lines += ["", f"All: {', '.join(_share(screen[kind], label) for kind, label in kinds.items())}."]
    if new := screen.get("new-tasks"):
        counts = ", ".join(f"{task} {len(numbers)}/{new['episodes']}" for task, numbers in new["solved"].items())
        lines += ["", f"Without fine-tuning on the tasks that follow: {counts}."]
    return "\n".join(lines)


def _share(counts: dict[str, Any], label: str) -> str:
    solved, episodes = success([counts], protocol.BASE_TASKS)
    return f"{label} {solved}/{episodes} ({solved / episodes:.0%})"


def _ratings() -> str:
    return "## What the analysis sees\n\n![CKA, cosine and residual per block](plots/ratings.png)"


def _arms(found: dict[str, Any], regime: str, depth: int) -> str:
    chosen = protocol.REGIMES[regime]
    rows = _of(found, regime, depth)
    head = ["arm", "blocks that stay", *protocol.NEW_TASKS, "all (95 %)", "held-out loss", "seeds"]
    lines = [
        (
            f"## {depth} of {protocol.DEPTH} blocks, {regime}: {chosen.episodes} demonstrations a task, "
            f"{chosen.steps} steps"
        ),
        "",
        *header(head),
    ]
    for name, (labels, runs) in sorted(rows.items(), key=lambda item: -_rate(item[1][1])):
        done = [run for run in runs if "solved" in run]
        solved, episodes = success(done)
        low, high = wilson(solved, episodes)[1:]
        losses = [final_loss(run) for run in done]
        tasks = ["{}/{}".format(*success(done, (task,))) for task in protocol.NEW_TASKS]
        lines.append(
            row(
                [
                    ", ".join(labels),
                    blocks(_mask_of(name), depth),
                    *tasks,
                    f"{solved / episodes:.0%} ({low:.0%}-{high:.0%})",
                    f"{np.mean(losses):.4f}" + (f" ±{np.std(losses, ddof=1):.4f}" if len(losses) > 1 else ""),
                    len(done),
                ]
            )
        )
    return "\n".join(lines)


def _rate(runs: Rows) -> float:
    solved, episodes = success(runs)
    return solved / episodes


def _ranks(found: dict[str, Any]) -> str:
    table, rows = ranks(found), _ranked(found)
    columns = list(next(iter(table.values())))
    final = np.array([final_loss(run) for _, run in rows])
    lines = [
        f"## {len(rows)} random masks of {protocol.DEPTHS[0]} blocks: predicted against real damage",
        "",
        (
            "Spearman's correlation of a criterion's predicted damage with the held-out loss before fine-tuning and "
            "after that many steps (scarce, one seed); in brackets 95 % of a bootstrap over the masks. 'New' looked at "
            "the new tasks, 'base' at those of pre-training. Above 0 is right."
        ),
        "",
        *header(["criterion", "data", *(f"{c} steps" if c.isdigit() else c for c in columns)]),
    ]
    for (data, criterion), cells in table.items():
        if data == "base" and criterion == "first":
            continue
        texts = ["{:+.2f} ({:+.2f}, {:+.2f})".format(*cells[column]) for column in columns]
        lines.append(row([criterion, "new" if data == "scarce" else "base", *texts]))
    arms = found["arms"][str(protocol.DEPTHS[0])]
    lines += [
        "",
        (
            f"Held-out loss of these masks after fine-tuning: best {final.min():.4f}, median "
            f"{np.median(final):.4f}, worst {final.max():.4f}. Beside them, with the same seed:"
        ),
        "",
        *header(["arm", "held-out loss", "random masks that are better"]),
    ]
    seen: dict[str, list[str]] = {}
    for arm, name in arms.items():
        seen.setdefault(name, []).append(arm)
    first = {r["name"]: r for r in found["runs"] if (r["regime"], r["seed"]) == ("scarce", protocol.SEEDS[0])}
    for name in sorted((n for n in seen if n in first), key=lambda n: final_loss(first[n])):
        loss = final_loss(first[name])
        lines.append(row([", ".join(seen[name]), f"{loss:.4f}", f"{np.mean(final < loss):.0%}"]))
    return "\n".join([*lines, "", "![Random masks](plots/masks.png)"])


def _speed(found: dict[str, Any]) -> str:
    lines = ["## Time", "", *header(["blocks", "parameters", "seconds a step", "latency p50 [ms]", "runs"])]
    for depth, count in found["parameters"].items():
        runs = [run for run in found["runs"] if depth_of(run["name"]) == int(depth)]
        if not runs:
            continue
        latency = [run["latency_p50_ms"] for run in runs if "latency_p50_ms" in run]
        lines.append(
            row(
                [
                    depth,
                    f"{count:,}",
                    f"{np.median([run['seconds_per_step'] for run in runs]):.3f}",
                    f"{np.median(latency):.1f}" if latency else "-",
                    len(runs),
                ]
            )
        )
    return "\n".join(
        [
            *lines,
            "",
            "Medians over runs on one busy core each: the ratio counts, not the seconds.",
            "",
            "![Held-out loss against time](plots/curves.png)",
        ]
    )


def _mask_of(name: str) -> list[int] | None:
    """The blocks that a run's model keeps; None for a model from nothing."""
    if name.startswith("full"):
        return list(range(protocol.DEPTH))
    return None if name.startswith("scratch") else [int(block) for block in name.split("-")]


def depth_of(name: str) -> int:
    """Blocks of a run's model.

    >>> depth_of("00-01-05"), depth_of("scratch-9"), depth_of("full-equal-time")
    (3, 9, 18)
    """
    if name.startswith("full"):
        return protocol.DEPTH
    return int(name.split("-")[1]) if name.startswith("scratch") else len(name.split("-"))
