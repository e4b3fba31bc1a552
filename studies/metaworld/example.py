"""The embedded example of ``clp demo``: the trained base in bfloat16, and data of a new task and of its own ones."""

import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np

from clp_jax import example
from clp_jax.checkpoint import read_params, read_spec, write_params
from clp_jax.models.pi0 import CAMERAS
from studies.metaworld import base, protocol

EPISODES = 6
HEALED_TASKS = tuple(task for task in protocol.BASE_TASKS if task != "push")
"""The base's own, but for the one that it never learnt."""
HEALED_EPISODES, HEALED_SEED, OBSERVATIONS = 12, 500, 256


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
    own = work / "data" / "own-tasks"
    base.record_demonstrations(own, HEALED_TASKS, HEALED_EPISODES, seed=HEALED_SEED)
    write_observations(own)


def write_observations(demonstrations: Path) -> None:
    """Write ``base_tasks.npz``: model-ready observations of a data set, with black pictures for absent cameras."""
    arrays = example.observations(OBSERVATIONS, str(demonstrations)).arrays
    picture = arrays["image/base_0_rgb"]
    for camera in CAMERAS:
        arrays.setdefault(f"image/{camera}", np.zeros_like(picture))
        arrays.setdefault(f"image_mask/{camera}", np.zeros(len(picture), bool))
    keys = sorted(set(arrays) - {"noise", "time", "action_is_pad"})
    np.savez_compressed(example.BASE_OBSERVATIONS, **{key: arrays[key] for key in keys})
