"""Run a model over calibration data and reduce its hidden states to similarity statistics per tower.

Each batch is one jitted call: forward pass, sampling of tokens, Grams and HSIC. Hidden states never leave the
device; what comes back per group of observations are [l, l] sums. A group is a few observations whose tokens are one
set of samples; because groups do not depend on the batch size or on the number of devices, neither does the result.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from clp_jax import cka
from clp_jax.aliases import AnyArray, Array, Tree
from clp_jax.data import Arrangement, CalibrationData
from clp_jax.distances import PairSums, pair_statistics
from clp_jax.errors import InputError
from clp_jax.models import Architecture, Gates, Rows, TowerStates, build, family_of, towers_measured
from clp_jax.selection.evidence import Evidence
from clp_jax.sharding import batch_sharding, put, replicated

Samples = Literal["tokens", "observations", "tokens-per-observation"]
"""What a row of CKA is: a token; one mean-pooled row per observation; or the authors' code's variant, in which each
observation's tokens give a CKA of their own and these are averaged."""

StateScale = Literal["raw", "rms"]
Estimator = Literal["biased", "debiased"]
VARIANTS: tuple[tuple[StateScale, Estimator], ...] = (
    ("raw", "biased"),
    ("raw", "debiased"),
    ("rms", "biased"),
    ("rms", "debiased"),
)
"""The four CKA matrices that one pass gives: states as they are or RMS-normalised, biased (the paper's) or debiased."""

MASSIVE_CHANNEL_SHARE = 0.5
"""From this share of a state's variance in one channel on, raw CKA mostly describes that channel."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How hidden states become samples.

    Attributes:
      samples: see `Samples`.
      max_samples: tokens of a group that are used, drawn at random once for all groups; bounds the cost of the Grams.
        None: the family's ``MAX_SAMPLES``.
      optional: also measure the towers that are measured on request alone: the image encoder.
    """

    samples: Samples = "tokens"
    max_samples: int | None = None
    optional: bool = False

    def of(self, architecture: Architecture) -> "Sampling":
        """The same with the number that it comes to for a model."""
        most = family_of(architecture).MAX_SAMPLES if self.max_samples is None else self.max_samples
        return dataclasses.replace(self, max_samples=most)


class CalibrationBatch(NamedTuple):
    """One step's input: observations with their noise and times; ``present`` is False for empty slots."""

    inputs: dict[str, Array]
    present: Bool[Array, " b"]


class GroupStatistics(NamedTuple):
    """Statistics of one tower; every leaf has a leading axis of groups.

    Attributes:
      hsic: the four `VARIANTS` [g, 4, l, l].
      pairs: sums of cosine, angle, residual and squared difference over samples.
      share: share of the variance in the largest channel [g, l].
      finite: whether a state is finite on all valid samples [g, l].
      count: valid samples [g].
    """

    hsic: Float[Array, "g variants l l"]
    pairs: PairSums
    share: Float[Array, "g l"]
    finite: Bool[Array, "g l"]
    count: Float[Array, " g"]


@dataclasses.dataclass(frozen=True)
class TowerSimilarity:
    """What one pass tells about a tower of ``depth`` blocks; states are numbered 0..depth.

    Attributes:
      cka: the four `VARIANTS` [4, l, l].
      cosine: mean cosine of the two states of a token [l, l].
      angle: mean angle in half turns [l, l].
      residual: root of the mean of |h_j - h_i|^2 / |h_i|^2 [l, l].
      mse: mean squared difference [l, l].
      channel_share: share of the variance in the largest channel [l].
      clusters: HSIC sums per cluster of episodes and variant [c, 4, l, l]; one cluster if there is nothing to resample.
      read: False for a state that says nothing about redundancy: nothing reads it, or it is of another scale.
      samples: valid samples in all groups.
    """

    cka: Float[np.ndarray, "variants l l"]
    cosine: Float[np.ndarray, "l l"]
    angle: Float[np.ndarray, "l l"]
    residual: Float[np.ndarray, "l l"]
    mse: Float[np.ndarray, "l l"]
    channel_share: Float[np.ndarray, " l"]
    clusters: Float[np.ndarray, "c variants l l"]
    read: Bool[np.ndarray, " l"]
    samples: int

    @property
    def depth(self) -> int:
        """Blocks of the tower."""
        return len(self.read) - 1

    def matrix(self, states: StateScale, estimator: Estimator) -> Float[np.ndarray, "l l"]:
        """The CKA matrix of one variant."""
        return self.cka[VARIANTS.index((states, estimator))]

    @property
    def massive_states(self) -> list[int]:
        """States in which a single channel holds most of the variance, so that raw CKA cannot be trusted."""
        return [int(i) for i in np.flatnonzero((self.channel_share > MASSIVE_CHANNEL_SHARE) & self.read)]

    def evidence(self, states: StateScale = "raw", estimator: Estimator = "biased") -> Evidence:
        """What selection needs, with NaN where a state is read by nobody; ``damage`` is always rms and debiased."""

        def known(matrix: np.ndarray) -> np.ndarray:
            return np.where(self.read[:, None] & self.read[None, :], matrix.astype(np.float64), np.nan)

        return Evidence(
            depth=self.depth,
            similarity=known(self.matrix(states, estimator)),
            damage=known(1.0 - self.matrix("rms", "debiased")),
            cosine=known(self.cosine),
            angle=known(self.angle),
            residual=known(self.residual),
            mse=known(self.mse),
        )


