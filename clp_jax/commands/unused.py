"""Flags without effect are refused: whoever gives one believes that it does something."""

import dataclasses
from collections.abc import Collection
from typing import Any

from clp_jax.errors import InputError


def refuse_unused(config: Any, names: Collection[str], reason: str, *, instead: str = "") -> None:
    """Raise if flags are given that nothing reads on the way that was chosen.

    Args:
      config: the dataclass of a command; a flag is given where its value is not the default.
      names: of the fields that are not read.
      reason: why not, after the flags and a colon; {it} stands for them there.
      instead: what else can be done, in the same form.

    Raises:
      InputError: names the flags as they are typed.

    >>> from clp_jax.commands.plan_scale import PlanScale
    >>> config = PlanScale(checkpoint="pi0", topology=("v5e",), accumulate=2, augment=False)
    >>> refuse_unused(config, ("accumulate", "augment"), "nothing is trained")
    Traceback (most recent call last):
    clp_jax.errors.InputError: --accumulate and --no-augment: nothing is trained; leave them out.
    """
    given = [field for field in dataclasses.fields(config) if field.name in names and _is_given(config, field)]
    if not given:
        return
    *others, last = map(_as_typed, given)
    it, flags = ("them", f"{', '.join(others)} and {last}") if others else ("it", last)
    remedy = f"{instead}, or leave {{it}} out" if instead else "leave {it} out"
    raise InputError(f"{flags}: {reason}; {remedy}.".replace("{it}", it))


def _is_given(config: Any, field: dataclasses.Field) -> bool:
    return getattr(config, field.name) != field.default


def _as_typed(field: dataclasses.Field) -> str:
    """A switch that is on unless it is given is typed with a no."""
    name = field.name.replace("_", "-")
    return f"--no-{name}" if field.default is True else f"--{name}"
