"""Heal a cut in closed form, without training: kept blocks learn to write what the removed ones would have written.

Where blocks i to j - 1 go, a block that expects state j of the full model is given state i. The block before the gap
ends in two products with weights, one of its attention and one of its feed-forward, and what it writes into the stream
is linear in these weights. So least squares over calibration data finds the change of the weights after which the block
ends in state j: first in its attention, then, with that healed, in its feed-forward. Every kept block after that is
fitted in the same way, whether a gap follows it or not, in the order in which data flows and each on the model as it is
by then: so a later one mends what an earlier one left.

The targets are states of the full model on the same observations, noise and times. Shapes, names and dtypes of all
leaves stay: what is healed is as valid a checkpoint as what was only cut. ReplaceMe (arXiv 2505.02819) folds a linear
map of the feed-forward's output into the same weights; here the weights themselves are fitted, and the attention's too.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clp_jax.aliases import Array, Leaf, Tree
from clp_jax.data import CalibrationData, arrange
from clp_jax.errors import InputError
from clp_jax.least_squares import Sums, fit, sums_of
from clp_jax.loading import LoadedModel
from clp_jax.models import Architecture, Gates, Rows, bias_of, blocks_of, build, family_of, kernels_of
from clp_jax.models.layers.gating import repeated
from clp_jax.plan import PrunePlan
from clp_jax.prune import Changes, apply_plan
from clp_jax.sensitivity import make_loss
from clp_jax.sharding import batch_sharding, parameter_shardings
from clp_jax.similarity import CalibrationBatch, batches
from clp_jax.trees import flatten, unflatten

RIDGES = (0.01, 0.1, 1.0)
"""Strengths of regularisation that are tried at every fit; held-out episodes choose among them."""

DRAWS = 4
"""Draws of noise and time for every observation, which share one pass over what does not depend on them."""

_ROUNDS_OF_GATED = 3
"""Fits of a branch whose gates differ from token to token, where one fit does not reach the least squares."""


@dataclasses.dataclass(frozen=True)
class Repair:
    """One kept block of one tower, and what was done to it.

    Attributes:
      tower: whose block.
      block: in the full model's numbers; None where a whole tower is left alone.
      removed: the blocks that go between it and the next kept one; those of the whole tower without a block.
      before: distance of the stream after the block from what the next one expects, on held-out data, in units of the
        latter's norm, with the blocks before this one healed; NaN where it was not measured.
      after: the same, healed.
      ridges: strength of regularisation chosen for each branch that was changed.
      why_not: why it could not be healed, or was not; None if it was, or if no fit did better on held-out data, when
        ``ridges`` is empty.
    """

    tower: str
    block: int | None
    removed: tuple[int, ...]
    before: float = math.nan
    after: float = math.nan
    ridges: Mapping[str, float] = dataclasses.field(default_factory=dict)
    why_not: str | None = None

    @property
    def target(self) -> int:
        """The state of the full model in which the block should end: what the next kept one expects."""
        assert self.block is not None
        return self.block + len(self.removed) + 1

    @property
    def outcome(self) -> str:
        """The distance that is left, or why the block was left alone."""
        if self.why_not:
            return f"left alone: {self.why_not}"
        return f"{self.after:.1%}" if self.ridges else "left alone: every fit does worse"

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        found = dataclasses.asdict(self)
        return {key: None if isinstance(x, float) and math.isnan(x) else x for key, x in found.items()}


@dataclasses.dataclass(frozen=True)
class Healed:
    """A healed cut.

    Attributes:
      repairs: of the kept blocks, in the order in which data flows.
      changes: of the pruned model's parameters.
      full: loss of the full model on the held-out data.
      pruned: loss of the model that is only cut.
      healed: loss of the healed one; if it were larger than ``pruned``, there are no changes.
      params: of the healed model, on the mesh.
    """

    repairs: list[Repair]
    changes: Changes
    full: float
    pruned: float
    healed: float
    params: Tree

    @property
    def won_back(self) -> float:
        """Share of the loss that the cut added which healing takes away again; NaN where the cut added none."""
        added = self.pruned - self.full
        return (self.pruned - self.healed) / added if added > 0 else math.nan


_WORSE = "the healed model does worse on held-out data"


def repairs_of(architecture: Architecture, plan: PrunePlan) -> list[Repair]:
    """The kept blocks which see another stream than before or must bridge a gap, in the order in which data flows."""
    found = []
    for tower in architecture.towers:
        removed = plan.removed(tower.name)
        if not removed:
            continue
        if not any(write.tower == tower.name for write in family_of(architecture).WRITES):
            found.append(Repair(tower.name, None, removed, why_not="this tower is not healed"))
            continue
        keep = plan.towers[tower.name].keep
        for block, following in zip(keep, (*keep[1:], tower.depth), strict=True):
            if following > removed[0]:
                why_not = "nothing compares with the state behind it" if following in tower.incomparable else None
                found.append(Repair(tower.name, block, tuple(range(block + 1, following)), why_not=why_not))
    return found


def heal(
    model: LoadedModel,
    plan: PrunePlan,
    calibration: CalibrationData,
    held_out: CalibrationData,
    *,
    draws: int = DRAWS,
    batch_size: int = 1,
    progress: Callable[[Iterable[Any], int], Iterable[Any]] = lambda steps, _: steps,
) -> Healed:
    """Fit the kept blocks of a cut, from the one before the first gap on, to what the full model does.

    Args:
      model: the full model.
      plan: the cut.
      calibration: observations to fit on.
      held_out: observations of other episodes, by which the regularisation is chosen and the result judged; a branch
        that would do worse on them is left alone.
      draws: of noise and time for each observation.
      batch_size: observations of one forward pass, rounded up to a multiple of the number of devices.
      progress: wraps the iterator of fits, of which there are so many.

    Returns:
      The changed leaves and what each block won. Memory: both models, and for the widest branch of f channels four
      matrices [f, f] in float32.

    Raises:
      InputError: the plan removes nothing.
    """
    check_removes(plan)
    work = Work(model, plan, calibration, held_out, draws=draws, batch_size=batch_size)
    full, before = work.loss(full=True), work.loss()
    for towers, block, branch in progress(work.fits, len(work.fits)):
        work.fit(towers, block, branch)
    after = work.loss()
    if not after < before:
        work.undo()
        after = before
    record = {
        "blocks": [repair.to_json() for repair in work.repairs],
        "observations": len(calibration),
        "held_out": len(held_out),
        "data_fingerprint": calibration.fingerprint,
        "draws": draws,
        "dtype": model.architecture.dtype,
        "loss": {"full": full, "pruned": before, "healed": after},
    }
    leaves = {path: np.asarray(leaf) for path, leaf in work.changed.items()}
    return Healed(work.repairs, Changes(work.smaller, leaves, record), full, before, after, work.params)


def check_removes(plan: PrunePlan) -> None:
    """Raise where a plan leaves nothing to heal."""
    if not any(plan.removed(name) for name in plan.towers):
        raise InputError("the plan removes nothing, so there is nothing to heal.")


class Work:
    """A cut that is being healed.

    Attributes:
      smaller: architecture of the cut model.
      params: its parameters, as far as they are healed.
      changed: leaves that differ from those of the cut, by path.
      repairs: as far as they are done.
    """

    def __init__(
        self,
        model: LoadedModel,
        plan: PrunePlan,
        calibration: CalibrationData,
        held_out: CalibrationData,
        *,
        draws: int = DRAWS,
        batch_size: int = 1,
    ):
        self.smaller = model.architecture.with_depths({name: len(cut.keep) for name, cut in plan.towers.items()})
        self.params = self._cut = _placed(apply_plan(model.params, plan), model.mesh)
        self.changed: dict[str, Array] = {}
        self.repairs = repairs_of(model.architecture, plan)
        self._model, self._plan = model, plan
        self._data = [with_draws(model.architecture, data, draws) for data in (calibration, held_out)]
        self._held_out = held_out
        devices = math.prod(model.mesh.shape.values())
        self._batch = math.ceil(batch_size / devices) * devices

    @property
    def fits(self) -> list[tuple[tuple[str, ...], int, str]]:
        """What is fitted together: towers of one group, the block, and the branch; in order."""
        order = list(self._model.architecture.depths)
        groups = sorted(self._model.architecture.groups, key=lambda group: order.index(group[0]))
        writes = family_of(self._model.architecture).WRITES
        found = []
        for group in groups:
            places = [(one.block, one.tower) for one in self.repairs if one.tower in group and one.why_not is None]
            for block in sorted({block for block, _ in places if block is not None}):
                towers = tuple(tower for at, tower in places if at == block)
                branches = dict.fromkeys(write.branch for write in writes if write.tower in towers)
                found += [(towers, block, branch) for branch in branches]
        return found

    def fit(self, towers: tuple[str, ...], block: int, branch: str) -> None:
        """Fit one branch of a block in all these towers, and keep what does better on held-out data."""
        group = next(group for group in self._model.architecture.groups if towers[0] in group)
        place = self._plan.towers[towers[0]].keep.index(block)
        target = next(one for one in self.repairs if (one.tower, one.block) == (towers[0], block)).target
        for _ in range(_ROUNDS_OF_GATED):
            calibration, held_out = (self._sums(data, group, branch, place, target) for data in self._data)
            for tower in towers:
                ridge, change, before, after = fit(calibration[tower], held_out[tower], RIDGES)
                if ridge is not None:
                    self._add(tower, branch, place, change)
                self._note(tower, block, branch, ridge, before, after)
            towers = tuple(tower for tower in towers if calibration[tower].gated)
            if not towers:
                break

    def undo(self) -> None:
        """Leave the cut as it was."""
        self.params, self.changed = self._cut, {}
        self.repairs = [
            dataclasses.replace(one, after=one.before, ridges={}, why_not=one.why_not or _WORSE) for one in self.repairs
        ]

    def loss(self, *, full: bool = False) -> float:
        """Of the cut model, as far as it is healed, or of the full one, on the held-out data's own noise and times."""
        models = (self._model.architecture, self._model.params), (self.smaller, self.params)
        return make_loss(*models[0 if full else 1], self._batches(self._held_out))(Gates())

    def _note(self, tower: str, block: int, branch: str, ridge: float | None, before: float, after: float) -> None:
        number = next(i for i, one in enumerate(self.repairs) if (one.tower, one.block) == (tower, block))
        so_far = self.repairs[number]
        ridges = dict(so_far.ridges) | ({} if ridge is None else {branch: ridge})
        before = before if math.isnan(so_far.before) else so_far.before
        self.repairs[number] = dataclasses.replace(so_far, before=before, after=after, ridges=ridges)

    def _sums(
        self, data: CalibrationData, group: tuple[str, ...], branch: str, place: int, target: int
    ) -> dict[str, Sums]:
        step, nothing = sums_step(self._model.architecture, self.smaller, group, branch, self._model.mesh)
        models, sums = (self._model.params, self.params), None
        for batch in self._batches(data):
            sums = nothing(*models, batch, place, target) if sums is None else sums
            sums = step(sums, *models, batch, place, target)
        assert sums is not None
        return sums

    def _batches(self, data: CalibrationData) -> Iterator[CalibrationBatch]:
        return batches(data, arrange(data.episodes, 1), self._batch, self._model.mesh)

    def _leaf_of(self, tower: str, branch: str, place: int) -> tuple[str, int]:
        """Path and row of a block's last weights in a branch."""
        family, leaves = family_of(self.smaller), flatten(self.params)
        for path in kernels_of(family.WRITES, leaves, tower, branch):
            blocks = blocks_of(family.STACKS, path, leaves[path].shape[0])
            if blocks is not None and place in blocks:
                return path, blocks.index(place)
        raise AssertionError(f"no leaf holds block {place} of tower {tower}")

    def _add(self, tower: str, branch: str, place: int, change: np.ndarray) -> None:
        """Add a change [f or f + 1, d] to the weights, and its last row to the bias."""
        leaves = flatten(self.params)
        kernel, row = self._leaf_of(tower, branch, place)
        weights = change[: math.prod(leaves[kernel].shape[1:-1])]
        leaves[kernel] = self.changed[kernel] = _add_to_row(leaves[kernel], row, weights)
        if (bias := bias_of(kernel, leaves)) is not None:
            leaves[bias] = self.changed[bias] = _add_to_row(leaves[bias], row, change[-1])
        self.params = unflatten(leaves)


