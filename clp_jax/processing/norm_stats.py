"""Statistics for normalisation: computed from tables alone, kept in openpi's file format."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from etils import epath
from jaxtyping import Float, Int

from clp_jax.errors import InputError, blamed_on
from clp_jax.files import read_json_object

FILE = "norm_stats.json"

By = Literal["deviation", "quantiles", "range"]
"""What normalises: mean and deviation, the 1 % and 99 % quantiles, or the extremes."""
_NARROW = 1e-4
"""A range, or a deviation, below which noise of a sensor is all that a dimension holds."""
_EPSILON = 1e-6
"""What normalisation adds to a range, as openpi does."""
_QUANTILES = (0.01, 0.99)
_ROUNDING = 1e-5
"""Of a value or of its deviation: statistics that were stored as float32 are still the same."""
_LARGEST = float(np.finfo(np.float32).max)


@dataclasses.dataclass(frozen=True)
class NormStats:
    """Statistics of one vector (``state`` or ``actions``) over a data set; quantiles and extremes may be absent.

    Attributes:
      mean: per dimension [d].
      std: population standard deviation per dimension [d].
      q01: 1 % quantile per dimension [d].
      q99: 99 % quantile per dimension [d].
      min: smallest value per dimension [d].
      max: largest value per dimension [d].
    """

    mean: Float[np.ndarray, " d"]
    std: Float[np.ndarray, " d"]
    q01: Float[np.ndarray, " d"] | None = None
    q99: Float[np.ndarray, " d"] | None = None
    min: Float[np.ndarray, " d"] | None = None
    max: Float[np.ndarray, " d"] | None = None


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
    rows = []
    for values in vectors:
        if weights is None:
            mean, std = values.mean(dtype=np.float64), values.std(dtype=np.float64)
            quantiles = np.quantile(values, _QUANTILES, method="inverted_cdf")
        else:
            mean = np.average(values.astype(np.float64), weights=weights)
            std = np.sqrt(np.average((values.astype(np.float64) - mean) ** 2, weights=weights))
            quantiles = _weighted_quantiles(values, weights)
        rows.append([mean, std, *quantiles, values.min(), values.max()])
    return NormStats(*np.asarray(rows, np.float64).reshape(-1, 6).T)


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
    """Write ``folder/norm_stats.json`` as openpi does, which skips the extremes when it reads the file."""
    values = {name: _values(entry) for name, entry in stats.items()}
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


def difference(one: Mapping[str, NormStats], other: Mapping[str, NormStats]) -> str | None:
    """The first value that two sets of statistics both have and have differently, in words; None if they agree."""
    for name in sorted(one.keys() & other.keys()):
        for field in dataclasses.fields(NormStats):
            ours, theirs = getattr(one[name], field.name), getattr(other[name], field.name)
            if ours is None or theirs is None:
                continue
            if ours.shape != theirs.shape:
                return f"{name} has {len(ours)} dimensions, {len(theirs)}"
            apart = np.abs(ours - theirs) > _ROUNDING * np.maximum(np.abs(ours), one[name].std)
            for i in np.flatnonzero(apart)[:1]:
                return f"{field.name} of {name}, dimension {i}, is {ours[i]:g}, {theirs[i]:g}"
    return None


def _values(entry: NormStats) -> dict[str, list[float] | None]:
    """openpi's four keys in any case, the extremes if they are known."""
    known = {key: None if value is None else value.tolist() for key, value in vars(entry).items()}
    return {key: value for key, value in known.items() if value is not None or key not in ("min", "max")}


def place(path: str | os.PathLike[str]) -> epath.Path:
    """The file that is meant by a file, or by the folder that holds it."""
    file = epath.Path(path)
    return file / FILE if file.is_dir() else file


