"""Several depths of one trained model behind one server, and which of them answers a request.

A request names a depth with ``keep_layers``, or the time that it has with ``latency_ms``: then the deepest answers that
keeps it.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from clp_jax.cuts import WHOLE, Cut, names_of, rows_of, smaller
from clp_jax.errors import InputError
from clp_jax.loading import LoadedModel
from clp_jax.sharding import parameter_shardings

DEPTH, TIME = "keep_layers", "latency_ms"
"""Keys of a request, and of what a client is told: the depths that are served, and their milliseconds."""


@dataclasses.dataclass(frozen=True)
class Wish:
    """What a request says about the depth; nothing takes the first that is served.

    Attributes:
      depth: its name.
      milliseconds: the time from a batch to its actions that must be kept.
    """

    depth: str | None = None
    milliseconds: float | None = None


ANY = Wish()


def wish_of(values: Mapping[str, Any], names: Sequence[str], used: Sequence[str] = ()) -> Wish:
    """What a request asks for.

    Args:
      values: of the request, by canonical key.
      names: of the depths that are served; none where there is but one model.
      used: keys that mean something else to this robot.

    Raises:
      InputError: a depth that is not served, no time, both, a map, or any of them where one model is served.

    >>> wish_of({"keep_layers": 9}, ["18", "9"])
    Wish(depth='9', milliseconds=None)
    """
    # Of a map that a request holds, `flat` leaves keys such as keep_layers/llm.
    asked = {key: value for key, value in values.items() if key.split("/")[0] in (DEPTH, TIME) and key not in used}
    if not asked:
        return ANY
    said = " and ".join(map(_short, asked))
    if not names:
        raise InputError(f"{said} chooses between depths, and one is served; clp serve --depths serves several.")
    if not asked.keys() <= {DEPTH, TIME}:
        raise InputError(f"{said}: {DEPTH} is one of {', '.join(names)} and {TIME} a number, neither is a map.")
    if len(asked) == 2:
        raise InputError(f"the request holds {DEPTH} and {TIME}; send one of them.")
    if TIME in asked:
        return Wish(milliseconds=_milliseconds(asked[TIME]))
    name = str(asked[DEPTH])
    if name not in names:
        raise InputError(f"{DEPTH} is {_short(name)}; served are {', '.join(names)}.")
    return Wish(depth=name)


def pick(wish: Wish, milliseconds: Mapping[str, float], blocks: Mapping[str, int]) -> str:
    """The depth that a request gets.

    Args:
      wish: of the request.
      milliseconds: of a batch by depth, in the order in which they are served.
      blocks: of all towers by depth. Cuts are nested, so they tell which is deeper, where a disturbed clock would not.

    Returns:
      Its name. Where no depth keeps the time, the fastest.

    >>> times, blocks = {"18": 40.0, "12": 30.0, "9": 22.0}, {"18": 63, "12": 51, "9": 45}
    >>> [pick(wish, times, blocks) for wish in (Wish(), Wish("12"), Wish(None, 35.0), Wish(None, 1.0))]
    ['18', '12', '12', '9']
    """
    if wish.milliseconds is None:
        return wish.depth or next(iter(milliseconds))
    fitting = [name for name, time in milliseconds.items() if time <= wish.milliseconds]
    return max(fitting, key=blocks.__getitem__) if fitting else min(milliseconds, key=milliseconds.__getitem__)


def models_of(model: LoadedModel, cuts: Sequence[Cut]) -> dict[str, LoadedModel]:
    """The models that cuts of a loaded one leave, by name, in their order; weights that all have are held once."""
    names = names_of(cuts, model.architecture)
    return {name: _cut_out(model, cut) for name, cut in zip(names, cuts, strict=True)}


def _cut_out(model: LoadedModel, cut: Cut) -> LoadedModel:
    if cut == WHOLE:
        return model
    rows = rows_of(model.architecture, model.params, cut)
    params = jax.device_put(rows, parameter_shardings(rows, model.mesh))
    return dataclasses.replace(model, architecture=smaller(model.architecture, cut), params=params)


def _short(value: Any) -> str:
    """Enough of a value to know it again, in one line."""
    return " ".join(str(value).split())[:40]


def _milliseconds(value: Any) -> float:
    number = value.item() if isinstance(value, np.ndarray | np.generic) and value.size == 1 else value
    if type(number) not in (int, float) or not number > 0:
        raise InputError(f"{TIME} is {_short(repr(value))}; send milliseconds above 0, as a number.")
    return float(number)
