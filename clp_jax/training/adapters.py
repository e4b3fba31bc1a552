"""LoRA for a checkpoint that has none: new adapters beside its weights."""

import dataclasses

import jax

from clp_jax.errors import InputError
from clp_jax.models import Architecture, abstract_params, init_params
from clp_jax.sharding import parameter_shardings
from clp_jax.trees import flatten, unflatten

VLM_RANK, ACTION_RANK = 16, 32
"""openpi's ranks, ``gemma_2b_lora`` and ``gemma_300m_lora``; alpha equals the rank."""


def with_adapters(
    architecture: Architecture, *, vlm_rank: int = VLM_RANK, action_rank: int = ACTION_RANK
) -> Architecture:
    """The architecture with adapters on the attention and the feed-forward of every expert.

    Raises:
      InputError: it has adapters already.
    """
    if any(expert.attn_lora_rank or expert.ffn_lora_rank for expert in architecture.experts):
        raise InputError("the checkpoint has LoRA adapters already; leave out --lora, they are trained as they are.")
    vlm = dataclasses.replace(architecture.vlm, attn_lora_rank=vlm_rank, ffn_lora_rank=vlm_rank)
    action = architecture.action
    if action is not None:
        action = dataclasses.replace(action, attn_lora_rank=action_rank, ffn_lora_rank=action_rank)
    return dataclasses.replace(architecture, vlm=vlm, action=action)


def init_adapters(architecture: Architecture, rng: jax.Array, mesh: jax.sharding.Mesh) -> dict:
    """Fresh adapters only, as a nested tree, sharded.

    Both factors are drawn with a deviation of 0.01, as openpi has it: the model is not exactly what it was before.
    """
    names = [path for path in flatten(abstract_params(architecture)) if "lora" in path]

    def init(rng):
        flat = flatten(init_params(architecture, rng))  # XLA drops what is not returned
        return unflatten({path: flat[path] for path in names})

    shardings = parameter_shardings(jax.eval_shape(init, rng), mesh)
    return jax.jit(init, out_shardings=shardings)(rng)
