"""Locks of the kernel, which releases them however a process ends."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from clp_jax.errors import InputError


@contextlib.contextmanager
def locked(path: str | os.PathLike[str], *, wait: bool = True) -> Iterator[bool]:
    """Holds an exclusive lock on a folder or file.

    Args:
      path: what exists and can be opened.
      wait: until whoever has the lock releases it.

    Yields:
      Whether there is a lock: some network file systems have none for folders, and without `wait` another process may
      hold it.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            alone = True
        except OSError:
            alone = False
        yield alone
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def alone(file: Path, what: str) -> Iterator[None]:
    """Lets one process at a time into the block, on any file system that has locks of files (NFS has).

    Args:
      file: to lock; exists and is never replaced.
      what: what only one process may do, for the message.

    Raises:
      InputError: another process is in the block.
    """
    with file.open("r+b") as stream:  # NFS locks only what is open for writing
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another process is {what}; wait until it ends, or choose another --out") from None
        except OSError:
            pass  # a file system without locks
        yield
