"""Every stored form behind the same few functions: openpi's Orbax items, and folders of safetensors files."""

import contextlib
import os
from collections.abc import Iterator

from clp_jax.checkpoint.orbax import spec as orbax
from clp_jax.checkpoint.orbax.spec import CheckpointSpec
from clp_jax.checkpoint.safetensors.folder import (
    FolderSpec,
    check_stamps,
    fingerprint_folder,
    is_safetensors_folder,
    read_folder,
)
from clp_jax.errors import InputError
from clp_jax.folders import check_open

Spec = CheckpointSpec | FolderSpec


def read_spec(path: str | os.PathLike, *, live: bool = False) -> Spec:
    """Reads what a checkpoint holds; no array is read. The form is recognised by what lies there.

    Args:
      path: step folder of openpi or of a run of ours, or its ``params`` child, local or any address etils understands
        (``gs://...``); or a local folder of safetensors files with a ``config.json``.
      live: the weights that were being trained, which openpi keeps in ``train_state`` where ``params`` is their moving
        average (EMA).

    Raises:
      InputError: there is no complete checkpoint at `path`.
    """
    check_open(path)
    if not is_safetensors_folder(path):
        return orbax.read_spec(path, live=live)
    if live:
        raise InputError(f"{os.fspath(path)} holds one set of weights; leave out --raw.")
    return read_folder(path)


def fingerprint(spec: Spec) -> str:
    """Returns a short identity of a checkpoint that stays the same when its folder is copied: SHA-256 in hexadecimal.

    Args:
      spec: the checkpoint; its files are read, but only in part, and once for all calls.

    Raises:
      InputError: the checkpoint's manifest says that something else was written there.
    """
    return spec.identity


@contextlib.contextmanager
def unchanged(spec: Spec) -> Iterator[None]:
    """Proves that a checkpoint is the same at the end of the block as when its fingerprint was first asked for.

    Args:
      spec: the checkpoint that the block reads.

    Raises:
      InputError: it was replaced or written to meanwhile, so that what was read may be of two checkpoints.
    """
    before = fingerprint(spec)
    yield
    if isinstance(spec, FolderSpec):
        check_stamps(spec)
        now, record = fingerprint_folder(spec), spec.plan_record
    else:
        now, record = orbax.fingerprint(spec), orbax.read_record(spec.path)
    if (now, record) != (before, spec.plan_record):
        raise InputError(
            f"{spec.path} changed while it was read: it was replaced or written to; let that end, then run this again"
        )
