"""``--json``: a command's result as one JSON value, and nothing else, on standard output."""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from typing import Any


def print_json(value: Any) -> None:
    """Print a JSON value for programs; a number that is not finite, for which JSON has no word, as null."""
    value = json.loads(json.dumps(value), parse_constant=lambda _: None)
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def standard_output_kept(*, for_json: bool) -> Iterator[None]:
    """Send to standard error what anything in the block, libraries in C and child processes too, writes to output.

    Args:
      for_json: whether a JSON value is to come; else nothing is done.
    """
    if not for_json:
        yield
        return
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
