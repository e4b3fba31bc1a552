"""Calibration data: model-ready observations from a ``.npz``, split by episode and arranged into groups.

Keys are a model's inputs flattened with "/", each with a first axis of observations: what the family's ``inputs``
describes (``image/<camera>`` may be uint8 of any size or float32 in [-1, 1]), and optional ``noise`` (like actions),
``time`` float32, ``episode_index`` int, ``action_is_pad`` bool [horizon].
"""

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Int

from clp_jax.errors import InputError, blamed_on
from clp_jax.files import opened, read_archive
from clp_jax.models import Architecture, Lengths, family_of

_ROWS = 256
"""Observations whose masks are looked at in one go."""


@dataclasses.dataclass(frozen=True)
class CalibrationData:
    """Observations in host memory, one row each.

    Attributes:
      arrays: the file's arrays by key, all with the same first axis.
      fingerprint: sha256 of the file.
    """

    arrays: dict[str, np.ndarray]
    fingerprint: str

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    @property
    def episodes(self) -> Int[np.ndarray, " n"]:
        """The episode of each observation; without ``episode_index`` each one is its own episode."""
        return self.arrays.get("episode_index", np.arange(len(self)))

    @property
    def cameras(self) -> tuple[str, ...]:
        """Camera names, sorted: the order in which the model reads them."""
        return tuple(sorted(key.removeprefix("image/") for key in self.arrays if key.startswith("image/")))

    @property
    def lengths(self) -> Lengths:
        """Actions of a chunk, 0 without actions, and tokens of a prompt."""
        horizon = self.arrays["actions"].shape[1] if "actions" in self.arrays else 0
        return Lengths(horizon, self.arrays["tokenized_prompt"].shape[1])

    def take(self, rows: Sequence[int] | np.ndarray) -> "CalibrationData":
        """The observations at these rows, in this order."""
        return dataclasses.replace(self, arrays={key: value[rows] for key, value in self.arrays.items()})


def load_npz(path: str | os.PathLike[str], architecture: Architecture) -> CalibrationData:
    """Read and check a ``.npz`` of model-ready observations.

    Args:
      path: local file or any address etils understands.
      architecture: the model that will read it.

    Returns:
      The observations without the cameras that none of them has where those change nothing, and with ``noise`` and
      ``time`` filled in where the model needs them and the file has none: the same in every run.

    Raises:
      InputError: the file is missing or broken, a key is missing, or an array does not fit the model.
    """
    file = epath.Path(path)
    with blamed_on(file):  # a network may fail, or lack its package
        folder, there = file.is_dir(), file.exists()
    if folder:
        raise InputError(
            f"{path} is a folder; give a .npz of model-ready observations (open_dataset reads LeRobot folders)."
        )
    if not there:
        raise InputError(f"there is no data file {path}.")
    arrays = read_archive(file)
    with opened(file) as stream:
        fingerprint = hashlib.file_digest(stream, "sha256").hexdigest()
    family = family_of(architecture)
    arrays = family.complete(architecture, arrays)
    _check(arrays, architecture, str(path))
    arrays = family.without_unseen(architecture, arrays)
    return CalibrationData(family.fixed_draw(architecture, arrays) | arrays, fingerprint)


