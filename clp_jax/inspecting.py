"""What a checkpoint is, from its metadata and the files beside it; no tensor is read."""

import collections
import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from clp_jax.checkpoint import CheckpointSpec, FolderSpec, Spec, fingerprint, read_spec
from clp_jax.errors import InputError
from clp_jax.files import read_json_object
from clp_jax.history import Step, history_of, reports_of
from clp_jax.loading import read_architecture
from clp_jax.models import Architecture, family_of, family_of_kind, family_of_tree, stack_of
from clp_jax.models.layers.lora import is_adapter
from clp_jax.models.stored import StoredFamily, stored_families
from clp_jax.processing.conventions import Conventions
from clp_jax.provenance import conventions_of, trained_with
from clp_jax.prune import depth_of
from clp_jax.stored_statistics import Statistics, statistics_of
from clp_jax.trees import flatten

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_CONFIG = "config.json"


class _Stored(NamedTuple):
    """One array of the stored form: the tower it is of, None outside of towers."""

    tower: str | None
    dtype: str
    parameters: int
    nbytes: int


@dataclasses.dataclass(frozen=True)
class Part:
    """A tower, or everything outside of towers.

    Attributes:
      name: of the tower; None for what is in none.
      depth: blocks.
      original_depth: blocks before it was first cut, where ``clp.json`` says so.
      kept: blocks of the original that are left, where ``clp.json`` says so.
      removed: blocks of the original that are gone.
      period: kinds of blocks that alternate; None if not known.
      cut_with: towers that must keep the same blocks.
      parameters: numbers.
      bytes: that they take, uncompressed.
      dtypes: arrays by dtype.
    """

    name: str | None
    depth: int | None
    original_depth: int | None
    kept: tuple[int, ...] | None
    removed: tuple[int, ...] | None
    period: int | None
    cut_with: tuple[str, ...]
    parameters: int
    bytes: int
    dtypes: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What a checkpoint is.

    Attributes:
      path: of the weights.
      kind: of the model; None if several are possible.
      title: name of the kind for people.
      form: how it is stored, in words.
      files: of the weights; None where the form does not count them.
      arrays: stored.
      parts: towers in data-flow order, then the rest.
      parameters: in all.
      bytes: in all, uncompressed.
      dtypes: arrays by dtype.
      action_horizon: actions of a chunk.
      max_token_len: tokens of a prompt.
      cameras: of the model; None also where it reads any.
      state_dim: of the model's state; None also where the model reads none beside the prompt.
      action_dim: of the model's actions; None also where they are tokens.
      lengths_said: whether the checkpoint itself says its lengths; else they are upstream's for the kind of model.
      not_read: why the architecture, and with it lengths, cameras and dimensions, could not be read.
      statistics: found beside the weights.
      adapters: arrays of low-rank adapters.
      adapter_parameters: in them.
      conventions: between a robot and the model, as its last fine-tuning recorded them; None if none did.
      history: what was done to it, in order.
      reports: pages about it, with whether they are still there.
      fingerprint: identity that copies share.
      train_state: whether the state of a training lies beside the weights.
    """

    path: str
    kind: str | None
    title: str
    form: str
    files: int | None
    arrays: int
    parts: tuple[Part, ...]
    parameters: int
    bytes: int
    dtypes: dict[str, int]
    action_horizon: int | None
    max_token_len: int | None
    cameras: tuple[str, ...] | None
    state_dim: int | None
    action_dim: int | None
    lengths_said: bool | None
    not_read: str | None
    statistics: tuple[Statistics, ...]
    adapters: int
    adapter_parameters: int
    conventions: Conventions | None
    history: tuple[Step, ...]
    reports: dict[str, bool]
    fingerprint: str
    train_state: bool

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        conventions = None if self.conventions is None else self.conventions.to_json()
        return json.loads(json.dumps(dataclasses.asdict(self) | {"conventions": conventions}))


def inspect_checkpoint(
    checkpoint: str | os.PathLike[str] | Spec, *, vlm_config: str | os.PathLike[str] | None = None
) -> Inspection:
    """Say what a checkpoint is; no tensor is read.

    Args:
      checkpoint: as of `loading.load_model`, or its spec.
      vlm_config: configuration of the vision-language model, for checkpoints that name it without holding it. Without
        it some are described in part, see `Inspection.not_read`.

    Raises:
      InputError: there is no complete checkpoint of a family that is known, its ``clp.json`` is damaged or of another
        checkpoint, or the configuration given does not fit.
    """
    spec = checkpoint if isinstance(checkpoint, CheckpointSpec | FolderSpec) else read_spec(checkpoint)
    family = family_of_kind(spec.kind) if isinstance(spec, FolderSpec) else family_of_tree(spec.tree)
    plan, history = history_of(spec)
    architecture, not_read = _architecture(spec, vlm_config)
    kind = architecture.kind if architecture is not None else (family.KINDS[0] if len(family.KINDS) == 1 else None)
    stored = _stored(spec)
    towers = _towers(spec, architecture)
    for name, tower in {} if plan is None else plan.towers.items():
        if name in towers and towers[name][0] != len(tower.keep):
            raise InputError(
                f"clp.json of {spec.path} says that tower {name!r} has {len(tower.keep)} blocks, but the weights hold "
                f"{towers[name][0]}; they are not of one checkpoint: copy both again"
            )
    parts = []
    for name, (depth, period, cut_with) in {**towers, None: (None, None, ())}.items():
        cut = None if plan is None or name is None else plan.towers.get(name)
        was = (None, None, None) if cut is None else (cut.depth, cut.keep, cut.removed)
        parts.append(Part(name, depth, *was, period, cut_with, *_sums(s for s in stored.values() if s.tower == name)))
    adapters = [stored[path] for path in stored if is_adapter(path)]
    form, files = _form(spec)
    return Inspection(
        path=str(spec.path),
        kind=kind,
        title=", ".join(family.TITLES.values()) if kind is None else family.TITLES[kind],
        form=form,
        files=files,
        arrays=len(stored),
        parts=tuple(parts),
        **dict(zip(("parameters", "bytes", "dtypes"), _sums(stored.values()), strict=True)),
        **_sizes(spec, architecture),
        not_read=not_read,
        statistics=tuple(statistics_of(spec)),
        adapters=len(adapters),
        adapter_parameters=sum(entry.parameters for entry in adapters),
        conventions=conventions_of(spec.plan_record),
        history=history,
        reports=reports_of(spec),
        fingerprint=fingerprint(spec),
        train_state=isinstance(spec, CheckpointSpec) and (spec.path.parent / "train_state").exists(),
    )


def _architecture(spec: Spec, vlm_config: str | os.PathLike[str] | None) -> tuple[Architecture | None, str | None]:
    """The architecture, or why it could not be read; what the user gave must fit."""
    try:
        return read_architecture(spec, vlm_config=vlm_config), None
    except InputError as error:
        if vlm_config is not None:
            raise
        return None, str(error).removeprefix(f"{spec.path}: ")


def _stored(spec: Spec) -> dict[str, _Stored]:
    """The arrays by their stored name."""
    if isinstance(spec, FolderSpec):
        found = {name: spec.block_of(name) for name in spec.tensors}
        return {
            name: _Stored(
                None if (block := found[name]) is None else block[0],
                _DTYPES.get(tensor.dtype, tensor.dtype),
                math.prod(tensor.shape),
                tensor.size,
            )
            for name, tensor in spec.tensors.items()
        }
    stacks = family_of_tree(spec.tree).STACKS
    arrays = {}
    for path, leaf in flatten(spec.tree).items():
        stack, count = stack_of(stacks, path), math.prod(leaf.shape)
        tower = None if stack is None else stack.tower
        arrays[path] = _Stored(tower, str(leaf.dtype), count, count * leaf.dtype.itemsize)
    return arrays


def _sums(stored: Iterable[_Stored]) -> tuple[int, int, dict[str, int]]:
    """Parameters, bytes and arrays by dtype."""
    entries = list(stored)
    dtypes = collections.Counter(entry.dtype for entry in entries)
    return sum(entry.parameters for entry in entries), sum(entry.nbytes for entry in entries), dict(dtypes)


def _towers(spec: Spec, architecture: Architecture | None) -> dict[str | None, tuple[int, int | None, tuple[str, ...]]]:
    """Depth, period and companions of every tower: of the model, else by the names in the files."""
    if architecture is not None:
        depths, towers, groups = architecture.depths, architecture.towers, architecture.groups
    elif isinstance(spec, FolderSpec):
        depths, towers, groups = spec.depths, spec.towers, spec.groups
    else:
        names = dict.fromkeys(stack.tower for stack in family_of_tree(spec.tree).STACKS)
        depths = {name: depth_of(spec.tree, name) for name in names if _has(spec, name)}
        config = _config_beside(spec)
        stored = _stored_family(config)
        towers, groups = ((), ()) if stored is None else (stored.towers(config), stored.groups)
    periods = {tower.name: tower.period for tower in towers}
    companions = {name: tuple(n for n in group if n != name) for group in groups for name in group}
    return {name: (depth, periods.get(name), companions.get(name, ())) for name, depth in depths.items()}


def _has(spec: CheckpointSpec, tower: str) -> bool:
    return any(entry.tower == tower for entry in _stored(spec).values())


def _config_beside(spec: CheckpointSpec) -> dict[str, Any]:
    """The config of the policy folder that a run began from; empty without one."""
    if spec.folder is None or not (spec.folder / _CONFIG).exists():
        return {}
    return read_json_object(spec.folder / _CONFIG)


def _stored_family(config: Mapping[str, Any]) -> StoredFamily | None:
    return next((family for family in stored_families() if family.recognises(config)), None)


def _form(spec: Spec) -> tuple[str, int | None]:
    """How it is stored, and in how many files."""
    if isinstance(spec, FolderSpec):
        many = f"safetensors, {len(spec.shards)} files with an index"
        return many if spec.index is not None else "safetensors, a single file", len(spec.shards)
    names = "names as training writes them" if spec.value_suffix else "names as released"
    step = spec.path.parent.name
    return f"Orbax{f', step {step}' if step.isdigit() else ''}, {names}", None


def _sizes(spec: Spec, architecture: Architecture | None) -> dict[str, Any]:
    """Lengths, cameras and dimensions."""
    names = ("action_horizon", "max_token_len", "cameras", "state_dim", "action_dim", "lengths_said")
    if architecture is None:
        return dict.fromkeys(names)
    family = family_of(architecture)
    lengths = family.lengths(architecture)
    told = trained_with(spec.plan_record)
    inputs, unread = family.inputs(architecture, lengths), family.any_size(architecture)
    state = None if "state" in unread else inputs["state"].shape[-1]
    horizon, prompt = told.get(names[0], lengths.horizon), told.get(names[1], lengths.prompt)
    cameras = family.camera_names(architecture)
    said = spec.folder is not None or names[0] in told
    return dict(zip(names, (horizon, prompt, cameras, state, architecture.action_dim, said), strict=True))
