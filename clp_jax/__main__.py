"""``python -m clp_jax`` is ``clp``."""

from clp_jax.cli import program

program()
