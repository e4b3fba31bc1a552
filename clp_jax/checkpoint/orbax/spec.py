"""What a checkpoint holds, read from its metadata alone."""

import ast
import contextlib
import functools
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
from etils import epath

from clp_jax.checkpoint import record
from clp_jax.checkpoint.manifest import check_identity
from clp_jax.checkpoint.orbax import chunks
from clp_jax.errors import InputError, blamed_on
from clp_jax.files import check_all_regular, read_json_object
from clp_jax.folders import check_open, files_below
from clp_jax.trees import describe, flatten, unflatten

RECORD_FILE = "clp.json"
POLICY = "policy"
"""Below ``assets``: the files of the policy folder that a run began from."""
_END_BYTES = 4096


@dataclass(frozen=True)
class CheckpointSpec:
    """What a checkpoint holds.

    Attributes:
      path: folder of the params item.
      tree: nested dict of ``jax.ShapeDtypeStruct`` below "params", without openpi's trailing "value".
      value_suffix: whether stored names end in "value" (the form that openpi's training writes).
      assets: the step's ``assets`` folder (norm stats), if there is one.
      plan_record: content of ``clp.json`` in the step folder, if there is one.
    """

    path: epath.Path
    tree: dict[str, Any]
    value_suffix: bool
    assets: epath.Path | None
    plan_record: dict[str, Any] | None

    @functools.cached_property
    def identity(self) -> str:
        """The fingerprint when it was first asked for, compared with the manifest's where there is one.

        Raises:
          InputError: the manifest has another.
        """
        found = fingerprint(self)
        if self.path.name == chunks.PARAMS:
            check_identity(self.path.parent, found)
        return found

    @property
    def folder(self) -> epath.Path | None:
        """Where the files are that say what shapes do not: ``assets/policy`` of a run. openpi's have none."""
        policy = None if self.assets is None else self.assets / POLICY
        return policy if policy is not None and policy.is_dir() else None

    def stored_name(self, path: str) -> str:
        """Returns the name of a leaf in the checkpoint's database.

        Args:
          path: path of a leaf of `tree`, keys joined by "/".
        """
        return ".".join(["params", *path.split("/"), *["value"] * self.value_suffix])


def read_spec(path: str | os.PathLike, *, live: bool = False) -> CheckpointSpec:
    """Reads what a checkpoint holds; no array is read.

    Args:
      path: step folder or its ``params`` child, local or any address etils understands (``gs://...``).
      live: the weights that were being trained, which openpi keeps in ``train_state`` where ``params`` is their moving
        average (EMA).

    Returns:
      Names, shapes and dtypes of the parameters, and what lies beside them.

    Raises:
      InputError: there is no complete checkpoint of parameters at `path`.
    """
    with translated(path):
        item = _find_item(epath.Path(os.fspath(path)).expanduser())
        if live:
            item = _find_live(item)
        return read_item(item, live=live)


def read_item(item: epath.Path, *, live: bool = False) -> CheckpointSpec:
    """As `read_spec` of an item of arrays, whose step may still be without its name.

    Args:
      item: the folder of ``params``, or of ``train_state``.
      live: of the latter, the weights.

    Raises:
      InputError: the item is damaged.
    """
    check_all_regular(item)
    arrays = chunks.stored_arrays(item)
    if live:
        arrays = {name: array for name, array in arrays.items() if name.startswith("params.")}
    keys = _leaf_keys(item, live=live)
    missing = [".".join(k) for k in keys if ".".join(k) not in arrays]
    if missing or len(keys) != len(arrays):
        extra = sorted(arrays.keys() - {".".join(k) for k in keys})
        raise InputError(f"{item} is damaged: listed but not stored {missing}, stored but not listed {extra}")
    value_suffix = all(k[-1] == "value" for k in keys)
    leaves = {}
    for key in keys:
        array = arrays[".".join(key)]
        leaves["/".join(key[1 : -1 if value_suffix else None])] = jax.ShapeDtypeStruct(array.shape, array.dtype)
    step = item.parent if item.name in (chunks.PARAMS, chunks.TRAIN_STATE) else None
    assets = step / "assets" if step is not None and (step / "assets").is_dir() else None
    if assets is not None:
        files_below(assets)  # what is read and copied later is known to lie in the checkpoint
    return CheckpointSpec(item, unflatten(leaves), value_suffix, assets, read_record(item))