def with_draws(architecture: Architecture, data: CalibrationData, draws: int) -> CalibrationData:
    """The observations with so many fixed draws of noise and time, on an axis behind the batch, if any are drawn."""
    if "actions" not in data.arrays:
        return data
    many = {
        "actions": np.broadcast_to(data.arrays["actions"][:1], (draws * len(data), *data.arrays["actions"].shape[1:]))
    }
    drawn = family_of(architecture).fixed_draw(architecture, many)
    # Neighbours in the sequence of times are far apart, so an observation's own draws cover all of them.
    per_observation = {key: x.reshape(len(data), draws, *x.shape[1:]) for key, x in drawn.items()}
    return dataclasses.replace(data, arrays=data.arrays | per_observation)


@functools.lru_cache(maxsize=8)
def sums_step(architecture: Architecture, smaller: Architecture, group: tuple[str, ...], branch: str, mesh: Any):
    """The compiled programs that add a batch to the sums of a fit, and that give sums of nothing.

    They give those of all towers of the group that have such a branch, so that one program serves all blocks: where a
    tower is left alone, which is behind its last block, the others' are read.

    Both take the parameters of the full model and of the cut one, a `CalibrationBatch`, the block's place in the cut
    model and the number of the state in which it should end; the first takes sums before them.
    """
    of_batch = functools.partial(_batch_sums, architecture, smaller, group, branch, batch_sharding(mesh))

    @functools.partial(jax.jit, donate_argnums=0)
    def step(sums: dict[str, Sums], *inputs: Any) -> dict[str, Sums]:
        return jax.tree.map(jnp.add, sums, sharded(of_batch(*inputs)))

    @jax.jit
    def nothing(*inputs: Any) -> dict[str, Sums]:
        return sharded(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(of_batch, *inputs)))

    def sharded(sums: dict[str, Sums]) -> dict[str, Sums]:
        return jax.lax.with_sharding_constraint(sums, parameter_shardings(sums, mesh))

    return step, nothing


