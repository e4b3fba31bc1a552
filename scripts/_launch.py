"""What the scripts share: find clp_jax, or say how to install it."""

import sys
from typing import NoReturn


def launch(name: str) -> NoReturn:
    """Runs ``clp NAME`` with the flags of this process, and ends it."""
    try:
        from clp_jax.cli import program
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("clp_jax"):
            raise
        print(
            f"error: clp_jax is not installed for {sys.executable}: run `make install` in the clone and use"
            " `.venv/bin/python`, or run `pip install -e .` there with this Python",
            file=sys.stderr,
        )
        sys.exit(2)
    program([name, *sys.argv[1:]])
