"""What healing leaves of a cut, on a few observations: to choose among cuts before one is healed in earnest."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from clp_jax.analysis import loss_of
from clp_jax.data import CalibrationData
from clp_jax.healing import Healed, Repair, heal
from clp_jax.loading import LoadedModel
from clp_jax.models import Gates
from clp_jax.plan import PrunePlan
from clp_jax.progress import track_stage

OBSERVATIONS = 64
"""At most so many are fitted on, and as many of the held-out ones choose the regularisation."""


@dataclasses.dataclass(frozen=True)
class HealedCut:
    """A cut that was healed to be looked at.

    Attributes:
      loss: of the healed model on the held-out data.
      repairs: of the kept blocks, in the order in which data flows.
    """

    loss: float
    repairs: tuple[Repair, ...]


class HealedCuts:
    """Heals cuts of one model, each once; what they change in the weights is forgotten.

    Args:
      model: the full model.
      calibration: observations to fit on, of which `OBSERVATIONS` are used.
      held_out: observations of other episodes; all of them give the loss.
      batch_size: observations of one forward pass.
    """

    def __init__(
        self, model: LoadedModel, calibration: CalibrationData, held_out: CalibrationData, *, batch_size: int = 1
    ):
        self._model = model
        self._data = _some(calibration), _some(held_out)
        self._held_out, self._batch_size = held_out, batch_size
        self._found: dict[tuple[tuple[str, tuple[int, ...]], ...], HealedCut] = {}

    def of(self, plan: PrunePlan) -> HealedCut:
        """What healing leaves of a cut that removes something."""
        key = tuple((name, plan.removed(name)) for name in plan.towers)
        if key not in self._found:
            label = f"healing cut {len(self._found) + 1}"
            healed = heal(
                self._model,
                plan,
                *self._data,
                batch_size=self._batch_size,
                progress=lambda fits, _: track_stage(list(fits), label, unit="fits"),
            )
            self._found[key] = HealedCut(self._loss(healed), tuple(healed.repairs))
        return self._found[key]

    def _loss(self, healed: Healed) -> float:
        model = dataclasses.replace(self._model, architecture=healed.changes.architecture, params=healed.params)
        return loss_of(model, self._held_out, batch_size=self._batch_size)(Gates())

    def loss(self, group: Sequence[str]) -> Callable[[np.ndarray], float]:
        """The loss after healing as a function of one gate per block of a group of towers, 0 for those that go."""
        architecture = self._model.architecture

        def of_gates(gates: np.ndarray) -> float:
            keep = {name: np.flatnonzero(gates).tolist() for name in group}
            return self.of(
                PrunePlan.of(architecture.kind, architecture.depths, keep, coupled=architecture.coupled)
            ).loss

        return of_gates


def _some(data: CalibrationData) -> CalibrationData:
    """At most `OBSERVATIONS`, spread evenly over the rows."""
    rows = np.linspace(0, len(data) - 1, min(OBSERVATIONS, len(data)))
    return data.take(rows.round().astype(int))
