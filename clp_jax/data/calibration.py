"""Calibration data: model-ready observations from a ``.npz``, split by episode and arranged into groups.

Keys are openpi's model inputs flattened with "/": ``image/<camera>`` uint8 or float32 in [-1, 1] [n, h, w, 3],
``image_mask/<camera>`` bool [n], ``state`` float32 [n, adim], ``tokenized_prompt`` int32 [n, s],
``tokenized_prompt_mask`` bool [n, s], ``actions`` float32 [n, horizon, adim]; optional ``noise`` (like actions),
``time`` float32 [n] in (0, 1], ``episode_index`` int [n], ``action_is_pad`` bool [n, horizon]; π0-FAST also
``token_ar_mask`` int32 and ``token_loss_mask`` bool [n, s]. The cameras are openpi's three of the model's kind.
"""

import dataclasses
import hashlib
import os
import zipfile
from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath
from jaxtyping import Int

from clp_jax.aliases import Leaf
from clp_jax.errors import InputError
from clp_jax.models import CAMERAS, FAST_CAMERAS, Architecture, Observation

_TOKEN_KEYS = ("tokenized_prompt", "tokenized_prompt_mask")
_FAST_KEYS = ("token_ar_mask", "token_loss_mask")


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

    def take(self, rows: Sequence[int] | np.ndarray) -> "CalibrationData":
        """The observations at these rows, in this order."""
        return dataclasses.replace(self, arrays={key: value[rows] for key, value in self.arrays.items()})

    def observation(self) -> Observation:
        """All rows as the model's input."""
        return observation_of(self.arrays)


def observation_of(arrays: Mapping[str, Leaf]) -> Observation:
    """The model's input from arrays by flat key; cameras in sorted order, whatever the order of the keys."""
    cameras = sorted(key.removeprefix("image/") for key in arrays if key.startswith("image/"))
    return Observation(
        images={camera: arrays[f"image/{camera}"] for camera in cameras},
        image_masks={camera: arrays[f"image_mask/{camera}"] for camera in cameras},
        state=arrays["state"],
        tokenized_prompt=arrays["tokenized_prompt"],
        tokenized_prompt_mask=arrays["tokenized_prompt_mask"],
        token_ar_mask=arrays.get("token_ar_mask"),
        token_loss_mask=arrays.get("token_loss_mask"),
    )


def camera_names(architecture: Architecture) -> tuple[str, ...]:
    """The model's cameras in the order in which it reads them, which is also the sorted one."""
    return FAST_CAMERAS if architecture.kind == "pi0_fast" else CAMERAS


def load_npz(path: str | os.PathLike[str], architecture: Architecture) -> CalibrationData:
    """Read and check a ``.npz`` of model-ready observations.

    Args:
      path: local file or any address etils understands.
      architecture: the model that will read it.

    Returns:
      The observations without the cameras that none of them has, and with ``noise`` and ``time`` filled in where a
      flow-matching model needs them and the file has none (see `fixed_noise_and_time`).

    Raises:
      InputError: the file is missing or broken, a key is missing, or an array does not fit the model.
    """
    file = epath.Path(path)
    if file.is_dir():
        raise InputError(
            f"{path} is a folder; give a .npz of model-ready observations (open_dataset reads LeRobot folders)."
        )
    if not file.exists():
        raise InputError(f"there is no data file {path}.")
    try:
        with file.open("rb") as stream:
            fingerprint = hashlib.file_digest(stream, "sha256").hexdigest()
            stream.seek(0)
            with np.load(stream, allow_pickle=False) as archive:
                arrays = {key: archive[key] for key in archive.files}
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, KeyError) as error:
        raise InputError(f"{path} is not a readable .npz file: {error}") from error
    except TypeError as error:  # np.load gives a bare .npy as an array, which is no context
        raise InputError(f"{path} holds one bare array; give a .npz with the keys of openpi's model inputs.") from error
    _check(arrays, architecture, str(path))
    arrays = _without_absent_cameras(arrays, architecture)
    if architecture.kind != "pi0_fast":
        noise, time = fixed_noise_and_time(arrays["actions"].shape)
        arrays.setdefault("noise", noise)
        arrays.setdefault("time", time)
    return CalibrationData(arrays, fingerprint)


