"""Reads lerobot's ``config.json`` of a SmolVLA and that of its vision-language model.

The policy's file names no sizes of the VLM: heads and epsilon stand in the VLM's own file. A key that is unknown, and a
value that would change the model in a way that is not implemented here, are errors.
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from etils import epath

from clp_jax.errors import InputError
from clp_jax.files import read_json_object
from clp_jax.models.layers.siglip import SiglipSizes
from clp_jax.models.smolvla.architecture import EMPTY_CAMERA, Architecture, LlamaSizes, TrainingSettings
from clp_jax.models.smolvla.config_values import check_values
from clp_jax.models.smolvla.measured import Measured
from clp_jax.models.smolvla.processors import check_processors, robot_keys
from clp_jax.models.smolvla.vlm import VlmSettings, vlm_settings

_VLM = "HuggingFaceTB/SmolVLM2-500M-Video-Instruct"
"""lerobot's default of ``vlm_model_name``."""

DEFAULTS: dict[str, Any] = {
    "chunk_size": 50,
    "n_action_steps": 50,
    "tokenizer_max_length": 48,
    "pad_language_to": "longest",
    "num_steps": 10,
    "empty_cameras": 0,
    "prefix_length": -1,
    "min_period": 4e-3,
    "max_period": 4.0,
}
"""Settings that the architecture takes as they are, with lerobot's defaults."""

_TRAINING = {
    "freeze_vision_encoder": "freeze_vision_encoder",
    "train_expert_only": "train_expert_only",
    "train_state_proj": "train_state_proj",
    "optimizer_lr": "lr",
    "optimizer_betas": "betas",
    "optimizer_eps": "eps",
    "optimizer_weight_decay": "weight_decay",
    "optimizer_grad_clip_norm": "clip_norm",
    "scheduler_warmup_steps": "warmup_steps",
    "scheduler_decay_steps": "decay_steps",
    "scheduler_decay_lr": "end_lr",
}

_IMPLEMENTED: dict[str, tuple[Any, ...]] = {
    "type": ("smolvla",),
    "n_obs_steps": (1,),
    "attention_mode": ("cross_attn",),
    "self_attn_every_n_layers": (2,),
    "adapt_to_pi_aloha": (False,),
    "use_delta_joint_actions_aloha": (False,),
    "use_cache": (True,),
    "use_peft": (False,),
    "pad_language_to": ("longest", "max_length"),
}
"""Keys of which only some values are implemented."""

_NORMALIZATION = {"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"}
"""Where the configuration has no mapping."""

_CHECKED = (
    *("num_vlm_layers", "num_expert_layers", "expert_width_multiplier", "max_state_dim", "max_action_dim"),
    *("resize_imgs_with_padding", "normalization_mapping", "input_features", "output_features", "vlm_model_name"),
    "add_image_special_tokens",
)

_NO_MATTER = (
    *("device", "use_amp", "push_to_hub", "repo_id", "private", "tags", "license", "pretrained_path"),
    *("pretrained_revision", "load_vlm_weights", "compile_model", "compile_mode", "rtc_config"),
)
"""Keys that change neither what the model computes nor how it is trained here."""


def read_architecture(
    sizes: Measured, folder: epath.Path | None, *, dtype: str, vlm_config: str | os.PathLike[str] | None
) -> Architecture:
    """The architecture, from what the shapes tell and what the files say.

    Args:
      sizes: told by the shapes.
      folder: with the policy's ``config.json``.
      dtype: of activations.
      vlm_config: the VLM's ``config.json`` or its folder; looked for beside the policy if None.

    Raises:
      InputError: a file is missing, contradicts the shapes, or says what is not implemented.
    """
    file = None if folder is None else epath.Path(folder) / "config.json"
    if file is None or not file.exists():
        where = "it" if folder is None else str(folder)
        raise InputError(
            f"a SmolVLA needs lerobot's config.json beside its parameters, {where} has none; copy it there."
        )
    config = _known(read_json_object(file), str(file))
    check_values(config, str(file), state_dim=sizes.state_dim, action_dim=sizes.action_dim)
    vlm = vlm_settings(config.get("vlm_model_name", _VLM), file.parent, vlm_config, sizes)
    _check_shapes(config, vlm, sizes, str(file))
    cameras, dims = _features(config, str(file))
    norms = config.get("normalization_mapping", _NORMALIZATION)  # a kind that a given mapping lacks stays as it is
    kinds = {"state": "STATE", "actions": "ACTION"}
    check_processors(file.parent, dims, norms, config.get("tokenizer_max_length", DEFAULTS["tokenizer_max_length"]))
    return Architecture(
        vision=SiglipSizes(
            width=sizes.vision_width,
            depth=sizes.vision_depth,
            mlp_dim=sizes.vision_mlp_dim,
            num_heads=vlm.vision_heads,
            patch_size=sizes.patch_size,
            num_tokens=sizes.num_tokens,
        ),
        scale_factor=sizes.scale_factor,
        vlm=LlamaSizes(sizes.width, sizes.depth, sizes.mlp_dim),
        action=LlamaSizes(sizes.expert_width, sizes.expert_depth, sizes.expert_mlp_dim),
        num_heads=vlm.num_heads,
        num_kv_heads=vlm.num_kv_heads,
        head_dim=vlm.head_dim,
        rms_eps=vlm.rms_eps,
        vocab_size=sizes.vocab_size,
        action_dim=sizes.action_dim,
        state_dim=sizes.state_dim,
        true_action_dim=dims["ACTION"],
        true_state_dim=dims["STATE"],
        cameras=cameras,
        robot_keys=tuple(robot_keys(file.parent).items()),
        camera_sizes=tuple(_image_size(config, camera, sizes.image_size) for camera in cameras),
        as_they_are=tuple(name for name, kind in kinds.items() if norms.get(kind, "IDENTITY") == "IDENTITY"),
        image_tokens=_image_tokens(config, vlm, str(file)),
        training=_training(config),
        dtype=dtype,
        **{key: _as(default, config.get(key, default)) for key, default in DEFAULTS.items()},
    )


