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

Mask = tuple[int, ...]
"""Blocks that stay."""


def masks_of_criteria(work: Path, base: Path, depth: int, data: str) -> dict[str, Mask]:
    """What every criterion keeps of the base, by its name.

    Args:
      work: the study's folder.
      base: the pre-trained checkpoint.
      depth: blocks that stay.
      data: on which demonstrations the criteria look: "scarce", of the new tasks, or "base", of those it knows.
    """
    folder = analysis_folder(work, depth, data)
    if not folder.exists():
        analyse(
            Analyse(
                checkpoint=str(base),
                data=(str(work / "data" / data),),
                out=str(folder),
                robot="metaworld",
                norm_stats=None,
                action_horizon=protocol.HORIZON,
                max_token_len=protocol.PROMPT_TOKENS,
                max_observations=protocol.CALIBRATION,
                keep_layers=(str(depth),),
                criterion="clp",
                compare=tuple(name for name in CRITERIA if name not in ("random", "healed")),
            )
        )
    findings = json.loads((folder / "findings.json").read_text())
    return {choice["criterion"]: complement(choice["removed"]["vlm"]) for choice in findings["choices"]}


def analysis_folder(work: Path, depth: int, data: str) -> Path:
    """Where the analysis for a depth is."""
    return work / "analysis" / f"{depth}-{data}"


def complement(blocks: Mask | list[int]) -> Mask:
    """The other blocks of the base."""
    return tuple(block for block in range(protocol.DEPTH) if block not in blocks)


def make_arm(work: Path, base: Path, mask: Mask) -> Path:
    """The base with these blocks; the base itself for all of them."""
    if len(mask) == protocol.DEPTH:
        return base
    folder = work / "arms" / name_of(mask)
    if not folder.exists():
        prune(Prune(checkpoint=str(base), keep=(",".join(map(str, mask)),), out=str(folder)))
    return folder


def make_scratch(work: Path, depth: int) -> Path:
    """A random model of a depth, initialised as the base was."""
    folder = work / "arms" / f"scratch-{depth}"
    if not folder.exists():
        write_start(folder, protocol.architecture(depth), seed=1)
    return folder


def name_of(mask: Mask) -> str:
    """Of a mask's folders: two criteria that choose the same blocks share them.

    >>> name_of((0, 1, 2, 5, 17))
    '00-01-02-05-17'
    """
    return "-".join(f"{block:02}" for block in mask)
