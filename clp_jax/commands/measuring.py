"""Flags that say on what and how to measure, and how deep to cut, shared by ``clp analyse`` and ``clp prune``."""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Annotated, Any

import tyro

from clp_jax.analysis import Analysis, EvidenceOptions, analyse
from clp_jax.checkpoint import Spec, fingerprint, read_spec
from clp_jax.commands.data_flags import DataFlags, open_data
from clp_jax.commands.model_flags import ModelFlags
from clp_jax.data import CalibrationData
from clp_jax.errors import InputError
from clp_jax.healed_cuts import HealedCuts
from clp_jax.loading import LoadedModel, load_model, read_architecture
from clp_jax.models import Architecture, Shape
from clp_jax.planning import Depth, check_depth
from clp_jax.progress import track
from clp_jax.selection import check_how
from clp_jax.similarity import Estimator, Samples, Sampling, StateScale
from clp_jax.version import __version__

_LEROBOT_OBSERVATIONS = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class DepthFlags:
    """How much to remove; at most one of the first four."""

    keep_layers: tuple[str, ...] = ()
    """Blocks that stay: one number, e.g. 9, or where towers are cut on their own a number for each, e.g. llm=5 vl=3
    dit=8."""
    keep_ratio: tuple[str, ...] = ()
    """Share of the blocks that stay, rounded up: one number for all towers, or one for each as above."""
    threshold: float | None = None
    """Remove every twin with a CKA of at least this to its predecessor."""
    auto: bool = False
    """Remove up to the knee of the jump-cost curve, at most half."""
    keep_vision_layers: int | None = None
    """Blocks of the image encoder that stay (needs --vision); all if absent."""
    criterion: str | None = None
    """Which blocks go: clp (the paper's rule; the default where a depth or threshold is given), jumps (the default with
    --auto), greedy, gauss-newton, gateprobe, cosine, angular, mse, residual, first, random; with --heal also healed,
    which heals what the others choose, and takes what does best on held-out observations."""

    def depth(self) -> Depth:
        """How deep the towers shall be.

        Raises:
          InputError: a flag is no number, or no number for a tower.
        """
        return Depth(
            keep_layers=numbers(self.keep_layers, int, "--keep-layers", "9, or llm=5 dit=8"),
            keep_ratio=numbers(self.keep_ratio, float, "--keep-ratio", "0.5, or llm=0.5 dit=0.5"),
            threshold=self.threshold,
            auto=self.auto,
            keep_optional=self.keep_vision_layers,
        )

    def rule(self) -> str:
        """The criterion that is asked for, or the default."""
        depth = self.depth()
        return self.criterion or ("jumps" if depth.auto or not depth.is_given else "clp")


def numbers(words: tuple[str, ...], convert: Any, flag: str, example: str) -> Any:
    """One number, a number per tower, or None.

    Raises:
      InputError: a word is neither.
    """
    if not words:
        return None
    try:
        if len(words) == 1 and "=" not in words[0]:
            return convert(words[0])
        pairs = [word.split("=") for part in words for word in part.split(",") if word]
        found = {tower: convert(number) for tower, number in pairs}
    except ValueError:
        raise InputError(f"{flag} {' '.join(words)} cannot be read; write for example {flag} {example}.") from None
    if len(found) < len(pairs):
        raise InputError(f"{flag} names a tower twice.")
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeasureFlags(DataFlags, ModelFlags):
    """On which observations and how to measure."""

    max_observations: int | None = None
    """At most this many observations, held-out ones included; all of a .npz, 256 of a LeRobot set if absent."""

    samples: Samples = "tokens"
    """Rows of CKA: tokens; observations (mean-pooled); tokens-per-observation (one CKA each, then averaged)."""
    states: StateScale = "raw"
    """CKA of hidden states as they are (the paper) or RMS-normalised (robust to massive channels)."""
    estimator: Estimator = "biased"
    """The paper's biased CKA, or the debiased one (HSIC_1)."""
    couple: Annotated[str, tyro.conf.arg(metavar="mean|min|TOWER")] = "mean"
    """How towers that keep the same blocks are joined: the mean of their values, the least similar, or one tower's."""
    group_size: int = 4
    """Observations whose tokens form one HSIC estimate."""
    max_samples: int | None = None
    """At most this many tokens of a group are used; if absent 2048, or fewer where blocks are small for their width."""
    groups_per_batch: int = 1
    """Groups of one forward pass."""
    holdout_ratio: float = 0.25
    """Share of the episodes kept apart for the losses of the report."""
    vision: bool = False
    """Also measure the image encoder."""
    dtype: str | None = None
    """Activations: float32 or bfloat16; by default float32 on CPU, bfloat16 (openpi's) elsewhere."""
    fsdp_devices: int = 1
    """Split large parameters over this many devices."""
    seed: int = 0
    """Random seed of the hold-out, of the grouping and of the criterion random."""


def check_couple(config: MeasureFlags, architecture: Architecture | Shape) -> None:
    """Refuse a way to join the towers of a model that there is not, before anything is read or run.

    Raises:
      InputError: --couple names no tower of those that keep the same blocks, or the model has no such towers.
    """
    if not architecture.coupled and config.couple != MeasureFlags.couple:
        raise InputError(f"--couple: no towers of a {architecture.kind} model must keep the same blocks; leave it out.")
    for group in architecture.coupled:
        try:
            check_how(config.couple, group)
        except InputError as error:
            raise InputError(f"--couple: {error}.") from None


