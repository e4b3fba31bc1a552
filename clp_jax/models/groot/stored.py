"""NVIDIA's GR00T-N1.5 folder: which tensor belongs to which block, and what its config says of depth."""

import copy
import re
from collections.abc import Iterable, Mapping
from typing import Any

from clp_jax.models.stored import Config, StoredFamily, StoredTower, whole_number

_PREFIX = r"(?:_groot_model\.)?"
_LLM = r"backbone\.eagle_model\.language_model\."
_PATHS = {
    "llm": ("backbone_cfg", "select_layer"),
    "vl": ("action_head_cfg", "vl_self_attention_cfg", "num_layers"),
    "dit": ("action_head_cfg", "diffusion_model_cfg", "num_layers"),
}
"""Where the config says how deep a tower is."""


def recognises(config: Config) -> bool:
    """Whether a ``config.json`` is NVIDIA's, or that of a lerobot policy around GR00T."""
    return config.get("model_type") == "gr00t_n1_5" or config.get("type") == "groot"


def why_not(config: Config) -> str | None:
    """lerobot's policy folders of GR00T have no depths to set."""
    if config.get("type") != "groot":
        return None
    base = config.get("base_model_path")
    return (
        f"is a lerobot policy that rebuilds GR00T from its base_model_path ({base}) before it loads these weights, so "
        "a cut of it could not be loaded; give a folder in NVIDIA's own layout (model_type gr00t_n1_5)"
    )


def towers(config: Config) -> tuple[StoredTower, ...]:
    """Vision tower, language model, the self-attention between them and the DiT, and the DiT."""
    depths(config)  # proves that the sections are there
    interleaved = config["action_head_cfg"]["diffusion_model_cfg"].get("interleave_self_attention", False)
    vision = _PREFIX + r"backbone\.eagle_model\.vision_model\.vision_model\.encoder\.layers\.{block}\..+"
    return (
        StoredTower(
            "vision", vision, uncuttable="no config of the checkpoint says its depth, so a cut could not be loaded"
        ),
        StoredTower("llm", _PREFIX + _LLM + r"model\.layers\.{block}\..+"),
        StoredTower("vl", _PREFIX + r"action_head\.vl_self_attention\.transformer_blocks\.{block}\..+"),
        StoredTower("dit", _PREFIX + r"action_head\.model\.transformer_blocks\.{block}\..+", 2 if interleaved else 1),
    )


def depths(config: Config) -> dict[str, int]:
    """Depths that the config names, which are all but the vision tower's."""
    return {name: whole_number(config, path) for name, path in _PATHS.items()}


def config_with_depths(config: Config, depths: Mapping[str, int]) -> dict[str, Any]:
    """The config of the same model at other depths.

    >>> config_with_depths({"backbone_cfg": {"select_layer": 12, "tune_llm": False}}, {"llm": 5})
    {'backbone_cfg': {'select_layer': 5, 'tune_llm': False}}
    """
    config = copy.deepcopy(dict(config))
    for name, path in _PATHS.items():
        if name in depths:
            place = config
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = depths[name]
    return config


def aliases(names: Iterable[str]) -> dict[str, str]:
    """The embedding table under its own name, where a file has only the tied head.

    With the head alone, loading leaves both without values and says nothing.
    """
    stored = set(names)
    heads = (re.fullmatch(f"({_PREFIX}{_LLM})" + r"lm_head\.weight", name) for name in stored)
    wanted = {f"{head[1]}model.embed_tokens.weight": head[0] for head in heads if head is not None}
    return {name: head for name, head in wanted.items() if name not in stored}


GROOT = StoredFamily(
    kind="groot",
    recognises=recognises,
    why_not=why_not,
    towers=towers,
    groups=(("llm",), ("dit",), ("vl",)),
    depths=depths,
    config_with_depths=config_with_depths,
    aliases=aliases,
)
"""Towers of their own: each keeps its own blocks. The DiT alternates between cross- and self-attention."""
