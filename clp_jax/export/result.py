"""What every exporter gets and gives, and ``export.json``, its record."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from clp_jax.errors import InputError
from clp_jax.export.weights import Weights
from clp_jax.models import Lengths
from clp_jax.processing.conventions import Conventions
from clp_jax.provenance import versions

EXPORT_FILE = "export.json"
TOLERANCE = 1e-3
"""Largest difference of float32 actions between frameworks that passes. openpi's PyTorch computes the time embedding in
float64, JAX in float32, which alone makes up to 2e-4; with the same embedding, as our loader for lerobot has, 2e-6 is
left. A wrong layer or axis gives 0.01."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What weights cannot tell.

    Attributes:
      lengths: actions of a chunk and prompt tokens, padding included.
      num_steps: Euler steps.
      asset_id: which norm stats; None where there is one.
      batch_size: of a StableHLO program; None for any.
      platforms: a StableHLO program runs on.
      run: also run the models and compare what they answer, not only the bytes.
      conventions: between the robot and the model; None where nobody said.
      assumed: which of the lengths neither the user nor the checkpoint said, in a sentence; None if all were said.
    """

    lengths: Lengths
    num_steps: int = 10
    asset_id: str | None = None
    batch_size: int | None = None
    platforms: tuple[str, ...] = ("cpu", "cuda", "tpu")
    run: bool = True
    conventions: Conventions | None = None
    assumed: str | None = None


@dataclasses.dataclass(frozen=True)
class Check:
    """What was compared.

    Attributes:
      weights_equal: parameters that were read back from the export and are what was to be written.
      largest_difference: of the outputs of the exported and of the JAX model; None if they were not compared.
      what: which outputs, in which code.
      missing: why they were not compared, and what to do; None if they were.
      by: how the parameters were compared.
    """

    weights_equal: int
    largest_difference: float | None
    what: str
    missing: str | None = None
    by: Literal["bit for bit", "chunk by chunk by CRC-32"] = "bit for bit"

    def __str__(self) -> str:
        return f"{self.weights_equal} parameters read back, {self.by} what was to be written."


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Writes JSON as people read it."""
    file.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


def export_record(weights: Weights, target: str, options: Options, check: Check | None) -> dict[str, Any]:
    """Content of ``export.json``.

    Args:
      weights: what was written.
      target: of the export.
      options: what weights cannot tell.
      check: what was compared, None before that.
    """
    return {
        "schema": 1,
        "target": target,
        "architecture": dataclasses.asdict(weights.architecture),
        "dtype": sorted({leaf.dtype.name for leaf in weights.leaves.values()}),
        "options": dataclasses.asdict(options) | {"lengths": options.lengths._asdict()},
        "source": str(weights.spec.path),
        "lora_merged": weights.merge and weights.architecture != weights.source,
        "check": None if check is None else dataclasses.asdict(check),
        "versions": versions(),
    }


def run_check(script: Path, *, missing: str | None) -> tuple[float | None, str | None]:
    """Runs the check of an exported folder in a process of its own: torch and JAX never share one.

    Args:
      script: the file in the export that loads it; run with ``--json``, it prints the largest difference, or null
        and as "missing" what it could not get at.
      missing: what to say if the comparison cannot be made here, None if it can.

    Returns:
      The largest difference and None, or None and why there is none.

    Raises:
      InputError: the check failed.
    """
    if missing is not None:
        return None, missing
    done = subprocess.run([sys.executable, str(script), "--json"], capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"largest_difference"')]
    if done.returncode or not lines:
        reason = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        raise InputError(f"the exported model could not be run ({reason}); nothing was written.")
    answer = json.loads(lines[-1])
    return answer["largest_difference"], answer.get("missing")


def check_tolerance(difference: float | None, tolerance: float = TOLERANCE) -> None:
    """Raises unless a difference is small.

    Raises:
      InputError: it is not.
    """
    if difference is not None and not difference <= tolerance:
        raise InputError(
            f"the exported model's answers differ from the JAX model's by {difference:.1e}, more than {tolerance:.0e}: "
            "nothing was written; please report this."
        )


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays are equal in shape, dtype and every bit."""
    bits_a, bits_b = (np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in (a, b))
    return a.shape == b.shape and a.dtype == b.dtype and np.array_equal(bits_a, bits_b)
