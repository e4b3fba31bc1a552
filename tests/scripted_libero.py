"""A scripted policy that sees where things are: it lifts a can or a bottle of LIBERO and drops it into the basket."""

from collections.abc import Iterator

import numpy as np

from clp_jax.evaluation.libero import Libero

_OPEN, _CLOSE = -1.0, 1.0
_METRES = 0.05
"""Of the hand's motion for an action of 1."""


class Picking(Libero):
    """A task of libero_object with the next action of the script in the request, for a policy that repeats it.

    It solves tasks 0, 2, 3, 4, 7 and 9, but not 5; the rest was not tried.
    """

    def reset(self, episode: int) -> None:
        super().reset(episode)
        self._script = script(self)

    def request(self) -> dict:
        return {"state": next(self._script), "prompt": self.instruction}


def script(environment: Libero) -> Iterator[np.ndarray]:
    """Actions for ``environment``, each to be done before the next one is asked for."""

    def at(name: str) -> np.ndarray:
        return np.array(environment._seen[name])

    def above(place: np.ndarray, metres: float) -> np.ndarray:
        return place + np.array([0, 0, metres])

    def towards(place: np.ndarray, fingers: float, *, within: float = 0.01, most: int = 60) -> Iterator[np.ndarray]:
        for _ in range(most):
            way = place - at("robot0_eef_pos")
            if np.linalg.norm(way) < within:
                return
            yield np.array([*np.clip(way / _METRES, -1, 1), 0, 0, 0, fingers])

    thing, basket = (at(f"{name}_pos") for name in environment._env.obj_of_interest)
    yield from towards(above(thing, 0.12), _OPEN)
    yield from towards(above(thing, 0.01), _OPEN)
    for _ in range(12):
        yield np.array([0, 0, 0, 0, 0, 0, _CLOSE])
    yield from towards(above(thing, 0.3), _CLOSE, within=0.03)
    yield from towards(above(basket, 0.3), _CLOSE, within=0.03)
    while True:
        yield np.array([0, 0, 0, 0, 0, 0, _OPEN])
