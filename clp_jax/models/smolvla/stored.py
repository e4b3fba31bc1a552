"""A SmolVLA policy folder of lerobot 0.6: which tensor belongs to which block, and what its config says of depth."""

import copy
from collections.abc import Mapping
from typing import Any

from clp_jax.models.stored import Config, StoredFamily, StoredTower, whole_number

_MODEL = r"(?:model\.)?vlm_with_expert\."
_VLM_DEPTH = "num_vlm_layers"
_EXPERT_DEPTH = "num_expert_layers"
# lerobot's defaults, for what a config does not say
_DEFAULT_DEPTH = 16
_DEFAULT_EVERY = 2


def recognises(config: Config) -> bool:
    """Whether a ``config.json`` is one of a SmolVLA policy."""
    return config.get("type") == "smolvla"


def period(config: Config) -> int:
    """Kinds of blocks that alternate: every n-th layer is joint attention, the others cross-attend.

    With n = 1 (all joint), n <= 0 (all cross) or without cross-attention there is one kind.
    """
    every = whole_number(config, ["self_attn_every_n_layers"], _DEFAULT_EVERY)
    return every if "cross" in str(config.get("attention_mode", "cross_attn")) and every > 1 else 1


def towers(config: Config) -> tuple[StoredTower, ...]:
    """Vision tower, language model and action expert."""
    kinds = period(config)
    return (
        StoredTower(
            "vision",
            _MODEL + r"vlm\.model\.vision_model\.encoder\.layers\.{block}\..+",
            uncuttable="the config of the VLM says its depth, not that of the policy, so lerobot could not load a cut",
        ),
        StoredTower("vlm", _MODEL + r"vlm\.model\.text_model\.layers\.{block}\..+", kinds),
        StoredTower("action", _MODEL + r"lm_expert\.layers\.{block}\..+", kinds),
    )


def depths(config: Config) -> dict[str, int]:
    """Depths that the config names; the expert is as deep as the VLM unless it says otherwise.

    >>> depths({"num_vlm_layers": 12, "num_expert_layers": -1})
    {'vlm': 12, 'action': 12}
    """
    vlm = whole_number(config, [_VLM_DEPTH], _DEFAULT_DEPTH)
    expert = whole_number(config, [_EXPERT_DEPTH], -1)
    named = {"vlm": vlm, "action": expert if expert > 0 else vlm}
    return {name: depth for name, depth in named.items() if depth > 0}


def config_with_depths(config: Config, depths: Mapping[str, int]) -> dict[str, Any]:
    """The config of the same policy at other depths; ``num_expert_layers`` is only set where it was.

    >>> config_with_depths({"num_vlm_layers": 12, "num_expert_layers": -1}, {"vlm": 6, "action": 6})
    {'num_vlm_layers': 6, 'num_expert_layers': -1}
    """
    config = copy.deepcopy(dict(config))
    config[_VLM_DEPTH] = depths["vlm"]
    if whole_number(config, [_EXPERT_DEPTH], -1) > 0:
        config[_EXPERT_DEPTH] = depths["action"]
    return config


SMOLVLA = StoredFamily(
    kind="smolvla",
    recognises=recognises,
    towers=towers,
    groups=(("vlm", "action"),),
    depths=depths,
    config_with_depths=config_with_depths,
)
"""Both stacks share their layers: expert layer i reads what VLM layer i computes."""
