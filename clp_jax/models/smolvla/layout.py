"""Names and axes of lerobot's SmolVLA files, and what their configuration says of depth. Checked with lerobot 0.6.1."""

from collections.abc import Mapping
from typing import Any

from clp_jax.errors import InputError
from clp_jax.models.layers.siglip import siglip_rules
from clp_jax.models.layers.torch_rules import Layout, Rule, copy, linear
from clp_jax.models.towers import Stack
from clp_jax.trees import assign

STACKS = (
    Stack(r"vision/Transformer/encoderblock/.*", "vision"),
    Stack(r"vlm/even/.*", "vlm", first=0, step=2),
    Stack(r"vlm/odd/.*", "vlm", first=1, step=2),
    Stack(r"action/even/.*", "action", first=0, step=2),
    Stack(r"action/odd/.*", "action", first=1, step=2),
)

VLM = "model.vlm_with_expert.vlm."
EXPERT = "model.vlm_with_expert.lm_expert."

_PROJECTIONS = ("state_proj", "action_in_proj", "action_out_proj", "action_time_mlp_in", "action_time_mlp_out")


def layout(paths: Mapping[str, object]) -> Layout:
    """The rule of every leaf of a SmolVLA; names are those of the file, which begin with ``model.``."""
    rules = [
        *siglip_rules("vision", f"{VLM}model.vision_model."),
        ("connector/kernel", linear(f"{VLM}model.connector.modality_projection.proj.weight")),
        ("embed_tokens", copy(f"{VLM}model.text_model.embed_tokens.weight")),
        ("lm_head", copy(f"{VLM}lm_head.weight")),
        *_stream_rules("vlm", f"{VLM}model.text_model."),
        *_stream_rules("action", EXPERT),
    ]
    for name in _PROJECTIONS:
        rules += [
            (f"{name}/kernel", linear(f"model.{name}.weight")),
            (f"{name}/bias", copy(f"model.{name}.bias")),
        ]
    return assign(rules, paths)


def _stream_rules(stream: str, prefix: str) -> list[tuple[str, Rule]]:
    rules = [(f"{stream}/norm", copy(f"{prefix}norm.weight"))]
    for kind in ("even", "odd"):
        ours, theirs = f"{stream}/{kind}", f"{prefix}layers.{{i}}"
        rules += [(f"{ours}/{x}_proj", linear(f"{theirs}.self_attn.{x}_proj.weight")) for x in "qkvo"]
        rules += [(f"{ours}/{x}_proj", linear(f"{theirs}.mlp.{x}_proj.weight")) for x in ("gate", "up", "down")]
        rules += [
            (f"{ours}/{x}_layernorm", copy(f"{theirs}.{x}_layernorm.weight")) for x in ("input", "post_attention")
        ]
    return rules


def config_with_depths(config: Mapping[str, Any], depths: Mapping[str, int]) -> dict[str, Any]:
    """The ``config.json`` of a policy whose VLM and expert have other depths, which lerobot then loads as it is.

    Args:
      config: of the policy before the cut.
      depths: blocks per tower after it. The image encoder's is not the policy's to say: it stands in the
        configuration of the vision-language model.

    Raises:
      InputError: VLM and expert differ.
    """
    vlm, action = depths["vlm"], depths["action"]
    if vlm != action:
        raise InputError(
            f"a SmolVLA with {vlm} blocks of the VLM and {action} of the expert does not run in lerobot; keep the same "
            "blocks of both."
        )
    return {**config, "num_vlm_layers": vlm, "num_expert_layers": -1}