def fixed_noise_and_time(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The same noise and times for the same shape, so that runs compare.

    Times are quantiles of openpi's t ~ 0.999 Beta(1.5, 1) + 0.001, whose distribution function is t^1.5, at the points
    of a golden-ratio sequence: any stretch of rows covers all noise levels evenly.

    >>> [round(float(t), 3) for t in fixed_noise_and_time((3, 1, 2))[1]]
    [0.63, 0.241, 0.815]
    """
    golden = (np.sqrt(5.0) - 1.0) / 2.0
    uniform = (0.5 + golden * np.arange(shape[0])) % 1.0
    time = (uniform ** (2.0 / 3.0) * 0.999 + 0.001).astype(np.float32)
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32), time


def hold_out(episodes: Int[np.ndarray, " n"], ratio: float, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Split rows into calibration and held-out by whole episodes.

    Args:
      episodes: episode of each row.
      ratio: share of the episodes to hold out, in [0, 1).
      seed: of the shuffle of episodes.

    Returns:
      Calibration rows and held-out rows, in file order; the latter empty if ``ratio`` leaves less than one episode on
      either side.
    """
    names = np.unique(episodes)
    count = round(ratio * len(names))
    chosen = np.random.default_rng(seed).permutation(names)[:count]
    held = np.isin(episodes, chosen)
    if held.all():
        held[:] = False
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
    fast = architecture.kind == "pi0_fast"
    cameras = camera_names(architecture)
    wanted = ["state", *_TOKEN_KEYS, *(_FAST_KEYS if fast else ("actions",))]
    wanted += [f"{prefix}/{camera}" for camera in cameras for prefix in ("image", "image_mask")]
    missing = [key for key in wanted if key not in arrays]
    if missing:
        raise InputError(f"{path} lacks {', '.join(missing)}; it holds {', '.join(sorted(arrays)) or 'nothing'}.")
    unknown = sorted(key for key in arrays if key.startswith(("image/", "image_mask/")) and key not in wanted)
    if unknown:
        raise InputError(
            f"{path} holds {', '.join(unknown)}; the cameras of a {architecture.kind} model are {', '.join(cameras)}."
        )
    rows = len(arrays["state"]) if arrays["state"].ndim else 0
    if rows == 0:
        raise InputError(f"{path} holds no observations.")
    for key, (kinds, shape) in _expected(arrays, architecture, cameras, rows).items():
        if key in arrays:
            _check_array(arrays[key], key, kinds, shape, path)
    tokens = arrays["tokenized_prompt"]
    if tokens.min(initial=0) < 0 or tokens.max(initial=0) >= architecture.vocab_size:
        raise InputError(
            f"{path}: tokenized_prompt holds ids {tokens.min()}..{tokens.max()}, the model's vocabulary has "
            f"{architecture.vocab_size}."
        )
    if "time" in arrays and not ((arrays["time"] > 0) & (arrays["time"] <= 1)).all():
        raise InputError(f"{path}: time must lie in (0, 1], where 1 is noise.")
    seen = np.stack([arrays[f"image_mask/{c}"] for c in cameras] + [arrays["tokenized_prompt_mask"].any(axis=1)])
    blind = np.flatnonzero(~seen.any(axis=0))
    if blind.size:
        raise InputError(
            f"{path}: observation {blind[0]} has no valid token: every camera and its whole prompt are masked."
        )


def _without_absent_cameras(arrays: dict[str, np.ndarray], architecture: Architecture) -> dict[str, np.ndarray]:
    """Drop cameras that are masked in every observation: nothing attends to their tokens, so nothing changes but time.

    One camera stays in any case. (π0-FAST keeps all: its masked tokens hold places in the cache.)
    """
    if architecture.kind == "pi0_fast":
        return arrays
    absent = [c for c in camera_names(architecture) if not arrays[f"image_mask/{c}"].any()]
    dropped = {f"{prefix}/{c}" for c in absent[-(len(CAMERAS) - 1) :] for prefix in ("image", "image_mask")}
    return {key: array for key, array in arrays.items() if key not in dropped}


def _expected(arrays, architecture: Architecture, cameras, rows: int) -> dict[str, tuple[str, tuple]]:
    """Per key the kinds of dtype ("f", "i", "b", "u") and the shape; None is any size."""
    prompt = (rows, arrays["tokenized_prompt"].shape[1] if arrays["tokenized_prompt"].ndim == 2 else None)
    # π0 projects the state; π0.5 and π0-FAST have it in the prompt and never read this array.
    state_dim = architecture.action_dim if architecture.kind == "pi0" else None
    actions = (rows, arrays["actions"].shape[1] if arrays.get("actions", np.zeros(0)).ndim == 3 else None)
    expected: dict[str, tuple[str, tuple]] = {f"image/{c}": ("uf", (rows, None, None, 3)) for c in cameras}
    expected |= {f"image_mask/{c}": ("b", (rows,)) for c in cameras}
    expected |= {
        "state": ("f", (rows, state_dim)),
        "tokenized_prompt": ("iu", prompt),
        "tokenized_prompt_mask": ("b", prompt),
    }
    expected |= {"token_ar_mask": ("iub", prompt), "token_loss_mask": ("b", prompt), "episode_index": ("iu", (rows,))}
    expected |= {"action_is_pad": ("b", actions)}
    if architecture.action_dim is not None:
        expected |= dict.fromkeys(("actions", "noise"), ("f", (*actions, architecture.action_dim)))
        expected |= {"time": ("f", (rows,))}
    return expected


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
