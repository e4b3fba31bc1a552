"""The embedded example of ``clp demo``: the trained base in bfloat16, and a handful of demonstrations of a new task."""

import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np

from clp_jax import example
from clp_jax.checkpoint import read_params, read_spec, write_params
from studies.metaworld import base

EPISODES = 6


def make_example(work: Path) -> None:
    """Write ``clp_jax/example`` anew.

    Args:
      work: the study's folder with the trained base.
    """
    for name in ("checkpoint", "demonstrations"):
        shutil.rmtree(example.FOLDER / name, ignore_errors=True)
    base.record_demonstrations(example.FOLDER / "demonstrations", (example.TASK,), EPISODES)
    spec = read_spec(base.finished(work))
    params = jax.tree.map(lambda x: np.asarray(x).astype(ml_dtypes.bfloat16), read_params(spec))
    write_params(example.FOLDER / "checkpoint", params, assets=spec.assets)
