"""Carry a checkpoint, pruned or not, to where it runs: openpi (JAX, PyTorch), lerobot, Isaac-GR00T, or nothing but JAX.

Every target is a module with ``write`` and ``check``. An export is read back and compared before it gets its name: the
weights bit for bit (for openpi by the CRC-32 of every chunk), and the answers of the exported model wherever its code
is installed.
"""

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from clp_jax.checkpoint import FolderSpec, Spec
from clp_jax.checkpoint.carrying import check_room, side_files
from clp_jax.checkpoint.opening import unchanged
from clp_jax.errors import InputError
from clp_jax.export import groot, lerobot, openpi, pytorch, stablehlo
from clp_jax.export.model_card import model_card
from clp_jax.export.result import EXPORT_FILE, Check, Options, export_record, write_json
from clp_jax.export.weights import Weights
from clp_jax.folders import is_remote
from clp_jax.models import family_of
from clp_jax.outputs import staged
from clp_jax.processing.conventions import Conventions

Target = Literal["openpi", "openpi-pytorch", "lerobot", "groot", "stablehlo"]


class _Exporter(NamedTuple):
    write: Callable[[Weights, Path, Options], None]
    check: Callable[[Weights, Path, Options], Check]
    load: Callable[[Weights], str]
    unlike: Callable[[Weights, Conventions], tuple[str, ...]] = lambda *_: ()


_EXPORTERS: Mapping[Target, _Exporter] = {
    "openpi": _Exporter(openpi.write, openpi.check, lambda _: openpi.LOAD),
    "openpi-pytorch": _Exporter(pytorch.write, pytorch.check, lambda _: pytorch.LOAD),
    "lerobot": _Exporter(
        lerobot.write, lerobot.check, lambda weights: family_of(weights.architecture).LEROBOT.LOAD, lerobot.unlike
    ),
    "groot": _Exporter(
        groot.write, groot.check, lambda weights: family_of(weights.architecture).NVIDIA.LOAD, groot.unlike
    ),
    "stablehlo": _Exporter(stablehlo.write, stablehlo.check, lambda _: stablehlo.LOAD),
}


def export_checkpoint(
    weights: Weights, target: Target, out: str | os.PathLike[str], options: Options, *, overwrite: bool = False
) -> Check:
    """Write an export, complete or not at all.

    Args:
      weights: what to write.
      target: for whom.
      out: folder to create, on this machine.
      options: what weights cannot tell.
      overwrite: replace ``out``.

    Returns:
      What was compared, which is also in ``export.json`` and in the card.

    Raises:
      InputError: the target has no such model, the checkpoint lacks something, or the comparison failed.
      OSError: the disk has no room.
    """
    if is_remote(out):
        raise InputError(f"{out} is no folder of this machine; export to one, then copy it there.")
    check_target(weights, target)
    if target == "stablehlo":
        stablehlo.check_possible(weights.architecture, options)
    # What openpi reads is compressed: nobody knows before how far.
    weights_bytes = (
        0 if target == "openpi" else sum(math.prod(x.shape) * x.dtype.itemsize for x in weights.leaves.values())
    )
    check_room(out, _carried(weights.spec, target).values(), weights=weights_bytes)
    exporter = _EXPORTERS[target]
    with (
        staged(out, by="clp export", overwrite=overwrite, sources=[weights.source_folder]) as folder,
        unchanged(weights.spec),
    ):
        exporter.write(weights, Path(folder), options)
        check = exporter.check(weights, Path(folder), options)
        unlike = () if options.conventions is None else exporter.unlike(weights, options.conventions)
        card = model_card(weights, target, options, check, load=exporter.load(weights), unlike=unlike)
        (Path(folder) / "README.md").write_text(card)
        write_json(Path(folder) / EXPORT_FILE, export_record(weights, target, options, check))
    return check


def unlike_target(weights: Weights, target: Target, conventions: Conventions) -> tuple[str, ...]:
    """What the conventions ask for and the code that the export is for does not do or have, one sentence each."""
    return _EXPORTERS[target].unlike(weights, conventions)


def _carried(spec: Spec, target: Target) -> Mapping[str, str | os.PathLike[str]]:
    """The other files that go along as they are; what lies in the folders of upstreams is their own."""
    if target in ("lerobot", "groot"):
        return {}
    return spec.others if isinstance(spec, FolderSpec) else side_files(spec.assets)


def check_target(weights: Weights, target: Target) -> None:
    """Refuses a target whose code has no such model.

    Raises:
      InputError: names the targets that there are.
    """
    architecture = weights.architecture
    family = family_of(architecture)
    if target not in family.TARGETS:
        title, targets = family.TITLES[architecture.kind], " or ".join(f"--to {name}" for name in family.TARGETS)
        raise InputError(f"{target} has no {title} to export to; use {targets}.")
    if target == "openpi-pytorch":
        pytorch.check_architecture(architecture)
    reason, record = None, weights.spec.plan_record
    if target == "lerobot":
        reason = family.LEROBOT.why_not(architecture, record)
    elif target == "groot":
        reason = family.NVIDIA.why_not(architecture, record)
    if reason is not None:
        raise InputError(reason)


__all__ = ["Check", "Options", "Target", "Weights", "check_target", "export_checkpoint", "unlike_target"]
