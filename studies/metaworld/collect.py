"""From the folders of the runs to one ``results.json``: plain numbers, from which `page` makes every table and plot."""

import dataclasses
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from clp_jax.analysis import Analysis, EvidenceOptions, loss_of
from clp_jax.commands.analyse import Analyse, load
from clp_jax.flops import parameter_count
from clp_jax.sensitivity import make_group_loss
from studies.metaworld import damage, jobs, protocol, tuned
from studies.metaworld.arms import analysis_folder, complement, name_of
from studies.metaworld.base import finished


def collect(work: Path, base: Path, out: Path) -> None:
    """Write what is finished of the study.

    Args:
      work: the study's folder.
      base: the pre-trained checkpoint.
      out: JSON file to write.
    """
    depths = [d for d in protocol.DEPTHS if all(analysis_folder(work, d, data).exists() for data in ("scarce", "base"))]
    result = {
        "conditions": _conditions(),
        "parameters": {depth: parameter_count(protocol.architecture(depth)) for depth in (protocol.DEPTH, *depths)},
        "pre_training": _log_of(work / "base" / "metrics.jsonl"),
        "arms": {depth: _arms(work, base, depth) for depth in depths},
        "ratings": {data: _ratings(work, data) for data in ("scarce", "base")},
        "runs": _runs(work / "runs"),
        "masks": _masks(work, base),
    }
    before = json.loads(out.read_text()) if out.exists() else {"screen": {}}
    result |= {key: before[key] for key in ("screen", "tuned") if key in before}
    out.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")


def collect_screen(work: Path, out: Path) -> None:
    """Put the screening's counts into the results, which need not have been made in the same folder.

    Counts that the folder lacks stay: "float32", the base as it was trained, was counted before the others, which are
    of the base in bfloat16 that is committed.
    """
    result = json.loads(out.read_text()) if out.exists() else {}
    screen = result.get("screen", {}) | _screen(work)
    out.write_text(json.dumps(result | {"screen": screen}, indent=1, allow_nan=False) + "\n")


def _conditions() -> dict[str, Any]:
    return {
        "machine": f"{os.cpu_count()} CPU cores ({platform.machine()}), no accelerator",
        "packages": {name: version(name) for name in ("jax", "flax", "optax", "metaworld", "mujoco", "numpy")},
        "python": platform.python_version(),
    }


def _log_of(file: Path) -> dict[str, dict[int, float]]:
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return {key: {x["step"]: x[key] for x in lines if key in x} for key in ("loss", "held_out_loss")}


def _arms(work: Path, base: Path, depth: int) -> dict[str, str]:
    """Arm to the name of its runs: arms that keep the same blocks share them."""
    names = {arm: name_of(mask) for arm, mask in jobs.masks_by_arm(work, base, depth).items()}
    return {jobs.FULL: jobs.FULL} | names | {jobs.SCRATCH: f"{jobs.SCRATCH}-{depth}"}


def _ratings(work: Path, data: str) -> dict[str, Any]:
    analysis = Analysis.load(analysis_folder(work, protocol.DEPTHS[0], data) / "similarity.npz")
    return {
        name: damage.measured(analysis.evidence(group, EvidenceOptions()))
        for name, group in {"vlm": ("vlm",), "action": ("action",), "both": damage.GROUP}.items()
    }


def _runs(folder: Path) -> list[dict[str, Any]]:
    """Finished runs; the second round's folders begin with the learning rate."""
    found = []
    for curve in sorted(folder.glob("*/*/*/curve.json")):
        regime, name, last = curve.parent.relative_to(folder).parts
        rate, _, seed = last.rpartition("-")
        run: dict[str, Any] = {"regime": regime, "name": name, "seed": int(seed)}
        run |= ({"rate": float(rate)} if rate else {}) | json.loads(curve.read_text())
        results = curve.parent / "rollouts" / "results.json"
        if results.exists():
            run |= _counts(json.loads(results.read_text()))
        found.append(run)
    return found


def _counts(results: dict[str, Any]) -> dict[str, Any]:
    """Per task the numbers of the solved episodes, so that arms can be compared episode by episode."""
    return {
        "solved": {
            task: [episode["number"] for episode in row["per_episode"] if episode["success"]]
            for task, row in results["tasks"].items()
        },
        "episodes": next(iter(results["tasks"].values()))["episodes"],
        "steps_to_success": {task: row["steps_to_success"] for task, row in results["tasks"].items()},
        "latency_p50_ms": results["latency"]["p50_ms"],
    }


def _screen(work: Path) -> dict[str, Any]:
    folder = work / "screen"
    files = {name: folder / name / "results.json" for name in ("as-is", "blank", "new-tasks")}
    screen = {name: _counts(json.loads(file.read_text())) for name, file in files.items() if file.exists()}
    wrong = {task: folder / "wrong" / task / "results.json" for task in protocol.WRONG_TASK}
    rows = [_counts(json.loads(file.read_text())) for file in wrong.values() if file.exists()]
    if rows:
        solved = {task: numbers for row in rows for task, numbers in row["solved"].items()}
        screen["wrong"] = {"solved": solved, "episodes": rows[0]["episodes"]}
    return screen


def _masks(work: Path, base: Path) -> list[dict[str, Any]]:
    """The random masks at the main depth: what each criterion predicts, what the base loses without those blocks."""
    depth = protocol.DEPTHS[0]
    masks = protocol.random_masks(depth, protocol.RANDOM_MASKS)
    rows: list[dict[str, Any]] = [{"name": name_of(mask), "predicted": {}, "zero_shot": {}} for mask in masks]
    for data in ("scarce", "base"):
        analysis = Analysis.load(analysis_folder(work, depth, data) / "similarity.npz")
        flags = json.loads((analysis_folder(work, depth, data) / "config.json").read_text())
        model, calibration, held = load(str(base), flags["data"], Analyse(**flags | {"compare": ()}))
        assert held is not None
        on_calibration, on_held = (make_group_loss(damage.GROUP, loss_of(model, x)) for x in (calibration, held))
        predict = damage.predictions(analysis, lambda gone, loss=on_calibration: loss(_gates(gone)))
        for row, mask in zip(rows, masks, strict=True):
            removed = list(complement(mask))
            row["predicted"][data] = {name: cost(removed) for name, cost in predict.items()}
            row["zero_shot"][data] = on_held(_gates(removed))
    return rows


def _gates(removed: list[int]) -> np.ndarray:
    return 1.0 - np.isin(np.arange(protocol.DEPTH), removed)


def collect_tuned(work: Path, base: Path, out: Path) -> None:
    """Put what is finished of the second round into the results, which need not have been made in the same folder.

    Runs that the folder lacks stay.

    Args:
      work: the study's folder.
      base: from which the arms were cut.
      out: JSON file to change.
    """
    result = json.loads(out.read_text())
    arms = {
        depth: [dataclasses.asdict(arm) for arm in tuned.arms(work, base, depth)] for depth in protocol.TUNED_DEPTHS
    }
    runs = {_key(run): run for run in [*result.get("tuned", {"runs": []})["runs"], *_runs(work / "tuned")]}
    found = {
        "conditions": _conditions(),
        "base": "float32" if base == finished(work) else "bfloat16",
        "step_seconds": tuned.step_seconds(work, base),
        "arms": arms,
        "runs": [runs[key] for key in sorted(runs)],
    }
    out.write_text(json.dumps(result | {"tuned": found}, indent=1, allow_nan=False) + "\n")


def _key(run: dict[str, Any]) -> tuple[str, str, str]:
    """The order of the runs' folders."""
    return run["regime"], run["name"], f"{run['rate']:g}-{run['seed']}"
