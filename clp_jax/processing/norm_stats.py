"""Statistics for normalisation: computed from tables alone, kept in openpi's file format."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float, Int

from clp_jax.errors import InputError, blamed_on
from clp_jax.files import read_json_object

FILE = "norm_stats.json"
_NARROW = 1e-4
"""A range, or a deviation, below which noise of a sensor is all that a dimension holds."""
_EPSILON = 1e-6
"""What normalisation adds to a range, as openpi does."""
_QUANTILES = (0.01, 0.99)
_LARGEST = float(np.finfo(np.float32).max)


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


def of_vectors(vectors: Iterable[Float[np.ndarray, "*n"]], weights: Float[np.ndarray, "*n"] | None = None) -> NormStats:
    """Statistics of a vector, from all values of one dimension after the other.

    Mean and deviation are accumulated in float64. Quantiles are exact: the smallest value that 1 % (99 %) of the values
    do not exceed. (openpi sums in float32, and takes the lower edge of that value's bin among 5000.)

    Args:
      vectors: per dimension its values.
      weights: how much each value counts, None for all alike.

    >>> of_vectors([np.arange(101.0)]).q99
    array([99.])
    """
    mean, std, low, high = [], [], [], []
    for values in vectors:
        if weights is None:
            mean.append(values.mean(dtype=np.float64))
            std.append(values.std(dtype=np.float64))
            quantiles = np.quantile(values, _QUANTILES, method="inverted_cdf")
        else:
            mean.append(np.average(values.astype(np.float64), weights=weights))
            std.append(np.sqrt(np.average((values.astype(np.float64) - mean[-1]) ** 2, weights=weights)))
            quantiles = _weighted_quantiles(values, weights)
        low.append(quantiles[0])
        high.append(quantiles[1])
    return NormStats(*(np.asarray(column, np.float64) for column in (mean, std, low, high)))


def _weighted_quantiles(values: np.ndarray, weights: np.ndarray) -> Float[np.ndarray, " q"]:
    """The smallest value that the share of the weights does not exceed; ``inverted_cdf`` of NumPy 2."""
    order = np.argsort(values, axis=None)
    reached = np.cumsum(weights.ravel()[order])
    return values.ravel()[order[np.searchsorted(reached, np.array(_QUANTILES) * reached[-1])]]


def of_robot(
    state: Float[np.ndarray, "n d"],
    actions: Float[np.ndarray, "n adim"],
    ends: Int[np.ndarray, " e"],
    horizon: int,
    delta: Sequence[bool],
    weights: Float[np.ndarray, " n"] | None = None,
) -> dict[str, NormStats]:
    """Statistics of the states, and of the action chunks that training sees, as openpi's scripts/compute_norm_stats.py.

    Args:
      state: of every row, in the model's units.
      actions: of every row, in the model's units, absolute.
      ends: one past the last row of each episode.
      horizon: actions of a chunk; at the end of an episode the last one is held, and counted as often as it is seen.
      delta: per action dimension whether chunks are relative to the state of their first row.
      weights: how much each row counts, None for all alike.

    Returns:
      ``state``, unless it has no dimensions, and ``actions``. Memory beside the arguments: about 12 n horizon bytes.
    """
    rows = np.arange(len(state))
    last = np.repeat(ends, np.diff(ends, prepend=0)) - 1
    chunks = [np.minimum(rows + step, last) for step in range(horizon)]

    def seen(dimension: int) -> np.ndarray:
        offset = state[:, dimension] if dimension < len(delta) and delta[dimension] else np.float32(0)
        return np.stack([actions[chunk, dimension] - offset for chunk in chunks]).astype(np.float32)

    of_chunks = None if weights is None else np.broadcast_to(weights, (horizon, len(weights)))
    stats = {"state": of_vectors(state.T.astype(np.float32), weights)} if state.shape[1] else {}
    return stats | {"actions": of_vectors(map(seen, range(actions.shape[1])), of_chunks)}


def save(folder: str | os.PathLike[str], stats: Mapping[str, NormStats]) -> None:
    """Write ``folder/norm_stats.json`` as openpi does."""
    values = {
        name: {key: None if value is None else value.tolist() for key, value in vars(entry).items()}
        for name, entry in stats.items()
    }
    path = epath.Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    (path / FILE).write_text(json.dumps({"norm_stats": values}, indent=2, allow_nan=False))


def fingerprint(stats: Mapping[str, NormStats]) -> str:
    """Identity of the values, whatever file they are from."""
    digest = hashlib.sha256()
    for name in sorted(stats):
        for field, values in dataclasses.asdict(stats[name]).items():
            digest.update(
                f"{name} {field} {None if values is None else np.asarray(values, np.float64).tolist()}".encode()
            )
    return digest.hexdigest()


def load(path: str | os.PathLike[str]) -> dict[str, NormStats]:
    """Read openpi's ``norm_stats.json``.

    Args:
      path: the file, or the folder that holds it; local or any address etils understands.

    Raises:
      InputError: there is no such file, or its content is no norm stats or those of no data: a negative deviation,
        quantiles in the wrong order, what is no finite number in float32.
    """
    file = epath.Path(path)
    with blamed_on(file):  # a network may fail, or lack its package
        file = file / FILE if file.is_dir() else file
        there = file.exists()
    if not there:
        raise InputError(f"there is no {FILE} at {path}; write one with clp norm-stats.")
    content = read_json_object(file)
    with blamed_on(file, "write one with clp norm-stats", verb=f"is no {FILE} of openpi"):
        values = content["norm_stats"]
        if not values:
            raise ValueError("it holds no statistics")
        return {name: of_lists(name, value) for name, value in values.items()}


def of_lists(name: str, value: Mapping[str, Any]) -> NormStats:
    """Statistics that somebody wrote, refused if no data have them.

    Args:
      name: of the vector, for messages.
      value: lists of numbers by the names of `NormStats`; other keys are ignored.

    Raises:
      ValueError: something else than finite numbers of float32, a negative deviation, or quantiles in the wrong order.
    """
    given = {key: value.get(key) for key in ("mean", "std", "q01", "q99")}
    arrays = {key: None if item is None else _vector(item, f"{name}, {key}") for key, item in given.items()}
    mean, std, q01, q99 = arrays.values()
    if mean is None or std is None:
        raise ValueError(f"{name} lacks mean or std")
    if (q01 is None) != (q99 is None):
        raise ValueError(f"{name} has only one of q01 and q99")
    shapes = {array.shape for array in arrays.values() if array is not None}
    if len(shapes) > 1:
        raise ValueError(f"statistics of different shapes {sorted(shapes)}")
    for dimension in np.flatnonzero(std < 0).tolist():
        raise ValueError(f"{name}, dimension {dimension}: std is {std[dimension]:g}, a deviation is never negative")
    if q01 is not None and q99 is not None:
        for dimension in np.flatnonzero(q01 > q99).tolist():
            raise ValueError(f"{name}, dimension {dimension}: q01 {q01[dimension]:g} is above q99 {q99[dimension]:g}")
        for dimension in np.flatnonzero((std == 0) & (q01 < q99)).tolist():
            raise ValueError(f"{name}, dimension {dimension}: std is 0, but q01 and q99 differ")
    return NormStats(mean, std, q01, q99)


def narrow(
    stats: Mapping[str, NormStats],
    dims: Mapping[str, int],
    *,
    quantiles: bool | None = None,
    least: float = _NARROW,
) -> tuple[str, ...]:
    """Dimensions that hardly vary, and what becomes of another value there.

    Args:
      stats: by name.
      dims: how many dimensions of each are used; the others may be padding.
      quantiles: whether the quantiles normalise, or else mean and deviation; None asks for both.
      least: range or deviation below which a dimension hardly varies.

    Returns:
      For each such dimension a phrase.
    """
    found = []
    for name, entry in stats.items():
        for i in range(min(dims.get(name, 0), len(entry.mean))):
            width = entry.std[i]
            if quantiles is not True and width < least:
                found.append(
                    f"{name} {i} (std {width:.2g}: one unit beside the mean becomes {1 / (width + _EPSILON):.0e})"
                )
            elif quantiles is not False and entry.q01 is not None and entry.q99 is not None:
                width = entry.q99[i] - entry.q01[i]
                if width < least:
                    found.append(
                        f"{name} {i} (q01 {entry.q01[i]:.3g}, q99 {entry.q99[i]:.3g}: one unit beside them becomes "
                        f"{2 / (width + _EPSILON):.0e})"
                    )
    return tuple(found)


def warning(stats: Mapping[str, NormStats], dims: Mapping[str, int], *, quantiles: bool | None = None) -> str | None:
    """What to tell a user whose data hardly vary somewhere, None if they vary everywhere; arguments as for `narrow`."""
    found = narrow(stats, dims, quantiles=quantiles)
    if not found:
        return None
    return (
        f"{', '.join(found)} hardly vary: normalised by so small a range, any other value becomes huge. Check the "
        f"data, or widen the range in {FILE} by hand."
    )


def check_spread(
    stats: Mapping[str, NormStats], dims: Mapping[str, int], *, source: str, quantiles: bool | None = None
) -> None:
    """Raise where a file that the user gave has no spread in a dimension that is used.

    Args:
      stats: from the file.
      dims: how many dimensions of each are used.
      source: the file, for the message.
      quantiles: as for `narrow`.

    Raises:
      InputError: names the dimensions.
    """
    found = narrow(stats, dims, quantiles=quantiles, least=_EPSILON)
    if found:
        raise InputError(
            f"the statistics of {source} have no spread in dimensions that the robot uses: {', '.join(found)}. Widen "
            "them in the file by hand, or compute them from the data with clp norm-stats."
        )


def _vector(values: Any, where: str) -> Float[np.ndarray, " d"]:
    """A list of finite numbers; no text, no booleans."""
    if not isinstance(values, list) or not values:
        raise ValueError(f"{where} is no list of numbers")
    for dimension, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{where}, dimension {dimension} is {value!r}, no number")
        if not abs(value) <= _LARGEST:
            raise ValueError(f"{where}, dimension {dimension} is {value!r}, values that are not finite in float32")
    return np.asarray(values, np.float64)