def _batch_sums(
    architecture: Architecture,
    smaller: Architecture,
    group: tuple[str, ...],
    branch: str,
    rows: Rows,
    full: Tree,
    params: Tree,
    batch: CalibrationBatch,
    place: Array,
    target: Array,
) -> dict[str, Sums]:
    family = family_of(architecture)
    _, expected = family.forward(build(architecture, rows), full, batch.inputs, gates=Gates(), capture=True)
    _, found = family.forward(build(smaller, rows), params, batch.inputs, gates=Gates(), capture="writes")
    leaves, sums = flatten(params), {}
    for name in (write.tower for write in family.WRITES if write.branch == branch and write.tower in group):
        tower, write = found[name], found[name].writes[branch]
        wanted = expected[name].states[target].astype(jnp.float32)
        error = wanted - tower.states[place + 1].astype(jnp.float32)
        x = write.x[place].astype(jnp.float32)
        if any(bias_of(path, leaves) for path in kernels_of(family.WRITES, leaves, name, branch)):
            x = jnp.concatenate([x, jnp.ones((*x.shape[:-1], 1))], axis=-1)
        gate = None if write.gate is None else write.gate[place].astype(jnp.float32)
        valid = tower.valid & repeated(batch.present, tower.valid.shape[0])[:, None]
        sums[name] = sums_of(x, error, wanted, valid, gate)
    return sums


@functools.partial(jax.jit, static_argnums=1)
def _add_to_row(leaf: Array, row: int, change: Leaf) -> Array:
    """Added in float32, then rounded to the leaf's own dtype: later fits see what will be stored."""
    wide = leaf[row].astype(jnp.float32) + change.reshape(leaf.shape[1:])
    return leaf.at[row].set(wide.astype(leaf.dtype))


def _placed(tree: Tree, mesh: Any) -> Tree:
    """The tree under openpi's sharding rule."""
    return jax.tree.map(jax.device_put, tree, parameter_shardings(tree, mesh))