def _training(config: Mapping[str, Any]) -> TrainingSettings:
    defaults = dataclasses.asdict(TrainingSettings())
    said = {ours: config.get(key, defaults[ours]) for key, ours in _TRAINING.items()}
    return TrainingSettings(**{name: _as(defaults[name], value) for name, value in said.items()})


def _as(default: Any, value: Any) -> Any:
    """JSON writes 10 for 10.0, and tuples as lists."""
    return type(default)(value) if isinstance(default, float | tuple) else value


def _known(config: Mapping[str, Any], file: str) -> Mapping[str, Any]:
    """The configuration, unless it holds what is unknown or not implemented."""
    known = {*DEFAULTS, *_TRAINING, *_IMPLEMENTED, *_CHECKED, *_NO_MATTER}
    if unknown := sorted(config.keys() - known):
        raise InputError(
            f"{file} says {unknown[0]} = {config[unknown[0]]!r}, which neither clp_jax nor lerobot 0.6.1 "
            "knows; remove the key if it does not change the model."
        )
    for key, values in _IMPLEMENTED.items():
        if config.get(key, values[0]) not in values:
            allowed = " or ".join(repr(value) for value in values)
            raise InputError(f"{file} says {key} = {config[key]!r}; only {allowed} is implemented.")
    norms = config.get("normalization_mapping", {})
    for feature, allowed in {
        "VISUAL": ("IDENTITY",),
        **dict.fromkeys(("STATE", "ACTION"), ("MEAN_STD", "IDENTITY")),
    }.items():
        if norms.get(feature, allowed[0]) not in allowed:
            raise InputError(
                f"{file} says normalization_mapping {feature} = {norms[feature]!r}; only {' or '.join(allowed)} is "
                "implemented."
            )
    return config


def _check_shapes(config: Mapping[str, Any], vlm: VlmSettings, sizes: Measured, file: str) -> None:
    """Every number that stands both in a file and in the shapes must be the same."""
    if sizes.depth != sizes.expert_depth:
        raise InputError(f"the VLM has {sizes.depth} blocks and the expert {sizes.expert_depth}; they must be as many.")
    depth = config.get("num_vlm_layers", 16)
    size = [sizes.image_size] * 2
    said = {
        "num_vlm_layers": (depth if depth > 0 else vlm.blocks, sizes.depth),
        "num_expert_layers": (config.get("num_expert_layers", -1), sizes.expert_depth),
        "expert_width_multiplier": (int(sizes.width * config.get("expert_width_multiplier", 0.75)), sizes.expert_width),
        "max_state_dim": (config.get("max_state_dim", 32), sizes.state_dim),
        "max_action_dim": (config.get("max_action_dim", 32), sizes.action_dim),
        "resize_imgs_with_padding": (list(config.get("resize_imgs_with_padding", (512, 512)) or ()), size),
        "the VLM's num_attention_heads x head_dim": (vlm.num_heads * vlm.head_dim, sizes.query_dim),
        "the VLM's num_key_value_heads x head_dim": (vlm.num_kv_heads * vlm.head_dim, sizes.kv_dim),
        "the VLM's scale_factor": (vlm.scale_factor or sizes.scale_factor, sizes.scale_factor),
        "the VLM's vision heads": (vlm.vision_heads, sizes.vision_heads or vlm.vision_heads),
    }
    if config.get("num_expert_layers", -1) <= 0:
        said.pop("num_expert_layers")
    for key, (value, needed) in said.items():
        if value != needed:
            raise InputError(
                f"{file} and the parameters contradict each other: {key} is {value}, the parameters have {needed}; "
                "correct the file that is wrong."
            )


def _features(config: Mapping[str, Any], file: str) -> tuple[tuple[str, ...], dict[str, int]]:
    """Cameras in order, and the true dimensions of state and actions."""
    inputs, outputs = (config.get(f"{side}_features") or {} for side in ("input", "output"))
    cameras = [key for key, feature in inputs.items() if feature["type"] == "VISUAL"]
    # lerobot adds these when it builds the policy, at the end unless the file lists them already.
    cameras += [
        name for i in range(config.get("empty_cameras", 0)) if (name := EMPTY_CAMERA.format(i=i)) not in cameras
    ]
    found = {
        "STATE": inputs.get("observation.state"),
        "ACTION": outputs.get("action"),
    }
    for kind, feature in found.items():
        if feature is None:
            raise InputError(f"{file} lists no feature of type {kind}; give observation.state and action their shapes.")
    if not cameras:
        raise InputError(f"{file} lists no camera among its input_features.")
    return tuple(cameras), {kind: feature["shape"][0] for kind, feature in found.items() if feature is not None}


def _image_size(config: Mapping[str, Any], camera: str, default: int) -> tuple[int, int]:
    """Height and width of a camera's images, whose channels come first."""
    shape = ((config.get("input_features") or {}).get(camera) or {}).get("shape") or (3, default, default)
    return int(shape[1]), int(shape[2])


def _image_tokens(config: Mapping[str, Any], vlm: VlmSettings, file: str) -> tuple[int, int] | None:
    if not config.get("add_image_special_tokens", False):
        return None
    if vlm.image_tokens is None:
        raise InputError(
            f"{file} says add_image_special_tokens, whose ids stand in the tokenizer of the VLM; give its folder with "
            "--vlm-config."
        )
    return vlm.image_tokens
