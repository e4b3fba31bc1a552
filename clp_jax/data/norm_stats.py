"""Statistics for normalisation, in openpi's file format."""

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float

from clp_jax.errors import InputError

FILE = "norm_stats.json"


@dataclasses.dataclass(frozen=True)
class NormStats:
    """Statistics of one vector (``state`` or ``actions``) over a data set; quantiles may be absent.

    Attributes:
      mean: per dimension [d].
      std: population standard deviation per dimension [d].
      q01: 1 % quantile per dimension [d].
      q99: 99 % quantile per dimension [d].
    """

    mean: Float[np.ndarray, " d"]
    std: Float[np.ndarray, " d"]
    q01: Float[np.ndarray, " d"] | None = None
    q99: Float[np.ndarray, " d"] | None = None


def save(folder: str | os.PathLike[str], stats: Mapping[str, NormStats]) -> None:
    """Write ``folder/norm_stats.json`` as openpi does."""
    values = {
        name: {key: None if value is None else value.tolist() for key, value in vars(entry).items()}
        for name, entry in stats.items()
    }
    path = epath.Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    (path / FILE).write_text(json.dumps({"norm_stats": values}, indent=2, allow_nan=False))


def load(path: str | os.PathLike[str]) -> dict[str, NormStats]:
    """Read openpi's ``norm_stats.json``.

    Args:
      path: the file, or the folder that holds it; local or any address etils understands.

    Raises:
      InputError: there is no such file, or its content is no norm stats.
    """
    file = epath.Path(path)
    file = file / FILE if file.is_dir() else file
    try:
        values = json.loads(file.read_text())["norm_stats"]
        return {name: _entry(value) for name, value in values.items()}
    except OSError:
        raise InputError(f"there is no {FILE} at {path}; write one with clp norm-stats.") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file} is no norm_stats.json of openpi: {error!r}.") from error


def _entry(value: Mapping[str, Any]) -> NormStats:
    arrays = {
        key: None if value.get(key) is None else np.asarray(value[key], np.float64)
        for key in ("mean", "std", "q01", "q99")
    }
    if arrays["mean"] is None or arrays["std"] is None:
        raise KeyError("mean and std")
    shapes = {array.shape for array in arrays.values() if array is not None}
    if len(shapes) > 1 or len(next(iter(shapes))) != 1:
        raise ValueError(f"statistics of different shapes {sorted(shapes)}")
    if not all(np.isfinite(array).all() for array in arrays.values() if array is not None):
        raise ValueError("values that are not finite")
    return NormStats(**arrays)
