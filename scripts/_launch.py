"""What the scripts share: find clp_jax, or say how to install it."""

import sys


def launch(name: str) -> int:
    """Runs ``clp NAME`` with the flags of this process and returns the exit code."""
    try:
        from clp_jax.cli import main
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("clp_jax"):
            raise
        print(
            f"error: clp_jax is not installed for {sys.executable}: run `make install` in the clone and use"
            " `.venv/bin/python`, or run `pip install -e .` there with this Python",
            file=sys.stderr,
        )
        return 2
    return main([name, *sys.argv[1:]])
