"""How the parts of a state or an action reach a GR00T: as Isaac-GR00T's transforms of release n1.5 normalise them.

A mode is a text: a normalisation (``min_max``, ``q99``, ``mean_std``, ``scale``, ``binary``), ``sin_cos``, a conversion
of a rotation (``quaternion>rotation_6d``), a conversion and ``min_max`` (``quaternion>axis_angle min_max``), or nothing
for numbers as they are.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from clp_jax.errors import InputError
from clp_jax.models.groot.rotations import WIDTHS, converted
from clp_jax.processing.norm_stats import NormStats

_NORMALISATIONS = ("min_max", "q99", "mean_std", "scale", "binary")


class Mode(NamedTuple):
    """What becomes of one part.

    Attributes:
      source: representation of a rotation that is converted; "" where nothing says it yet, None without conversion.
      target: representation that it is converted to.
      scaling: the normalisation, or ``sin_cos``; None leaves the numbers as they are.
    """

    source: str | None = None
    target: str | None = None
    scaling: str | None = None

    def width(self, dims: int) -> int:
        """Dimensions that the model sees of a part of ``dims``."""
        if self.target is not None:
            return WIDTHS[self.target]
        return 2 * dims if self.scaling == "sin_cos" else dims

    def lacks(self, stats: NormStats) -> str | None:
        """Which statistics it needs and are not there; None if nothing is missing."""
        if self.target is None and self.scaling in ("min_max", "scale") and stats.min is None:
            return "min and max"
        return "q01 and q99" if self.scaling == "q99" and stats.q01 is None else None

    def forth(self, x: Float[np.ndarray, "*n d"], stats: NormStats) -> Float[np.ndarray, "*n e"]:
        """The model's numbers from a robot's, in float32.

        A dimension that never changes becomes 0 by ``min_max`` and ``scale`` and stays as it is by ``q99`` and
        ``mean_std``. Only ``q99`` clips.

        >>> low, high = np.zeros(2), np.array([2.0, 0.0])
        >>> mode("min_max").forth(np.array([3.0, 7.0]), NormStats(low, high, min=low, max=high)).tolist()
        [2.0, 0.0]
        """
        x = x.astype(np.float32)
        if self.target is not None:
            assert self.source is not None
            x, stats = converted(x, self.source, self.target), _bounds(self.target)
        if self.scaling is None:
            return x
        if self.scaling == "sin_cos":
            return np.concatenate([np.sin(x), np.cos(x)], axis=-1)
        if self.scaling == "binary":
            return (x > np.float32(0.5)).astype(np.float32)
        low, width = self._range(stats)
        scaled = (x - low) / np.where(width == 0, np.float32(1), width)
        scaled = 2 * scaled - 1 if self.scaling in ("min_max", "q99") else scaled
        scaled = np.where(width == 0, x if self.scaling in ("q99", "mean_std") else np.float32(0), scaled)
        return scaled.clip(-1, 1) if self.scaling == "q99" else scaled

    def back(self, x: Float[np.ndarray, "*n e"], stats: NormStats) -> Float[np.ndarray, "*n d"]:
        """The inverse of `forth`; a dimension that never changes has its one value."""
        x = x.astype(np.float32)
        if self.scaling == "binary":
            return (x > np.float32(0.5)).astype(np.float32)
        if self.scaling is not None:
            low, width = self._range(stats if self.target is None else _bounds(self.target))
            x = ((x + 1) * np.float32(0.5) if self.scaling in ("min_max", "q99") else x) * width + low
        if self.target is None:
            return x
        assert self.source is not None
        return converted(x, self.target, self.source)

    def _range(self, stats: NormStats) -> tuple[Float[np.ndarray, " d"], Float[np.ndarray, " d"]]:
        """What is subtracted, and what then divides, in float32."""
        if self.scaling == "mean_std":
            return stats.mean.astype(np.float32), stats.std.astype(np.float32)
        low, high = (stats.q01, stats.q99) if self.scaling == "q99" else (stats.min, stats.max)
        assert low is not None
        assert high is not None
        low, high = low.astype(np.float32), high.astype(np.float32)
        if self.scaling == "scale":
            return np.zeros_like(low), np.maximum(np.abs(low), np.abs(high))
        return low, high - low


def mode(text: str) -> Mode:
    """The mode that a text names; the rotation before ``>`` may be left out until a data set says it.

    Raises:
      InputError: it names none.

    >>> mode("quaternion>rotation_6d min_max")
    Mode(source='quaternion', target='rotation_6d', scaling='min_max')
    """
    conversion = re.fullmatch(r"(\w*)>(\w+)(?: (min_max))?", text)
    if conversion is not None:
        source, target, scaling = conversion.groups()
        if source in ("", *WIDTHS) and target in WIDTHS and source != target:
            return Mode(source, target, scaling)
    elif text in ("", "sin_cos", *_NORMALISATIONS):
        return Mode(scaling=text or None)
    raise InputError(
        f"{text!r} is no mode of a GR00T-N1.5; write one of {', '.join(_NORMALISATIONS)}, sin_cos, nothing, or a "
        f"conversion such as quaternion>rotation_6d between {', '.join(WIDTHS)}, alone or followed by min_max."
    )


class Part(NamedTuple):
    """Some dimensions of a vector.

    Attributes:
      dims: how many, after those of the parts before it.
      mode: how they reach the model.
    """

    dims: int
    mode: Mode


def to_model(x: Float[np.ndarray, "*n d"], parts: Sequence[Part], stats: NormStats) -> Float[np.ndarray, "*n e"]:
    """A robot's vector, part by part, as the model sees it."""
    ends = np.cumsum([part.dims for part in parts])
    return np.concatenate(
        [
            part.mode.forth(x[..., end - part.dims : end], _taken(stats, end - part.dims, end))
            for part, end in zip(parts, ends.tolist(), strict=True)
        ],
        axis=-1,
    )


def to_robot(x: Float[np.ndarray, "*n e"], parts: Sequence[Part], stats: NormStats) -> Float[np.ndarray, "*n d"]:
    """The inverse of `to_model`."""
    found, seen, own = [], 0, 0
    for part in parts:
        width = part.mode.width(part.dims)
        found.append(part.mode.back(x[..., seen : seen + width], _taken(stats, own, own + part.dims)))
        seen, own = seen + width, own + part.dims
    return np.concatenate(found, axis=-1)


def _taken(stats: NormStats, start: int, stop: int) -> NormStats:
    return NormStats(**{key: None if value is None else value[start:stop] for key, value in vars(stats).items()})


def _bounds(target: str) -> NormStats:
    """What a converted rotation can be: upstream normalises it by that, not by the data."""
    high = np.full(WIDTHS[target], 1.0 if target in ("quaternion", "rotation_6d") else np.pi)
    return NormStats(0 * high, high, min=-high, max=high)