def batches(
    data: CalibrationData, arrangement: Arrangement, groups_per_batch: int, mesh: jax.sharding.Mesh
) -> Iterator[CalibrationBatch]:
    """The groups of an arrangement, ``groups_per_batch`` at a time, placed on the devices.

    The last batch is filled with empty slots, so that every batch has the same shape and compiles once.
    """
    slots = arrangement.slots
    empty = np.full((-len(slots) % groups_per_batch, slots.shape[1]), -1)
    for part in np.concatenate([slots, empty]).reshape(-1, groups_per_batch * slots.shape[1]):
        arrays = data.take(np.maximum(part, 0)).arrays
        inputs = {key: value for key, value in arrays.items() if key != "episode_index"}
        yield put(CalibrationBatch(inputs, part >= 0), batch_sharding(mesh))


def batch_statistics(
    architecture: Architecture, rows: Rows, sampling: Sampling, group_size: int, params: Tree, batch: CalibrationBatch
) -> dict[str, GroupStatistics] | dict[str, tuple[Array, Array]]:
    """Forward pass and reduction, to be jitted as one.

    Returns:
      Per tower its `GroupStatistics`; with ``samples="observations"`` pooled rows [l, b, d] and their validity [b]
      instead.
    """
    model = build(architecture, rows)
    _, towers = family_of(architecture).forward(model, params, batch.inputs, gates=Gates(), capture=True)
    towers = {tower.name: towers[tower.name] for tower in towers_measured(architecture, optional=sampling.optional)}
    towers = {name: TowerStates(t.states, t.valid & batch.present[:, None]) for name, t in towers.items()}
    if sampling.samples == "observations":
        return {name: _pooled(tower) for name, tower in towers.items()}
    most = sampling.of(architecture).max_samples
    assert most is not None
    return {name: _grouped_statistics(tower, group_size, most) for name, tower in towers.items()}


def collect(
    architecture: Architecture,
    params: Tree,
    batch_iterator: Iterable[CalibrationBatch],
    arrangement: Arrangement,
    sampling: Sampling = Sampling(),
    *,
    mesh: jax.sharding.Mesh,
) -> dict[str, TowerSimilarity]:
    """Similarity statistics of every tower from one pass over the calibration data.

    Args:
      architecture: of the model.
      params: its parameters, on the mesh.
      batch_iterator: from `batches` with the same arrangement.
      arrangement: groups and clusters.
      sampling: what a sample is.
      mesh: devices; results come back replicated.

    Raises:
      InputError: fewer than four valid samples, or a state that is not finite.
    """
    step = statistics_step(architecture, sampling, arrangement.slots.shape[1], mesh)
    parts = [step(params, batch) for batch in batch_iterator]
    towers = towers_measured(architecture, optional=sampling.optional)
    if sampling.samples == "observations":
        cluster = np.zeros(1, dtype=int)
        per_tower = [_pooled_statistics([part[tower.name] for part in parts]) for tower in towers]
    else:
        cluster = arrangement.cluster
        per_tower = [_joined([part[tower.name] for part in parts], len(cluster)) for tower in towers]
    average = sampling.samples == "tokens-per-observation"
    return {
        tower.name: _summary(tower.name, statistics, cluster, tower.incomparable, average_cka=average)
        for tower, statistics in zip(towers, per_tower, strict=True)
    }


@functools.lru_cache(maxsize=8)
def statistics_step(architecture: Architecture, sampling: Sampling, group_size: int, mesh: jax.sharding.Mesh):
    """The one compiled program of a pass, from parameters and a `CalibrationBatch`; kept for the next pass."""
    function = functools.partial(batch_statistics, architecture, batch_sharding(mesh), sampling, group_size)
    return jax.jit(function, out_shardings=replicated(mesh))


def samples_of_group(
    valid: Bool[AnyArray, "g t"], max_samples: int, *, seed: int = 0
) -> tuple[Int[Array, "g n"], Bool[Array, "g n"]]:
    """Which tokens of each group are samples: up to ``max_samples`` valid ones, drawn without replacement.

    One random order of the token positions serves all groups; each takes its first valid ones. So every position is
    equally likely, and the same data gives the same samples on any number of devices.
    """
    count = valid.shape[1]
    order = jax.random.permutation(jax.random.key(seed), count)
    ranked = order[jnp.argsort(~valid[:, order], axis=1, stable=True)]
    chosen = ranked[:, : min(max_samples, count)]
    return chosen, jnp.take_along_axis(valid, chosen, axis=1)