def check_vision(config: MeasureFlags, *, shows: bool) -> None:
    """Refuse to cut an image encoder that is not measured, and to measure one for nothing.

    Args:
      config: flags of a command; one without `DepthFlags` cuts no image encoder.
      shows: whether the command shows what it measured.

    Raises:
      InputError: --keep-vision-layers without --vision, or --vision alone where that does nothing.
    """
    keep = config.keep_vision_layers if isinstance(config, DepthFlags) else None
    if keep is not None and not config.vision:
        raise InputError("--keep-vision-layers needs a measured image encoder: give --vision, too.")
    if config.vision and keep is None and not shows:
        instead = "say with --keep-vision-layers how many stay, or " if isinstance(config, DepthFlags) else ""
        raise InputError(
            f"--vision: no block of the image encoder goes, so it is measured for nothing; {instead}leave it out."
        )


def evidence_options(config: MeasureFlags) -> EvidenceOptions:
    """The flags that say how matrices become evidence."""
    return EvidenceOptions(config.states, config.estimator, config.couple)


def analysis_of(folder: str, spec: Spec, *, otherwise: str = "") -> Analysis:
    """What ``clp analyse`` found out about a checkpoint.

    Args:
      folder: that it wrote.
      spec: the checkpoint.
      otherwise: what else can be done where the analysis is another checkpoint's, for the message.

    Raises:
      InputError: the folder holds no analysis, or that of another checkpoint.
    """
    analysis = Analysis.load(f"{folder}/similarity.npz")
    if analysis.meta.get("checkpoint_fingerprint") != fingerprint(spec):
        raise InputError(
            f"{folder} is the analysis of {analysis.meta.get('checkpoint')}, whose content differs from {spec.path}; "
            f"analyse this checkpoint{otherwise}."
        )
    return analysis


def load(
    checkpoint: str, data: str | Sequence[str], config: MeasureFlags
) -> tuple[LoadedModel, CalibrationData, CalibrationData | None]:
    """The model on its devices, calibration data and held-out data (None if there are too few episodes)."""
    spec = read_spec(checkpoint)
    architecture = read_architecture(spec, **config.model_settings())
    if isinstance(config, DepthFlags):
        check_depth(config.depth(), config.rule(), architecture)
    check_couple(config, architecture)
    # Small things first: a mistake in the data should not wait for gigabytes of parameters.
    observations = open_data(
        config,
        data,
        architecture,
        assets=spec.assets,
        hold_out_ratio=config.holdout_ratio,
        seed=config.seed,
        record=spec.plan_record,
    )
    most = config.max_observations
    if most is None and not observations.source.endswith(".npz"):
        most = _LEROBOT_OBSERVATIONS
    held_most = None if most is None else min(max(1, round(config.holdout_ratio * most)), most)
    held = observations.held_out(held_most, seed=config.seed)
    if most is not None and most <= len(held or ()):
        raise InputError(
            f"all of --max-observations {most} would be held out; give a larger number, or a smaller --holdout-ratio."
        )
    calibration = observations.calibration(None if most is None else most - len(held or ()), seed=config.seed)
    model = load_model(spec, dtype=config.dtype, fsdp_devices=config.fsdp_devices, **config.model_settings())
    return model, calibration, held


def load_to_heal(
    checkpoint: str, data: str | Sequence[str], config: MeasureFlags
) -> tuple[LoadedModel, CalibrationData, CalibrationData]:
    """The same, for healing: it fits differences between states, which bfloat16 would round away.

    Raises:
      InputError: there are too few episodes to hold any out.
    """
    dtype = "float32" if config.dtype is None else config.dtype
    model, calibration, held = load(checkpoint, data, dataclasses.replace(config, dtype=dtype))
    if held is None:
        raise InputError(
            "--heal chooses by episodes that are held out, and there are none: give data of more episodes, or a larger "
            "--holdout-ratio."
        )
    return model, calibration, held


def check_heals(config: Any, criteria: Collection[str]) -> None:
    """Raise where the criterion healed is asked for without --heal."""
    if "healed" in criteria and not config.heal:
        raise InputError("criterion 'healed' compares cuts by what healing leaves of them: give --heal, too.")


FEW = 16
"""With fewer held-out observations than this, what healing does best on may be chance."""


def few_held_out(held: CalibrationData | None) -> tuple[str, ...]:
    """A sentence for the user where little is held out for healing; none otherwise."""
    if held is None or len(held) >= FEW:
        return ()
    sentence = (
        f"Healing is chosen and judged by {len(held)} held-out observations alone: what does best on so few may be "
        "chance. Give more data, or a larger --holdout-ratio."
    )
    return (sentence,)


def healed_cuts(
    model: LoadedModel, calibration: CalibrationData, held: CalibrationData | None, config: MeasureFlags
) -> HealedCuts:
    """What heals cuts to be compared; there is held-out data where `load_to_heal` gave the model."""
    assert held is not None
    return HealedCuts(model, calibration, held, batch_size=config.group_size * config.groups_per_batch)


def measure(
    model: LoadedModel, calibration: CalibrationData, config: MeasureFlags, criteria: Collection[str]
) -> Analysis:
    """One pass of similarity statistics, and the loss derivatives that some of these criteria ask for.

    So does healed: gateprobe proposes cuts to heal, for one backward pass.
    """
    sampling = Sampling(config.samples, config.max_samples, optional=config.vision)
    analysis = analyse(
        model,
        calibration,
        sampling=sampling,
        group_size=config.group_size,
        groups_per_batch=config.groups_per_batch,
        gates=not {"gateprobe", "gauss-newton", "healed"}.isdisjoint(criteria),
        gauss_newton="gauss-newton" in criteria,
        seed=config.seed,
        progress=lambda batches, total: track(batches, "analysing", unit="batches", total=total),
    )
    meta = analysis.meta | {"checkpoint": str(model.spec.path), "checkpoint_fingerprint": fingerprint(model.spec)}
    return dataclasses.replace(analysis, meta=meta | {"clp_jax": __version__})