def hold_out(episodes: Int[np.ndarray, " n"], ratio: float, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Split rows into calibration and held-out by whole episodes.

    Args:
      episodes: episode of each row.
      ratio: share of the episodes to hold out, in [0, 1).
      seed: of the shuffle of episodes.

    Returns:
      Calibration rows and held-out rows, in file order; the latter empty if ``ratio`` makes less than half an episode.
      One episode at least is left for calibration.
    """
    names = np.unique(episodes)
    count = min(round(ratio * len(names)), len(names) - 1)
    chosen = np.random.default_rng(seed).permutation(names)[:count]
    held = np.isin(episodes, chosen)
    return np.flatnonzero(~held), np.flatnonzero(held)


@dataclasses.dataclass(frozen=True)
class Arrangement:
    """Observations dealt into groups, the units of a HSIC estimate.

    Attributes:
      slots: row of the observation in each slot of each group, -1 for an empty slot [g, m].
      cluster: the cluster of each group [g]; no episode is in two clusters, so clusters are what a bootstrap resamples.
    """

    slots: Int[np.ndarray, "g m"]
    cluster: Int[np.ndarray, " g"]


def arrange(episodes: Int[np.ndarray, " n"], group_size: int, *, seed: int = 0) -> Arrangement:
    """Deal observations into groups of ``group_size`` that mix episodes without ever splitting one over two clusters.

    A cluster is a few whole episodes (as many as a group has slots, fewer if there would be less than four clusters);
    inside it, observations are dealt round robin, so that a group sees different episodes.

    >>> arrange(np.array([7, 7, 8, 8, 9]), 2).slots.shape
    (3, 2)
    """
    names = np.random.default_rng(seed).permutation(np.unique(episodes))
    per_cluster = max(1, min(group_size, len(names) // 4))
    slots, cluster = [], []
    for c, start in enumerate(range(0, len(names), per_cluster)):
        rows = [list(np.flatnonzero(episodes == name)) for name in names[start : start + per_cluster]]
        longest = max(len(r) for r in rows)
        dealt = [r[i] for i in range(longest) for r in rows if i < len(r)]
        for i in range(0, len(dealt), group_size):
            group = dealt[i : i + group_size]
            slots.append(group + [-1] * (group_size - len(group)))
            cluster.append(c)
    return Arrangement(np.array(slots), np.array(cluster))


def _check(arrays: dict[str, np.ndarray], architecture: Architecture, path: str) -> None:
    """Raise on anything that the model cannot read."""
    family = family_of(architecture)
    cameras = family.camera_names(architecture)
    if cameras is None:
        cameras = sorted(key.removeprefix("image/") for key in arrays if key.startswith("image/"))
        if not cameras:
            raise InputError(f"{path} holds no image/<camera>; it holds {', '.join(sorted(arrays)) or 'nothing'}.")
    required = family.inputs(architecture, _lengths(arrays), cameras)
    missing = [key for key in required if key not in arrays]
    if missing:
        raise InputError(f"{path} lacks {', '.join(missing)}; it holds {', '.join(sorted(arrays)) or 'nothing'}.")
    unknown = sorted(key for key in arrays if key.startswith(("image/", "image_mask/")) and key not in required)
    if unknown:
        raise InputError(
            f"{path} holds {', '.join(unknown)}; the cameras of a {architecture.kind} model are {', '.join(cameras)}."
        )
    rows = len(arrays["state"]) if arrays["state"].ndim else 0
    if rows == 0:
        raise InputError(f"{path} holds no observations.")
    free = family.any_size(architecture)
    for key, leaf in required.items():
        kinds, shape = _rule(key, leaf)
        _check_array(arrays[key], key, kinds, (rows, *(None if key in free else n for n in shape)), path)
    for key, (kinds, shape) in _optional(required).items():
        if key in arrays:
            _check_array(arrays[key], key, kinds, (rows, *shape), path)
    _check_values(arrays, architecture, cameras, path)


def _check_values(arrays: dict[str, np.ndarray], architecture: Architecture, cameras: Sequence[str], path: str) -> None:
    tokens = arrays["tokenized_prompt"]
    if tokens.min(initial=0) < 0 or tokens.max(initial=0) >= architecture.vocab_size:
        raise InputError(
            f"{path}: tokenized_prompt holds ids {tokens.min()}..{tokens.max()}, the model's vocabulary has "
            f"{architecture.vocab_size}."
        )
    times = family_of(architecture).TIMES
    if "time" in arrays and not times.hold(arrays["time"]):
        raise InputError(f"{path}: time must lie in {times}.")
    _check_counted(arrays, architecture, path)
    masks = [arrays[f"image_mask/{camera}"] for camera in cameras if f"image_mask/{camera}" in arrays]
    blind = np.flatnonzero(~np.stack([*masks, arrays["tokenized_prompt_mask"].any(axis=1)]).any(axis=0))
    if blind.size:
        raise InputError(
            f"{path}: observation {blind[0]} has no valid token: every camera and its whole prompt are masked."
        )


def _check_counted(arrays: dict[str, np.ndarray], architecture: Architecture, path: str) -> None:
    """Raise where masks leave nothing for a loss: it would be 0 whatever the model does."""
    names = family_of(architecture).OF_LOSSES | {"action_is_pad"}
    of_actions = {key: array for key, array in arrays.items() if key in names}
    if "actions" not in of_actions or len(of_actions) == 1:
        return
    for start in range(0, len(arrays["actions"]), _ROWS):  # the first rows suffice, as a rule
        some = {key: array[start : start + _ROWS] for key, array in of_actions.items()}
        weights = family_of(architecture).error_weights(architecture, some)
        if weights is None or np.asarray(weights).any():
            return
    masks = " and ".join(sorted(of_actions.keys() - {"actions"}))
    raise InputError(f"{path}: {masks} leave no action of any observation that a loss counts; correct them.")


def _lengths(arrays: dict[str, np.ndarray]) -> Lengths:
    """Chunk and prompt of the file; -1, which fits no array, where an array has not that many axes."""
    sizes = [
        arrays[key].shape[1] if key in arrays and arrays[key].ndim == axes else -1
        for key, axes in (("actions", 3), ("tokenized_prompt", 2))
    ]
    return Lengths(*sizes)


def _rule(key: str, leaf: Any) -> tuple[str, tuple]:
    """Kinds of dtype ("f", "i", "b", "u") that an array may have, and its shape; None is any size."""
    if key.startswith("image/"):
        return "uf", (None, None, 3)
    if key == "token_ar_mask":
        return "iub", leaf.shape
    return {"f": "f", "i": "iu", "b": "b"}[leaf.dtype.kind], tuple(None if n == -1 else n for n in leaf.shape)


def _optional(required: dict[str, Any]) -> dict[str, tuple[str, tuple]]:
    """Rules of the keys that any file may hold beside what the model needs."""
    rules: dict[str, tuple[str, tuple]] = {"episode_index": ("iu", ())}
    if "actions" in required:
        horizon, dim = required["actions"].shape
        known = None if horizon == -1 else horizon
        rules |= {"noise": ("f", (known, dim)), "time": ("f", ()), "action_is_pad": ("b", (known,))}
    return rules


def _check_array(array: np.ndarray, key: str, kinds: str, shape: tuple, path: str) -> None:
    names = {"f": "float", "i": "integer", "u": "unsigned integer", "b": "bool"}
    if array.dtype.kind not in kinds:
        raise InputError(f"{path}: {key} is {array.dtype}, expected {' or '.join(names[k] for k in kinds)}.")
    fits = array.ndim == len(shape) and all(want in (None, got) for want, got in zip(shape, array.shape, strict=True))
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise InputError(f"{path}: {key} has shape {array.shape}, expected ({wanted}).")
    if array.dtype.kind == "u" and key.startswith("image/") and array.dtype != np.uint8:
        raise InputError(f"{path}: {key} is {array.dtype}; images are uint8, or float in [-1, 1].")
    if array.dtype.kind == "f":
        if not np.isfinite(array).all():
            raise InputError(f"{path}: {key} holds NaN or infinite values.")
        if key.startswith("image/") and (array.min(initial=0) < -1.001 or array.max(initial=0) > 1.001):
            raise InputError(f"{path}: {key} is float outside [-1, 1]; give uint8, or x / 255 * 2 - 1.")
