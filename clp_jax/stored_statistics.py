"""Statistics for normalisation beside a checkpoint's weights: which there are, of what, with how many dimensions."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from clp_jax.checkpoint import FolderSpec, Spec
from clp_jax.checkpoint.safetensors.header import read_shard
from clp_jax.errors import InputError
from clp_jax.folders import files_below, is_remote
from clp_jax.models import family_of_kind, family_of_tree
from clp_jax.processing import norm_stats


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Statistics for normalisation.

    Attributes:
      file: path below the checkpoint.
      dimensions: per name.
      problem: why they could not be read; None if they could.
    """

    file: str
    dimensions: dict[str, int]
    problem: str | None = None


def statistics_of(spec: Spec) -> Iterator[Statistics]:
    """Finds openpi's ``norm_stats.json``, the states of a policy's processors, and what else the family has.

    Args:
      spec: the checkpoint.

    Yields:
      One entry a file, sorted by path; a file that cannot be read with its problem.
    """
    if isinstance(spec, FolderSpec):
        files = {name: epath.Path(place) for name, place in spec.others.items()}
    else:
        found = [] if spec.assets is None else files_below(spec.assets)
        files = {str(file.relative_to(spec.path.parent)): file for file in found}
    for name, file in sorted(files.items()):
        if file.name != norm_stats.FILE and file.suffix != ".safetensors":
            continue
        try:
            read = _of_norm_stats if file.name == norm_stats.FILE else _of_processor
            if dimensions := read(file):
                yield Statistics(name, dimensions)
        except InputError as error:
            yield Statistics(name, {}, str(error))
    yield from _of_family(spec)


def _of_family(spec: Spec) -> Iterator[Statistics]:
    """Statistics that only the family knows to read, one entry for each robot that they name."""
    if spec.folder is None:
        return
    family = family_of_kind(spec.kind) if isinstance(spec, FolderSpec) else family_of_tree(spec.tree)
    try:
        for name, stats in family.own_statistics(spec.folder).items():
            yield Statistics(name, {vector: len(entry.mean) for vector, entry in stats.items()})
    except InputError as error:
        yield Statistics("of the checkpoint", {}, str(error))


def _of_norm_stats(file: epath.Path) -> dict[str, int]:
    return {name: len(entry.mean) for name, entry in norm_stats.load(file).items()}


def _of_processor(file: epath.Path) -> dict[str, int]:
    """Dimensions of the means in a processor's state; empty for a file of something else."""
    if is_remote(file):
        raise InputError("is remote: copy it to a local disk to read it")
    tensors = read_shard(Path(file), file.name).tensors
    names = dict.fromkeys(name.rpartition(".") for name in tensors)
    means = [what for what, _, last in names if last in ("mean", "min") and what]
    return {
        what: tensor.shape[-1]
        for what in dict.fromkeys(means)
        for tensor in [tensors.get(f"{what}.mean") or tensors[f"{what}.min"]]
        if tensor.shape
    }
