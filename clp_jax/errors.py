"""The one exception that a user's mistake raises, and the border at which everything else becomes one."""

import contextlib
import json
import os
from collections.abc import Iterator


class InputError(ValueError):
    """Something the user gave cannot be used: a path, a checkpoint, a plan, a data file, a flag.

    The message is one sentence that says what is wrong and what to do about it. Commands print it as
    ``error: <message>`` and exit with code 2; ``--debug`` shows the traceback instead.
    """


@contextlib.contextmanager
def blamed_on(
    what: str | os.PathLike[str], todo: str = "copy or save it again", *, verb: str = "cannot be read"
) -> Iterator[None]:
    """A border between what a user gave and us: whatever goes wrong inside becomes one line about it.

    Libraries raise almost anything about a damaged file, so there is no list of exceptions. Only what interprets the
    one thing belongs inside: a bug of ours would be blamed on it too (``--debug`` shows where).

    Args:
      what: the file, for the message.
      todo: what the user can do.
      verb: what is the matter with it.

    Raises:
      InputError: instead of every other exception; an `InputError` passes as it is.

    >>> with blamed_on("plan.json", "write it again"):
    ...     {}["towers"]
    Traceback (most recent call last):
    clp_jax.errors.InputError: plan.json cannot be read: it lacks 'towers'; write it again
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{os.fspath(what)} {verb}: {reason_of(error)}; {todo}") from error


def reason_of(error: Exception) -> str:
    """What an exception says, in one line without its type.

    >>> reason_of(KeyError("mean")), reason_of(RecursionError("maximum recursion depth exceeded"))
    ("it lacks 'mean'", 'it is nested too deeply')
    """
    if isinstance(error, KeyError) and error.args and isinstance(error.args[0], str) and " " not in error.args[0]:
        return f"it lacks {error.args[0]!r}"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, MemoryError):
        return "it needs more memory than there is"
    if isinstance(error, json.JSONDecodeError):
        return f"line {error.lineno}, column {error.colno}: {error.msg}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).split("[source locations=")[0].strip().split("\n")  # tensorstore adds a list of places
    return lines[0].strip().rstrip(".;") or type(error).__name__
