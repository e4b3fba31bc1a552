"""Which blocks to remove: criteria from evidence to a selection, one idea per file.

All criteria in `CRITERIA` have one signature, ``criterion(evidence, *, remove, seed=0) -> Selection``, honour protected
blocks and the period, and are deterministic.
"""

import contextlib
from collections.abc import Callable
from functools import wraps

from clp_jax.errors import InputError
from clp_jax.selection.baselines import angular, cosine, first, mse, random, residual
from clp_jax.selection.bootstrap import cka_interval, stability
from clp_jax.selection.evidence import Evidence, GateEvidence, check_how, combine
from clp_jax.selection.gates import gateprobe, gauss_newton, greedy
from clp_jax.selection.healed import healed
from clp_jax.selection.how_many import how_many
from clp_jax.selection.jumps import jump_table, jumps, knee
from clp_jax.selection.result import Selection
from clp_jax.selection.twins import clp, pool_size

__all__ = [
    "CRITERIA",
    "Evidence",
    "GateEvidence",
    "Selection",
    "available",
    "check_how",
    "cka_interval",
    "clp",
    "combine",
    "how_many",
    "jump_table",
    "jumps",
    "knee",
    "pool_size",
    "select",
    "stability",
]


def _whatever_the_seed(criterion: Callable[..., Selection]) -> Callable[..., Selection]:
    """Gives a criterion that draws nothing the signature of all."""

    @wraps(criterion)
    def with_seed(evidence: Evidence, *, remove: int, seed: int = 0) -> Selection:
        del seed
        return criterion(evidence, remove=remove)

    return with_seed


_DRAWS_NOTHING = {
    "clp": clp,
    "jumps": jumps,
    "gateprobe": gateprobe,
    "gauss-newton": gauss_newton,
    "greedy": greedy,
    "cosine": cosine,
    "angular": angular,
    "mse": mse,
    "residual": residual,
    "first": first,
}


def _healed(evidence: Evidence, *, remove: int, seed: int = 0) -> Selection:
    """`healed`, with the choices of all other criteria that the evidence allows."""
    choices = {}
    for name in available(evidence):
        if name != "healed":
            with contextlib.suppress(InputError):  # it knows too little for so many blocks
                choices[name] = CRITERIA[name](evidence, remove=remove, seed=seed)
    return healed(evidence, remove=remove, choices=choices)


CRITERIA: dict[str, Callable[..., Selection]] = {
    **{name: _whatever_the_seed(criterion) for name, criterion in _DRAWS_NOTHING.items()},
    "random": random,
    "healed": _healed,
}
"""Criterion by the name that a command takes."""

_NEEDS: dict[str, tuple[str, ...]] = {
    "clp": ("similarity",),
    "jumps": ("damage",),
    "gateprobe": ("sensitivity",),
    "gauss-newton": ("gradient", "gauss_newton"),
    "greedy": ("loss",),
    "cosine": ("cosine",),
    "angular": ("angle",),
    "mse": ("mse",),
    "residual": ("residual",),
    "first": (),
    "random": (),
    "healed": ("healed_loss",),
}


def available(evidence: Evidence) -> tuple[str, ...]:
    """Returns the criteria that this evidence allows.

    >>> available(Evidence.unmeasured(4))
    ('first', 'random')
    """
    return tuple(name for name, needs in _NEEDS.items() if all(evidence.has(need) for need in needs))


def select(criterion: str, evidence: Evidence, *, remove: int, seed: int = 0) -> Selection:
    """Removes blocks by the criterion of that name.

    Args:
      criterion: a key of `CRITERIA`.
      evidence: what calibration found out about the group of towers.
      remove: number of blocks to remove, see `how_many`.
      seed: for criteria that draw.

    Raises:
      InputError: unknown criterion, missing evidence, or no removal of that size is possible.

    >>> select("first", Evidence.unmeasured(4), remove=1).removed
    (3,)
    """
    if criterion not in CRITERIA:
        raise InputError(f"there is no criterion {criterion!r}; choose one of {', '.join(CRITERIA)}")
    missing = [need for need in _NEEDS[criterion] if not evidence.has(need)]
    if missing:
        raise InputError(
            f"criterion {criterion!r} needs {' and '.join(missing)}, which the calibration did not measure; "
            f"possible here: {', '.join(available(evidence))}"
        )
    return CRITERIA[criterion](evidence, remove=remove, seed=seed)