def _grouped_statistics(tower: TowerStates, group_size: int, max_samples: int) -> GroupStatistics:
    states, valid = tower.states, tower.valid
    layers, b, s, width = states.shape
    groups = b // group_size
    states = states.reshape(layers, groups, group_size * s, width)
    valid = valid.reshape(groups, group_size * s)
    if valid.shape[1] > max_samples:
        chosen, valid = samples_of_group(valid, max_samples)
        states = jnp.take_along_axis(states, chosen[None, :, :, None], axis=2)
    return jax.vmap(group_statistics, in_axes=(1, 0))(states, valid)


def group_statistics(states: Float[Array, "l n d"], valid: Bool[Array, " n"]) -> GroupStatistics:
    """Everything that is kept of one set of samples (no group axis)."""
    sums = cka.gram_sums(states, valid)._asdict()
    hsic = jnp.stack([cka.hsic(sums[scale], debiased=estimator == "debiased") for scale, estimator in VARIANTS])
    finite = jnp.all(jnp.isfinite(states) | ~valid[None, :, None], axis=(1, 2))
    share = cka.channel_share(states, valid)
    pairs = pair_statistics(states, valid)
    return GroupStatistics(hsic, pairs, share, finite, pairs.count)


def _pooled(tower: TowerStates) -> tuple[Float[Array, "l b d"], Bool[Array, " b"]]:
    """Mean over the valid tokens of each observation, in float32."""
    weight = tower.valid.astype(jnp.float32)
    total = jnp.einsum("lbsd,bs->lbd", tower.states.astype(jnp.float32), weight, precision=jax.lax.Precision.HIGHEST)
    count = weight.sum(axis=1)
    return total / jnp.maximum(count, 1)[None, :, None], count > 0


def _pooled_statistics(parts: list[tuple[Array, Array]]) -> GroupStatistics:
    states = jnp.concatenate([states for states, _ in parts], axis=1)
    valid = jnp.concatenate([valid for _, valid in parts])
    statistics = jax.jit(group_statistics)(states, valid)
    return jax.tree.map(lambda x: np.asarray(x)[None], statistics)


def _joined(parts: list[GroupStatistics], groups: int) -> GroupStatistics:
    """All groups in host memory, without the empty ones that filled the last batch."""
    return jax.tree.map(lambda *x: np.concatenate([np.asarray(y) for y in x])[:groups], *parts)


def _summary(
    name: str,
    statistics: GroupStatistics,
    cluster: Int[np.ndarray, " g"],
    incomparable: tuple[int, ...],
    *,
    average_cka: bool,
) -> TowerSimilarity:
    """Sum over groups, then divide."""
    used = statistics.count >= 4
    if not used.any():
        most = int(statistics.count.max())
        raise InputError(
            f"tower {name!r} has at most {most} valid samples in a group; CKA needs 4. "
            "Give more observations, a larger --group-size, or tokens as samples."
        )
    statistics, cluster = jax.tree.map(lambda x: x[used], statistics), cluster[used]
    layers = statistics.share.shape[1]
    read = np.array([i not in incomparable for i in range(layers)])
    broken = ~statistics.finite.all(axis=0) & read
    if broken.any():
        i = int(np.flatnonzero(broken)[0])
        where = "its input" if i == 0 else f"block {i - 1}"
        raise InputError(
            f"tower {name!r} is not finite after {where}: the checkpoint or the data holds NaN or overflows."
        )
    # Groups count by their samples, as if their samples were one matrix.
    weight = statistics.count / statistics.count.sum()
    hsic = statistics.hsic * weight[:, None, None, None]
    clusters = np.stack([hsic[cluster == c].sum(axis=0) for c in np.unique(cluster)])
    if average_cka:
        matrices = np.nanmean(np.asarray(cka.cka(jnp.asarray(statistics.hsic))), axis=0)
    else:
        matrices = np.asarray(cka.cka(jnp.asarray(hsic.sum(axis=0))))
    pairs = jax.tree.map(lambda x: x.sum(axis=0), statistics.pairs)
    mean = {key: value / pairs.count for key, value in pairs._asdict().items() if key != "count"}
    return TowerSimilarity(
        cka=matrices,
        cosine=mean["cosine"],
        angle=mean["angle"],
        residual=np.sqrt(mean["residual"]),
        mse=mean["squared"],
        channel_share=(statistics.share * weight[:, None]).sum(axis=0),
        clusters=clusters,
        read=read,
        samples=int(statistics.count.sum()),
    )
