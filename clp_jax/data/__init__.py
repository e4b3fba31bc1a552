"""Observations for the models: from a ``.npz`` of model-ready arrays or a LeRobot data set, to batches.

calibration   model-ready observations in host memory: ``.npz``, hold-out, groups
video         frames of video files by time
lerobot       LeRobot v2.0, v2.1 and v3.0 folders: tables, episodes, tasks, frames
loader        shuffled, resumable, sharded batches
recording     a data set seen as a robot; recordings: several of one robot
training_data observations on demand, of one data set or a mixture
dataset       all of it behind one function, `open_dataset`
"""

from clp_jax.data.calibration import (
    Arrangement,
    CalibrationData,
    arrange,
    hold_out,
    load_npz,
)
from clp_jax.data.dataset import open_dataset
from clp_jax.data.training_data import TrainingData

__all__ = [
    "Arrangement",
    "CalibrationData",
    "TrainingData",
    "arrange",
    "hold_out",
    "load_npz",
    "open_dataset",
]
