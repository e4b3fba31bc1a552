"""LoRA for a checkpoint that has none: new adapters beside its weights."""

import jax

from clp_jax.errors import InputError
from clp_jax.models import Architecture, abstract_params, family_of, init_params
from clp_jax.models.layers.lora import is_adapter
from clp_jax.sharding import parameter_shardings
from clp_jax.trees import flatten, unflatten


def with_adapters(architecture: Architecture, ranks: tuple[int, ...] = ()) -> Architecture:
    """The architecture with new adapters; upstream's ranks where none are given.

    Raises:
      InputError: this family has no adapters or not so many ranks, or the checkpoint has some already.
    """
    lora = family_of(architecture).LORA
    if lora is None:
        raise InputError(f"LoRA is not for a {architecture.kind} model; leave out --lora.")
    if len(ranks) > len(lora.RANKS):
        raise InputError(
            f"--lora-ranks has {len(ranks)} numbers, and adapters of a {architecture.kind} have {len(lora.RANKS)}; "
            "leave the last out."
        )
    return lora.with_adapters(architecture, *ranks, *lora.RANKS[len(ranks) :])


def init_adapters(architecture: Architecture, rng: jax.Array, mesh: jax.sharding.Mesh) -> dict:
    """Fresh adapters only, as a nested tree, sharded.

    They are drawn as upstream draws them: openpi's both factors with a deviation of 0.01, so that the model is not
    exactly what it was before; NVIDIA's second factor is zero.
    """
    names = [path for path in flatten(abstract_params(architecture)) if is_adapter(path)]

    def init(rng):
        flat = flatten(init_params(architecture, rng))  # XLA drops what is not returned
        return unflatten({path: flat[path] for path in names})

    shardings = parameter_shardings(jax.eval_shape(init, rng), mesh)
    return jax.jit(init, out_shardings=shardings)(rng)
