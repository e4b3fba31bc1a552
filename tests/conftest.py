"""Before JAX starts: eight CPU devices, shape checks on every call of clp_jax, and skips that cannot hide anything."""

import os
import platform
import sys
from pathlib import Path

assert "jax" not in sys.modules, "a pytest plugin imported JAX before its devices were set"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

# Compiling is most of a test run. What one worker or run has compiled the next one loads: bit for bit the same program,
# so a folder for each machine, whose processor it was made for.
COMPILED = Path(__file__).parent.parent / ".pytest_cache" / "d" / f"jax-{platform.node()}"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(COMPILED))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

import pytest  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402
from skip_policy import SkipPolicy  # noqa: E402

# Strict dtype and rank promotion would be welcome, but Flax's own dense and normalisation layers promote both.
install_import_hook("clp_jax", "beartype.beartype")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(SkipPolicy())
