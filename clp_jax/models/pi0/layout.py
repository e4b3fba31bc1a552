"""Names and axes of openpi's PyTorch π0 and π0.5, which are lerobot's too.

Checked by numbers against openpi's models_pytorch, commit 15a9616, and lerobot 0.6.1.
"""

from collections.abc import Mapping
from typing import Any

import jax

from clp_jax.models.family import Lengths
from clp_jax.models.layers.siglip import siglip_rules
from clp_jax.models.layers.torch_rules import Layout, Rule, copy, from_heads, gating, linear, projection, projections
from clp_jax.models.pi0.architecture import Architecture
from clp_jax.trees import assign

_HEADS = 8

VLM_HEAD = "paligemma_with_expert.paligemma.lm_head.weight"
"""Tied to the token embedding, which openpi's files leave out."""

EXPERT_HEAD = "paligemma_with_expert.gemma_expert.lm_head.weight"
"""A parameter of the PyTorch model that nothing uses and no JAX parameter stands for: zeros in exports."""


def _gemma_rules(suffix: str, prefix: str) -> list[tuple[str, Rule]]:
    """One expert: suffix "" with the names of the VLM, or "_1" with those of the action expert."""
    llm, layer = "PaliGemma/llm", f"{prefix}layers.{{i}}."
    attn, mlp = f"{layer}self_attn.", f"{layer}mlp."
    rules = [
        (f"{llm}/layers/attn/q_einsum{suffix}/w", projection(f"{attn}q_proj.weight")),
        (f"{llm}/layers/attn/kv_einsum{suffix}/w", projections(f"{attn}k_proj.weight", f"{attn}v_proj.weight")),
        (
            f"{llm}/layers/attn/qkv_einsum{suffix}/w",
            projections(*(f"{attn}{name}_proj.weight" for name in "qkv")),
        ),
        (f"{llm}/layers/attn/attn_vec_einsum{suffix}/w", from_heads(f"{attn}o_proj.weight")),
        (f"{llm}/layers/mlp{suffix}/gating_einsum", gating(f"{mlp}gate_proj.weight", f"{mlp}up_proj.weight")),
        (f"{llm}/layers/mlp{suffix}/linear", linear(f"{mlp}down_proj.weight")),
    ]
    norms = {
        f"{llm}/layers/pre_attention_norm{suffix}": f"{layer}input_layernorm",
        f"{llm}/layers/pre_ffw_norm{suffix}": f"{layer}post_attention_layernorm",
        f"{llm}/final_norm{suffix}": f"{prefix}norm",
    }
    for ours, theirs in norms.items():
        rules += [
            (f"{ours}/scale", copy(f"{theirs}.weight")),
            (f"{ours}/Dense_0/kernel", linear(f"{theirs}.dense.weight")),
            (f"{ours}/Dense_0/bias", copy(f"{theirs}.dense.bias")),
        ]
    return rules


def layout(paths: Mapping[str, object]) -> Layout:
    """The rule of every leaf of a π0 or π0.5 without adapters."""
    model = "paligemma_with_expert.paligemma.model."
    rules = [
        ("PaliGemma/llm/embedder/input_embedding", copy(VLM_HEAD)),
        *siglip_rules("PaliGemma/img", f"{model}vision_tower.vision_model."),
        ("PaliGemma/img/head/kernel", linear(f"{model}multi_modal_projector.linear.weight")),
        ("PaliGemma/img/head/bias", copy(f"{model}multi_modal_projector.linear.bias")),
        *_gemma_rules("", f"{model}language_model."),
        *_gemma_rules("_1", "paligemma_with_expert.gemma_expert.model."),
    ]
    for name in ("action_in_proj", "action_out_proj", "state_proj", "action_time_mlp_in", "action_time_mlp_out"):
        rules += [(f"{name}/kernel", linear(f"{name}.weight")), (f"{name}/bias", copy(f"{name}.bias"))]
    for name in ("time_mlp_in", "time_mlp_out"):
        rules += [(f"{name}/kernel", linear(f"{name}.weight")), (f"{name}/bias", copy(f"{name}.bias"))]
    return assign([(path, rule) for path, rule in rules if path in paths], paths)


def zero_tensors(
    architecture: Architecture, leaves: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.ShapeDtypeStruct]:
    """Tensors of the PyTorch model that no JAX parameter stands for, because nothing uses them."""
    assert architecture.action is not None
    shape = (architecture.vocab_size, architecture.action.width)
    return {EXPERT_HEAD: jax.ShapeDtypeStruct(shape, leaves["PaliGemma/llm/embedder/input_embedding"].dtype)}


def why_no_torch(architecture: Architecture, target: str) -> str | None:
    """Why PyTorch's π0 cannot be this model; None where it can."""
    if architecture.kind == "pi0_fast":
        return f"there is no π0-FAST to export to in {target}; use --to openpi."
    if any(expert.num_heads != _HEADS for expert in architecture.experts):
        found = architecture.vlm.num_heads
        return f"{target} has {_HEADS} attention heads written in its code, this model has {found}."
    return None


def torch_config(architecture: Architecture, lengths: Lengths, dtype: str) -> dict[str, Any]:
    """``config.json``: what openpi's converter writes, and what it leaves out."""
    return {
        "action_dim": architecture.action_dim,
        "action_horizon": lengths.horizon,
        "paligemma_variant": "gemma_2b",
        "action_expert_variant": "gemma_300m",
        "precision": dtype,
        "pi05": architecture.kind == "pi05",
        "max_token_len": lengths.prompt,
        "depths": {tower.name: tower.depth for tower in architecture.towers},
    }
