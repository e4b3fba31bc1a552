"""Observations for the models: from a ``.npz`` of model-ready arrays or a LeRobot data set, to batches.

calibration   model-ready observations in host memory: ``.npz``, hold-out, groups
video         frames of video files by time
lerobot       LeRobot v2.0, v2.1 and v3.0 folders: tables, episodes, tasks, frames
robots        which column goes where, per robot
transforms    the arithmetic between a robot and a model, forth and back
tokenizer     prompts to token ids
norm_stats    statistics for normalisation, in openpi's file format
chain         robot values to model inputs, and model outputs to robot actions
loader        shuffled, resumable, sharded batches
dataset       all of it behind one function, `open_dataset`
"""

from clp_jax.data.calibration import (
    Arrangement,
    CalibrationData,
    arrange,
    camera_names,
    fixed_noise_and_time,
    hold_out,
    load_npz,
    observation_of,
)
from clp_jax.data.dataset import TrainingData, open_dataset

__all__ = [
    "Arrangement",
    "CalibrationData",
    "TrainingData",
    "arrange",
    "camera_names",
    "fixed_noise_and_time",
    "hold_out",
    "load_npz",
    "observation_of",
    "open_dataset",
]
