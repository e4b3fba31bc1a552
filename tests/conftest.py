"""Before JAX starts: eight CPU devices, shape checks on every call of clp_jax, and skips that cannot hide anything."""

import gc
import importlib
import os
import sys
from pathlib import Path

assert "jax" not in sys.modules, "a pytest plugin imported JAX before its devices were set"
os.environ["JAX_PLATFORMS"] = "cpu"
# The suite waits for compilation, of which LLVM's optimisation is half or more. XLA_FLAGS may ask for another level.
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_backend_optimization_level=0",
        "--xla_cpu_parallel_codegen_split_count=1",
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
    ]
)

# No persistent compilation cache: with JAX 0.5.3 on CPU a cached jax.random.beta gives wrong numbers.

import pytest  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402
from skip_policy import SkipPolicy  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent

# Strict dtype and rank promotion would be welcome, but Flax's own dense and normalisation layers promote both.
install_import_hook("clp_jax", "beartype.beartype")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(SkipPolicy())
    config.pluginmanager.register(ImportsByName())


class ImportsByName:
    """Imports a module of clp_jax by its name before pytest loads its file.

    pytest looks for the name, then imports the package, and where that imports the module loads it again: every class
    would be there twice. (A plugin, for hooks of this file itself are for the files beside it.)
    """

    def pytest_collectstart(self, collector: pytest.Collector) -> None:
        if collector.path.suffix == ".py" and collector.path.is_relative_to(ROOT / "clp_jax"):
            importlib.import_module(
                ".".join(collector.path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            )


def pytest_collection_finish() -> None:
    """Traces are many small objects that live long: Python's own thresholds look through all of them too often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


@pytest.fixture(autouse=True, scope="session")
def _saves_arrays_whole():
    """Orbax has each of several devices with the same array save a part, for which each compiles a slice of each shape.

    The processes that tests start save as users do.
    """
    import jax
    import orbax.checkpoint as ocp

    handler = ocp.type_handlers.get_type_handler(jax.Array)
    assert handler._use_replica_parallel
    handler._use_replica_parallel = False


_MAPS, _ENOUGH = Path("/proc/self/maps"), 30_000
"""A process may have 65,530 mappings of memory (Linux: vm.max_map_count), of which every compiled program holds some;
one more, and XLA's compiler ends the process."""


@pytest.fixture(autouse=True, scope="module")
def _room_for_programs():
    """Forgets compiled programs behind a module where a process that has run many tests holds too many."""
    yield
    if _MAPS.exists() and len(_MAPS.read_bytes().splitlines()) > _ENOUGH:
        import jax

        jax.clear_caches()