def load(path: str | os.PathLike[str]) -> dict[str, NormStats]:
    """Read openpi's ``norm_stats.json``.

    Args:
      path: the file, or the folder that holds it; local or any address etils understands.

    Raises:
      InputError: there is no such file, or its content is no norm stats or those of no data: a negative deviation,
        quantiles in the wrong order, what is no finite number in float32.
    """
    with blamed_on(path):  # a network may fail, or lack its package
        file = place(path)
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
    given = {field.name: value.get(field.name) for field in dataclasses.fields(NormStats)}
    arrays = {key: None if item is None else _vector(item, f"{name}, {key}") for key, item in given.items()}
    mean, std = arrays["mean"], arrays["std"]
    if mean is None or std is None:
        raise ValueError(f"{name} lacks mean or std")
    shapes = {array.shape for array in arrays.values() if array is not None}
    if len(shapes) > 1:
        raise ValueError(f"statistics of different shapes {sorted(shapes)}")
    for dimension in np.flatnonzero(std < 0).tolist():
        raise ValueError(f"{name}, dimension {dimension}: std is {std[dimension]:g}, a deviation is never negative")
    for low, high in (("q01", "q99"), ("min", "max")):
        _check_pair(name, low, arrays[low], high, arrays[high], std)
    return NormStats(**{"mean": mean, "std": std} | arrays)


def _check_pair(
    name: str, low: str, lower: np.ndarray | None, high: str, upper: np.ndarray | None, std: np.ndarray
) -> None:
    """Raise where two bounds cannot both be true, or cannot be those of a deviation."""
    if lower is None or upper is None:
        if lower is not upper:
            raise ValueError(f"{name} has only one of {low} and {high}")
        return
    for i in np.flatnonzero(lower > upper).tolist():
        raise ValueError(f"{name}, dimension {i}: {low} {lower[i]:g} is above {high} {upper[i]:g}")
    for i in np.flatnonzero((std == 0) & (lower < upper)).tolist():
        raise ValueError(f"{name}, dimension {i}: std is 0, but {low} and {high} differ")


def narrow(
    stats: Mapping[str, NormStats],
    dims: Mapping[str, int],
    *,
    by: By | None = None,
    least: float = _NARROW,
) -> tuple[str, ...]:
    """Dimensions that hardly vary, and what becomes of another value there.

    Args:
      stats: by name.
      dims: how many dimensions of each are used; the others may be padding.
      by: what normalises; None asks for deviations and quantiles. A range of exactly 0 harms nobody: every value
        becomes 0.
      least: range or deviation below which a dimension hardly varies.

    Returns:
      For each such dimension a phrase.
    """
    found = []
    for name, entry in stats.items():
        for i in range(min(dims.get(name, 0), len(entry.mean))):
            width = entry.std[i]
            if by in (None, "deviation") and width < least:
                found.append(
                    f"{name} {i} (std {width:.2g}: one unit beside the mean becomes {1 / (width + _EPSILON):.0e})"
                )
            elif by in (None, "quantiles") and entry.q01 is not None and entry.q99 is not None:
                width = entry.q99[i] - entry.q01[i]
                if width < least:
                    found.append(
                        f"{name} {i} (q01 {entry.q01[i]:.3g}, q99 {entry.q99[i]:.3g}: one unit beside them becomes "
                        f"{2 / (width + _EPSILON):.0e})"
                    )
            elif by == "range" and entry.min is not None and entry.max is not None:
                width = entry.max[i] - entry.min[i]
                if 0 < width < least:
                    found.append(
                        f"{name} {i} (min {entry.min[i]:.3g}, max {entry.max[i]:.3g}: one unit beside them becomes "
                        f"{2 / width:.0e})"
                    )
    return tuple(found)


def warning(stats: Mapping[str, NormStats], dims: Mapping[str, int], *, by: By | None = None) -> str | None:
    """What to tell a user whose data hardly vary somewhere, None if they vary everywhere; arguments as for `narrow`."""
    found = narrow(stats, dims, by=by)
    if not found:
        return None
    return (
        f"{', '.join(found)} hardly vary: normalised by so small a range, any other value becomes huge. Check the "
        f"data, or widen the range in {FILE} by hand."
    )


def check_spread(stats: Mapping[str, NormStats], dims: Mapping[str, int], *, source: str, by: By | None = None) -> None:
    """Raise where a file that the user gave has no spread in a dimension that is used.

    Args:
      stats: from the file.
      dims: how many dimensions of each are used.
      source: the file, for the message.
      by: as for `narrow`.

    Raises:
      InputError: names the dimensions.
    """
    found = narrow(stats, dims, by=by, least=_EPSILON)
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