def fingerprint(spec: CheckpointSpec) -> str:
    """Returns a short identity of a checkpoint that stays the same when its folder is copied.

    It covers names, shapes and dtypes, and of every file the name, the size and the bytes at both ends: any training
    step changes those. Arrays are not read whole, so it does not prove that a checkpoint is undamaged.

    Args:
      spec: the checkpoint.

    Returns:
      SHA-256 as 64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for path, leaf in sorted(flatten(spec.tree).items()):
        digest.update(f"{spec.stored_name(path)} {describe(leaf)}\n".encode())
    with translated(spec.path):
        for file in files_below(spec.path):
            size = file.stat().length
            digest.update(f"{file.relative_to(spec.path).as_posix()} {size}\n".encode())
            with file.open("rb") as stream:
                digest.update(stream.read(_END_BYTES))
                stream.seek(max(0, size - _END_BYTES))
                digest.update(stream.read(_END_BYTES))
    return digest.hexdigest()


@contextlib.contextmanager
def translated(path: str | os.PathLike) -> Iterator[None]:
    """Turns whatever libraries raise about a bad checkpoint into an `InputError` of one line."""
    with blamed_on(f"the checkpoint {path}", verb="cannot be read, it is damaged or incomplete"):
        yield


def _find_item(path: epath.Path) -> epath.Path:
    """Returns the folder of the params item, given that or the step folder."""
    if not path.exists():
        raise InputError(f"there is no checkpoint at {path}; give a step folder or its params child")
    if any("orbax-checkpoint-tmp" in part for part in path.parts):
        raise InputError(f"{path} is a temporary folder of an unfinished save; give a finished checkpoint")
    item = path / "params" if (path / "params").is_dir() else path
    check_open(item)
    if (item / "_METADATA").exists():
        return item
    if path.is_dir():
        names = sorted(child.name for child in path.iterdir())
        steps = [name for name in names if name.isdigit() and (path / name / "params").is_dir()]
        if steps:
            raise InputError(f"{path} is a training run; give one of its steps, e.g. {path / max(steps, key=int)}")
        if any("orbax-checkpoint-tmp" in name for name in names):
            raise InputError(f"{path} holds only an unfinished save; give a finished checkpoint")
    if any((item / name).exists() for name in ("manifest.ocdbt", "ocdbt.process_0", "_sharding")):
        raise InputError(f"{item} is an incomplete Orbax checkpoint, its _METADATA is missing; copy or save it again")
    raise InputError(f"{path} is not an Orbax checkpoint; give a step folder of openpi or its params child")


def read_record(item: epath.Path) -> dict[str, Any] | None:
    """Returns the content of the ``clp.json`` beside an item of a step; None without."""
    file = item.parent / RECORD_FILE
    if item.name not in (chunks.PARAMS, chunks.TRAIN_STATE) or not file.exists():
        return None
    return record.read_record(file)


def _find_live(item: epath.Path) -> epath.Path:
    """Returns the training state beside a params item."""
    state = item.parent / chunks.TRAIN_STATE
    if item.name != "params" or not (state / "_METADATA").exists():
        raise InputError(
            f"{item} has no {chunks.TRAIN_STATE} beside it, so there are no live weights to read; leave out --raw"
        )
    return state


def _leaf_keys(item: epath.Path, *, live: bool = False) -> list[tuple[str, ...]]:
    """Returns the keys of every parameter from Orbax's ``_METADATA``, outermost first."""
    metadata = read_json_object(item / "_METADATA")
    if metadata.get("use_zarr3"):
        raise InputError(f"{item} is stored as zarr3; save it with Orbax's default, use_zarr3=False")
    entries = {ast.literal_eval(key): entry for key, entry in metadata["tree_metadata"].items()}
    if live:
        entries = {key: entry for key, entry in entries.items() if key[0] == "params" and len(key) > 1}
        if not entries:
            raise InputError(
                f"{item} holds no weights: this run had no EMA, params are its live weights; leave out --raw"
            )
    keys = list(entries)
    groups = sorted({key[0] for key in keys})
    if groups != ["params"]:
        raise InputError(f"{item} holds {groups}, not only 'params'; give the step folder or its params child")
    if any(entry["value_metadata"].get("skip_deserialize") for entry in entries.values()):
        raise InputError(f"{item} holds entries that are no arrays; save only the parameters")
    return keys
