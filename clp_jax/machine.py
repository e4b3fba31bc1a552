"""Failures of the machine, told from bugs of ours: its files, its network, its memory, and JAX's devices."""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def is_full(error: OSError) -> bool:
    """Whether the disk, or what one user may have of it, is full."""
    return error.errno in _FULL


@contextlib.contextmanager
def full_disk_named(
    path: str | os.PathLike[str], *, instead_of: str | os.PathLike[str] | None = None
) -> Iterator[None]:
    """Says of a full disk what was written to it, which the system does not tell where a file is open already.

    Args:
      path: what is written.
      instead_of: a temporary folder that becomes it; nobody will find what lies there.

    Raises:
      OSError: the same, with the path.
    """
    try:
        yield
    except OSError as error:
        temporary = instead_of is not None and f"{error.filename}/".startswith(f"{os.fspath(instead_of)}/")
        if not is_full(error) or not (error.filename is None or temporary):
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def failure_of(error: Exception) -> str | None:
    """What failed, in one line.

    Args:
      error: what nobody else knew an answer to.

    Returns:
      A sentence, or None if the error is a bug of ours, which deserves its traceback.

    >>> failure_of(PermissionError(13, "Permission denied", "out")), failure_of(ZeroDivisionError())
    ('out: Permission denied', None)
    """
    if isinstance(error, OSError):
        text = error.strerror or str(error) or type(error).__name__
        return " ".join((f"{error.filename}: {text}" if error.filename else text).split())
    if isinstance(error, MemoryError):
        return f"there is not enough memory: {error}" if str(error) else "there is not enough memory"
    return _of_jax(error) if "jax" in sys.modules else None


def _of_jax(error: Exception) -> str | None:
    import jax

    if isinstance(error, jax.errors.JaxRuntimeError):
        text = _first_line(error)
        if "RESOURCE_EXHAUSTED" in text:
            return f"the device has not enough memory, take smaller batches or more devices (--fsdp-devices): {text}"
        return f"the device failed: {text}"
    return _without_devices()


def _without_devices() -> str | None:
    """Why JAX finds no device. It says so in many ways, assertions among them, and does so again when it is asked."""
    import jax

    try:
        jax.devices()
    except Exception as error:  # noqa: BLE001
        told = os.environ.get("JAX_PLATFORMS") or jax.config.jax_platforms
        reason = _first_line(error) or "there is none, or no plugin for it"
        return f"JAX finds no device of JAX_PLATFORMS={told}: {reason}; unset it, or name another platform"
    return None


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")
