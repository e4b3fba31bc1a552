"""A checkpoint as a running model: architecture from its shapes, parameters on the devices, nothing cast or filled."""

import dataclasses
import inspect
import os
from typing import Any

import jax
import jax.numpy as jnp

from clp_jax.checkpoint import CheckpointSpec, read_params, read_spec
from clp_jax.errors import InputError
from clp_jax.models import Architecture, abstract_params, family_of_tree
from clp_jax.sharding import make_mesh, parameter_shardings
from clp_jax.trees import check_same_structure


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to run.

    Attributes:
      spec: the checkpoint it came from.
      architecture: sizes and activation dtype.
      params: parameters in the checkpoint's dtypes, sharded over ``mesh``.
      mesh: the devices.
    """

    spec: CheckpointSpec
    architecture: Architecture
    params: dict
    mesh: jax.sharding.Mesh


def read_architecture(spec: CheckpointSpec, *, dtype: str = "bfloat16", **settings: Any) -> Architecture:
    """The architecture of a checkpoint, proven by comparing every name and shape with our model's.

    Args:
      spec: the checkpoint.
      dtype: of activations.
      settings: what a family needs beside (``lora_scale`` of π0, ...); None leaves a setting to the family.

    Raises:
      InputError: not a checkpoint of a family that we know, a setting that its family does not have, or some leaf is
        missing, unknown or of another shape; all are listed.
    """
    family = family_of_tree(spec.tree)
    given = {name: value for name, value in settings.items() if value is not None}
    known = inspect.signature(family.architecture_of).parameters
    foreign = [f"--{name.replace('_', '-')}" for name in given if name not in known]
    if foreign:
        raise InputError(f"{' and '.join(foreign)} says nothing about {spec.path}; leave it out.")
    try:
        architecture = family.architecture_of(spec.tree, spec.folder, dtype=dtype, **given)
    except InputError as error:
        raise InputError(f"{spec.path}: {error}") from None
    check_same_structure(
        abstract_params(architecture),
        spec.tree,
        what=f"the parameters of {spec.path} and of a {architecture.kind} model",
    )
    return architecture


def default_dtype() -> str:
    """The activation dtype if none is given: float32 on CPUs, which emulate bfloat16 slowly, else bfloat16."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def load_model(
    checkpoint: str | os.PathLike[str] | CheckpointSpec,
    *,
    dtype: str | None = None,
    fsdp_devices: int = 1,
    **settings: Any,
) -> LoadedModel:
    """Read a checkpoint onto all devices.

    Args:
      checkpoint: step folder or its ``params`` child, local or remote, or its spec.
      dtype: activation dtype, ``default_dtype()`` if None; parameters keep theirs.
      fsdp_devices: over how many devices each large parameter is split.
      settings: what neither weights nor files beside them tell: of π0 ``lora_scale``, alpha / rank of its adapters; of
        SmolVLA and GR00T ``vlm_config``, the folder of the vision-language model's configuration.

    Raises:
      InputError: unreadable checkpoint, foreign parameters, unknown dtype or a mesh that does not fit.
    """
    spec = checkpoint if isinstance(checkpoint, CheckpointSpec) else read_spec(checkpoint)
    dtype = dtype or default_dtype()
    if dtype not in ("float32", "bfloat16"):
        raise InputError(f"--dtype {dtype} is not an activation dtype; give float32 or bfloat16.")
    architecture = read_architecture(spec, dtype=dtype, **settings)
    mesh = make_mesh(fsdp_devices)
    params = read_params(spec, sharding=parameter_shardings(spec.tree, mesh))
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
