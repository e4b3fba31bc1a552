"""What calibration tells about the blocks of one group of towers, and how towers that share a plan are joined.

States are numbered 0..depth (0 is the tower's input, l + 1 the residual stream after block l), blocks 0..depth-1. Entry
[i, j] of a matrix compares state i with state j, so block l on its own is entry [l, l + 1]. NaN means "not known": not
measured, or a state that nothing reads (π0's VLM stream after its last block). What is not known is never removed on
the strength of it.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from clp_jax.errors import InputError

MATRICES = ("similarity", "damage", "cosine", "angle", "residual", "mse")
_LOSSES = ("loss", "healed_loss")
_HIGH_IS_ALIKE = ("similarity", "cosine")


@dataclass(frozen=True, eq=False)
class GateEvidence:
    """Derivatives of the calibration loss with respect to gates alpha on the blocks' residual branches, at alpha = 1.

    A removed block is alpha = 0. Towers of one group share the gate of a block.

    Attributes:
      sensitivity: E |<dL/dh_l, h_l - h_(l-1)>| per block (GateProbe, arXiv 2606.27755).
      gradient: g = dL/dalpha per block.
      gauss_newton: Q = 2 E[(dv/dalpha)^T (dv/dalpha)] of a squared-error loss over outputs v.
    """

    sensitivity: Float[np.ndarray, " depth"] | None = None
    gradient: Float[np.ndarray, " depth"] | None = None
    gauss_newton: Float[np.ndarray, "depth depth"] | None = None


@dataclass(frozen=True, eq=False)
class Evidence:
    """What is known about one group of coupled towers, on their shared block index.

    Attributes:
      depth: number of blocks.
      similarity: CKA between states as the paper computes it (biased, raw states).
      damage: 1 - debiased CKA of RMS-normed states: the cost of feeding state i where state j was expected.
      cosine: mean cosine between the two states of a token.
      angle: mean angle between them, in half turns (0 to 1).
      residual: mean norm of the difference, relative to the norm of state i.
      mse: mean squared difference.
      gates: derivatives of the calibration loss.
      loss: calibration loss with blocks switched off, given one gate per block (1.0 = stays, 0.0 = off).
      healed_loss: held-out loss with such blocks cut out and the others healed, given the same.
      period: for towers that alternate kinds of blocks: every run of removed blocks has a length divisible by it.
      protected: blocks that must stay.
    """

    depth: int
    similarity: Float[np.ndarray, "l l"]
    damage: Float[np.ndarray, "l l"]
    cosine: Float[np.ndarray, "l l"] | None = None
    angle: Float[np.ndarray, "l l"] | None = None
    residual: Float[np.ndarray, "l l"] | None = None
    mse: Float[np.ndarray, "l l"] | None = None
    gates: GateEvidence | None = None
    loss: Callable[[np.ndarray], float] | None = None
    healed_loss: Callable[[np.ndarray], float] | None = None
    period: int = 1
    protected: frozenset[int] = frozenset()

    def __post_init__(self):
        if self.depth < 1 or self.period < 1:
            raise InputError(f"depth is {self.depth} and period {self.period}; both are at least 1")
        expected = dict.fromkeys(MATRICES, (self.depth + 1, self.depth + 1))
        expected |= {"sensitivity": (self.depth,), "gradient": (self.depth,), "gauss_newton": (self.depth, self.depth)}
        for name, shape in expected.items():
            value = self._get(name)
            if value is not None and value.shape != shape:
                raise InputError(f"{name} of a tower of {self.depth} blocks has shape {shape}, not {value.shape}")
        outside = [block for block in self.protected if not 0 <= block < self.depth]
        if outside:
            raise InputError(f"cannot protect block {min(outside)}: the blocks are numbered 0 to {self.depth - 1}")

    @classmethod
    def unmeasured(cls, depth: int, *, period: int = 1, protected: frozenset[int] = frozenset()) -> "Evidence":
        """Returns evidence that knows nothing but the depth; the criteria "first" and "random" need no more."""
        unknown = np.full((depth + 1, depth + 1), np.nan)
        return cls(depth, unknown, unknown, period=period, protected=protected)

    def has(self, name: str) -> bool:
        """Returns whether a matrix, an array of the gates, "loss" or "healed_loss" is known, at least in part."""
        value = self._get(name)
        if value is None or callable(value):
            return value is not None
        known = np.isfinite(value)
        if name in MATRICES:
            known &= ~np.eye(self.depth + 1, dtype=bool)
        return bool(known.any())

    def need(self, name: str) -> Any:
        """Returns what is known under that name (see `has`), else raises an `InputError`."""
        if not self.has(name):
            raise InputError(
                f"this criterion needs {name!r}, which was not measured; analyse with it or choose another"
            )
        return self._get(name)

    def adjacent(self, name: str) -> Float[np.ndarray, " depth"]:
        """Returns each block's own entry [l, l + 1] of a matrix that must be known."""
        return np.diagonal(self.need(name), offset=1).astype(np.float64)

    def _get(self, name: str) -> Any:
        return getattr(self, name) if name in (*MATRICES, *_LOSSES) else getattr(self.gates, name, None)


