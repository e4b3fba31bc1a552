"""A checkpoint as a running model: architecture from its shapes, parameters on the devices, nothing cast or filled."""

import dataclasses
import inspect
import os
from typing import Any

import jax
import jax.numpy as jnp

from clp_jax.checkpoint import CheckpointSpec, FolderSpec, Spec, read_params, read_spec, stored_shapes
from clp_jax.checkpoint.opening import unchanged
from clp_jax.checkpoint.safetensors.leaves import TensorLeaves
from clp_jax.errors import InputError, blamed_on
from clp_jax.models import Architecture, abstract_params, family_of, family_of_kind, family_of_tree
from clp_jax.provenance import adapters_scale
from clp_jax.sharding import make_mesh, parameter_shardings
from clp_jax.trees import check_same_structure, flatten


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to run.

    Attributes:
      spec: the checkpoint it came from.
      architecture: sizes and activation dtype.
      params: parameters in the checkpoint's dtypes, sharded over ``mesh``.
      mesh: the devices.
    """

    spec: Spec
    architecture: Architecture
    params: dict
    mesh: jax.sharding.Mesh


def read_architecture(
    spec: Spec, *, dtype: str = "bfloat16", may_lack_adapters: bool = False, **settings: Any
) -> Architecture:
    """The architecture of a checkpoint, proven by comparing every name and shape with our model's.

    Args:
      spec: the checkpoint.
      dtype: of activations.
      may_lack_adapters: whether ``lora_scale`` may be meant for other adapters than the checkpoint's: new ones, or
        those of the model that it teaches.
      settings: what a family needs beside (``lora_scale``, ...); None leaves a setting to the family.

    Raises:
      InputError: not a checkpoint of a family that we know, a setting that its family or this checkpoint does not
        have, or some leaf is missing, unknown or of another shape; all are listed.
    """
    family = family_of_kind(spec.kind) if isinstance(spec, FolderSpec) else family_of_tree(spec.tree)
    given = {name: value for name, value in settings.items() if value is not None}
    known = inspect.signature(family.architecture_of).parameters
    foreign = [f"--{name.replace('_', '-')}" for name in given if name not in known]
    if foreign:
        raise InputError(f"{' and '.join(foreign)} says nothing about {spec.path}; leave it out.")
    shapes = stored_shapes(spec) if isinstance(spec, FolderSpec) else spec.tree
    read = family.architecture_of_tensors if isinstance(spec, FolderSpec) else family.architecture_of
    try:
        with blamed_on("its configuration", "copy the checkpoint again", verb="cannot be used"):
            architecture = read(shapes, spec.folder, dtype=dtype, **given)
            if "lora_scale" in given and not (may_lack_adapters or has_adapters(architecture)):
                raise InputError("it has no LoRA adapters, for which --lora-scale would be; leave the flag out.")
            if (scale := _trained_scale(spec, architecture, given.get("lora_scale"))) is not None:
                architecture = read(shapes, spec.folder, dtype=dtype, **given | {"lora_scale": scale})
    except InputError as error:
        raise InputError(f"{spec.path}: {error}") from None
    if isinstance(spec, FolderSpec):
        TensorLeaves(spec, architecture)  # compares every tensor
    else:
        what = f"the parameters of {spec.path} and of a {architecture.kind} model"
        check_same_structure(abstract_params(architecture), spec.tree, what=what)
    return architecture


def _trained_scale(spec: Spec, architecture: Architecture, given: float | None) -> float | None:
    """alpha / rank with which a checkpoint's adapters were trained, by its ``clp.json``; None if it says nothing."""
    trained = adapters_scale(spec.plan_record)
    if trained is None or not has_adapters(architecture):
        return None
    if given not in (None, trained):
        raise InputError(f"--lora-scale {given:g}: its adapters were trained with {trained:g}; leave the flag out.")
    return trained


def has_adapters(architecture: Architecture) -> bool:
    """Whether a model has LoRA adapters."""
    lora = family_of(architecture).LORA
    return lora is not None and lora.has_adapters(architecture)


def stored_tree(spec: Spec, architecture: Architecture) -> dict[str, Any]:
    """Shapes and stored dtypes of a checkpoint's parameters, in our tree; files of tensors hold no adapters."""
    return _tensors(spec, architecture).tree if isinstance(spec, FolderSpec) else spec.tree


def read_parameters(spec: Spec, architecture: Architecture, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """The parameters of a checkpoint in their stored dtypes, each large one split over the devices.

    Raises:
      InputError: it is damaged, or was replaced while it was read.
    """
    shardings = parameter_shardings(stored_tree(spec, architecture), mesh)
    with unchanged(spec):
        if isinstance(spec, FolderSpec):
            return _tensors(spec, architecture).read(flatten(shardings))
        return read_params(spec, sharding=shardings)


def _tensors(spec: FolderSpec, architecture: Architecture) -> TensorLeaves:
    lora = family_of(architecture).LORA
    return TensorLeaves(spec, architecture if lora is None else lora.without_adapters(architecture))


def default_dtype() -> str:
    """The activation dtype if none is given: float32 on CPUs, which emulate bfloat16 slowly, else bfloat16."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def load_model(
    checkpoint: str | os.PathLike[str] | Spec,
    *,
    dtype: str | None = None,
    fsdp_devices: int = 1,
    **settings: Any,
) -> LoadedModel:
    """Read a checkpoint onto all devices.

    Args:
      checkpoint: step folder or its ``params`` child, local or remote; a folder of safetensors files; or its spec.
      dtype: activation dtype, ``default_dtype()`` if None; parameters keep theirs.
      fsdp_devices: over how many devices each large parameter is split.
      settings: what neither weights nor files beside them tell: ``lora_scale``, alpha / rank of adapters; of
        SmolVLA and GR00T ``vlm_config``, the folder of the vision-language model's configuration.

    Raises:
      InputError: unreadable checkpoint, foreign parameters, unknown dtype or a mesh that does not fit.
    """
    spec = checkpoint if isinstance(checkpoint, CheckpointSpec | FolderSpec) else read_spec(checkpoint)
    dtype = dtype or default_dtype()
    if dtype not in ("float32", "bfloat16"):
        raise InputError(f"--dtype {dtype} is not an activation dtype; give float32 or bfloat16.")
    architecture = read_architecture(spec, dtype=dtype, **settings)
    mesh = make_mesh(fsdp_devices)
    params = read_parameters(spec, architecture, mesh)
    return LoadedModel(spec, architecture, params, mesh)


def check_finite(params: dict) -> None:
    """Raise on the first parameter that holds NaN or infinity.

    Raises:
      InputError: names the leaf.
    """
    finite = jax.jit(lambda tree: jax.tree.map(lambda x: jnp.isfinite(x).all(), tree))(params)
    for path, ok in jax.tree_util.tree_leaves_with_path(finite):
        if not bool(ok):
            name = "/".join(key.key for key in path)
            raise InputError(f"the checkpoint's {name} holds NaN or infinite values.")
