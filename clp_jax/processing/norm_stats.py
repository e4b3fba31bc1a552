"""Statistics for normalisation: computed from tables alone, kept in openpi's file format."""

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float, Int

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


def of_vectors(vectors: Iterable[Float[np.ndarray, "*n"]]) -> NormStats:
    """Statistics of a vector, from all values of one dimension after the other.

    Mean and deviation are accumulated in float64. Quantiles are exact: the smallest value that 1 % (99 %) of the values
    do not exceed. (openpi sums in float32, and takes the lower edge of that value's bin among 5000.)

    >>> of_vectors([np.arange(101.0)]).q99
    array([99.])
    """
    mean, std, low, high = [], [], [], []
    for values in vectors:
        mean.append(values.mean(dtype=np.float64))
        std.append(values.std(dtype=np.float64))
        quantiles = np.quantile(values, [0.01, 0.99], method="inverted_cdf")
        low.append(quantiles[0])
        high.append(quantiles[1])
    return NormStats(*(np.asarray(column, np.float64) for column in (mean, std, low, high)))


def of_robot(
    state: Float[np.ndarray, "n d"],
    actions: Float[np.ndarray, "n adim"],
    ends: Int[np.ndarray, " e"],
    horizon: int,
    delta: Sequence[bool],
) -> dict[str, NormStats]:
    """Statistics of the states, and of the action chunks that training sees, as openpi's scripts/compute_norm_stats.py.

    Args:
      state: of every row, in the model's units.
      actions: of every row, in the model's units, absolute.
      ends: one past the last row of each episode.
      horizon: actions of a chunk; at the end of an episode the last one is held, and counted as often as it is seen.
      delta: per action dimension whether chunks are relative to the state of their first row.

    Returns:
      ``state`` and ``actions``. Memory beside the arguments: about 12 n horizon bytes.
    """
    rows = np.arange(len(state))
    last = np.repeat(ends, np.diff(ends, prepend=0)) - 1
    chunks = [np.minimum(rows + step, last) for step in range(horizon)]

    def seen(dimension: int) -> np.ndarray:
        offset = state[:, dimension] if dimension < len(delta) and delta[dimension] else np.float32(0)
        return np.stack([actions[chunk, dimension] - offset for chunk in chunks]).astype(np.float32)

    return {"state": of_vectors(state.T.astype(np.float32)), "actions": of_vectors(map(seen, range(actions.shape[1])))}


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
