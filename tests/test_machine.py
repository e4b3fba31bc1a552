"""What the machine lacks is one line and exit code 1, whoever says it and in whatever way."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from clp_jax.machine import failure_of

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "clp_jax" / "example" / "checkpoint"


def run(platform: str, *words: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"JAX_PLATFORMS": platform}
    words = (sys.executable, "-m", "clp_jax", *words)
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


PLATFORM = "no_such_platform"


def refused(done: subprocess.CompletedProcess) -> None:
    assert (done.returncode, "Traceback" in done.stderr) == (1, False), done.stderr
    assert done.stderr.strip().split("\n")[-1].startswith(f"error: JAX finds no device of JAX_PLATFORMS={PLATFORM}: ")


@pytest.mark.slow
def test_a_platform_without_a_device_is_one_line(tmp_path):
    out = tmp_path / "out"
    refused(run(PLATFORM, "export", "--checkpoint", str(EXAMPLE), "--to", "stablehlo", "--out", str(out)))
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_prune_needs_no_device(tmp_path):
    done = run(PLATFORM, "prune", "--checkpoint", str(EXAMPLE), "--keep", "0,1", "--out", str(tmp_path / "p"))
    if jax.__version_info__ > (0, 5, 3):
        assert done.returncode == 0, done.stderr
    else:
        refused(done)  # there the model asks whether a conditional pays on the device


def test_too_little_memory_is_one_line():
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        jnp.ones((2**20, 2**20), "float32").block_until_ready()
    assert "the device has not enough memory, take smaller batches" in failure_of(caught.value)
    assert failure_of(MemoryError("Unable to allocate 8 TiB")) == "there is not enough memory: Unable to allocate 8 TiB"


def test_a_bug_is_none_of_these():
    assert failure_of(AssertionError()) is None
    assert failure_of(ValueError("ours")) is None
