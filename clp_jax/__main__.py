"""``python -m clp_jax`` is ``clp``."""

import sys

from clp_jax.cli import main

sys.exit(main())