def combine(
    parts: Mapping[str, Evidence],
    *,
    how: str = "mean",
    weights: Mapping[str, float] | None = None,
    gates: GateEvidence | None = None,
    loss: Callable[[np.ndarray], float] | None = None,
    healed_loss: Callable[[np.ndarray], float] | None = None,
) -> Evidence:
    """Joins the evidence of towers that must keep the same blocks.

    Where one tower does not know a value, the others decide alone. Every tower's protection holds, and every period.

    Args:
      parts: tower name to its evidence, all of one depth, without gates and loss.
      how: "mean"; "min", the least similar tower decides (smallest similarity, largest damage); or a tower's name,
        that tower decides alone.
      weights: for "mean", tower name to a weight above 0; equal if absent.
      gates: derivatives for gates that act on all the towers at once; they do not follow from the towers' own.
      loss: loss for such gates.
      healed_loss: loss after healing for such gates.

    Raises:
      InputError: nothing to join, depths differ, an unknown ``how``, or weights that do not fit.

    >>> vlm = Evidence(1, *[np.array([[1.0, np.nan], [np.nan, 1.0]])] * 2)
    >>> action = Evidence(1, *[np.array([[1.0, 0.8], [0.8, 1.0]])] * 2)
    >>> combine({"vlm": vlm, "action": action}).adjacent("similarity")
    array([0.8])
    """
    _check_parts(parts, how, weights)
    one = next(iter(parts.values()))

    def join(name: str) -> Any:
        values = {tower: getattr(part, name) for tower, part in parts.items() if getattr(part, name) is not None}
        if how not in ("mean", "min"):
            return values.get(how)
        if not values:
            return None
        if how == "min":
            least_similar = np.fmin if name in _HIGH_IS_ALIKE else np.fmax  # both pass over NaN
            return least_similar.reduce(list(values.values()))
        return _known_mean(np.stack(list(values.values())), [(weights or {}).get(tower, 1.0) for tower in values])

    return Evidence(
        depth=one.depth,
        **{name: join(name) for name in MATRICES},
        gates=gates,
        loss=loss,
        healed_loss=healed_loss,
        period=math.lcm(*(part.period for part in parts.values())),
        protected=frozenset().union(*(part.protected for part in parts.values())),
    )


def check_how(how: str, towers: Collection[str]) -> None:
    """Refuse a way to join towers that `combine` does not know, which needs no evidence.

    Args:
      how: as for `combine`.
      towers: names of those that are joined.

    Raises:
      InputError: it is neither "mean" nor "min" nor the name of one of them.
    """
    if how not in ("mean", "min", *towers):
        raise InputError(f"cannot combine towers by {how!r}; give 'mean', 'min' or one of {', '.join(towers)}")


def _check_parts(parts: Mapping[str, Evidence], how: str, weights: Mapping[str, float] | None) -> None:
    if not parts:
        raise InputError("there is no tower to combine; name at least one")
    depths = {tower: part.depth for tower, part in parts.items()}
    if len(set(depths.values())) > 1:
        raise InputError(f"towers of different depths cannot be combined: {depths}; prune them on their own")
    check_how(how, parts)
    if weights is not None and how != "mean":
        raise InputError(f"weights are for 'mean', not for {how!r}; leave them out")
    if weights is not None and (set(weights) != set(parts) or min(weights.values()) <= 0):
        raise InputError(f"give one weight above 0 to each of {', '.join(parts)}, not {dict(weights)}")
    if any(part.has(name) for part in parts.values() for name in _LOSSES) or any(part.gates for part in parts.values()):
        raise InputError("one tower's gates and loss say nothing about removing from all; measure them for the group")


def _known_mean(values: Float[np.ndarray, "towers l l"], weights: list[float]) -> Float[np.ndarray, "l l"]:
    """Weighted mean over the towers that know a value; NaN where none does."""
    known = np.isfinite(values)
    weight = known * np.asarray(weights)[:, None, None]
    total = weight.sum(0)
    mean = np.full(total.shape, np.nan)
    return np.divide((weight * np.where(known, values, 0.0)).sum(0), total, out=mean, where=total > 0)
