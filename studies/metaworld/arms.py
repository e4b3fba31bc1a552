"""The arms: checkpoints of one depth that differ in which blocks of the base they keep."""

import json
from pathlib import Path

from clp_jax.commands.analyse import Analyse
from clp_jax.commands.analyse import run as analyse
from clp_jax.commands.prune import Prune
from clp_jax.commands.prune import run as prune
from clp_jax.selection import CRITERIA
from studies.metaworld import protocol
from studies.metaworld.base import write_start

RANDOM = "random"


def make_arms(work: Path, base: Path, depth: int, *, random_masks: int) -> dict[str, Path]:
    """Checkpoints of a depth by arm: one per criterion, random masks, and a model from scratch.

    Args:
      work: the study's folder.
      base: the pre-trained checkpoint.
      depth: blocks that stay.
      random_masks: number of random arms.
    """
    analysis = work / "analysis" / str(depth)
    if not analysis.exists():
        analyse(
            Analyse(
                checkpoint=str(base),
                data=str(work / "data" / "rich"),
                out=str(analysis),
                robot="metaworld",
                action_horizon=protocol.HORIZON,
                max_token_len=protocol.PROMPT_TOKENS,
                max_observations=protocol.CALIBRATION,
                keep_layers=depth,
                criterion="clp",
                compare=tuple(name for name in CRITERIA if name != RANDOM),
            )
        )
    findings = json.loads((analysis / "findings.json").read_text())
    removed = {choice["criterion"]: choice["removed"]["vlm"] for choice in findings["choices"]}
    masks = {name: kept(blocks) for name, blocks in removed.items()}
    masks |= {f"{RANDOM}-{i}": mask for i, mask in enumerate(protocol.random_masks(depth, random_masks))}
    arms = {}
    for name, mask in masks.items():
        arms[name] = folder = work / "arms" / str(depth) / name
        if not folder.exists():
            prune(Prune(checkpoint=str(base), keep=",".join(map(str, mask)), out=str(folder)))
    arms["scratch"] = folder = work / "arms" / str(depth) / "scratch"
    if not folder.exists():
        write_start(folder, protocol.architecture(depth), seed=1)
    return arms


def kept(removed: list[int]) -> tuple[int, ...]:
    """The blocks of the base that stay."""
    return tuple(block for block in range(protocol.DEPTH) if block not in removed)
