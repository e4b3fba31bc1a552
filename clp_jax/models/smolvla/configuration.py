"""Reads lerobot's ``config.json`` of a SmolVLA and that of its vision-language model.

The policy's file names no sizes of the VLM: heads and epsilon stand in the VLM's own file. A key that is unknown, and a
value that would change the model in a way that is not implemented here, are errors.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from etils import epath

from clp_jax.errors import InputError
from clp_jax.models.layers.siglip import SiglipSizes
from clp_jax.models.smolvla.architecture import EMPTY_CAMERA, Architecture, LlamaSizes, TrainingSettings
from clp_jax.models.smolvla.measured import Measured

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


class VlmSettings(NamedTuple):
    """What the shapes do not tell of a vision-language model."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_eps: float
    vision_heads: int
    blocks: int | None = None
    scale_factor: int | None = None
    image_tokens: tuple[int, int] | None = None


PUBLISHED = {
    (960, 768): VlmSettings(num_heads=15, num_kv_heads=5, head_dim=64, rms_eps=1e-5, vision_heads=12, blocks=32),
    (576, 768): VlmSettings(num_heads=9, num_kv_heads=3, head_dim=64, rms_eps=1e-5, vision_heads=12, blocks=30),
}
"""SmolVLM2 of 500 M and of 256 M parameters, by the widths of text and image encoder."""


def read_architecture(
    sizes: Measured, folder: epath.Path | None, *, dtype: str, vlm_config: str | epath.Path | None
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
    config = _known(json.loads(file.read_text()), str(file))
    vlm = _vlm_settings(config, file.parent, vlm_config, sizes)
    _check_shapes(config, vlm, sizes, str(file))
    cameras, dims = _features(config, str(file))
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
            f"{file} says {unknown[0]} = {config[unknown[0]]!r}, which clp_jax does not know and lerobot 0.6.1 does not "
            "either; remove the key if it does not change the model."
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


def _image_tokens(config: Mapping[str, Any], vlm: VlmSettings, file: str) -> tuple[int, int] | None:
    if not config.get("add_image_special_tokens", False):
        return None
    if vlm.image_tokens is None:
        raise InputError(
            f"{file} says add_image_special_tokens, whose ids stand in the tokenizer of the VLM; give its folder with "
            "--vlm-config."
        )
    return vlm.image_tokens


def _vlm_settings(
    config: Mapping[str, Any], folder: epath.Path, given: str | epath.Path | None, sizes: Measured
) -> VlmSettings:
    """From the first of: the file that is given, a folder in or beside the checkpoint, the published sizes."""
    name = config.get("vlm_model_name", "HuggingFaceTB/SmolVLM2-500M-Video-Instruct")
    if given is not None:
        path = epath.Path(given)
        if not (path / "config.json" if path.is_dir() else path).exists():
            raise InputError(f"there is no {path}/config.json; --vlm-config is the VLM's config.json or its folder.")
        return _read_vlm(path if path.is_dir() else path.parent, path / "config.json" if path.is_dir() else path, sizes)
    for place in (folder / name, folder.parent / name, folder / "vlm"):
        if (place / "config.json").exists():
            return _read_vlm(place, place / "config.json", sizes)
    published = PUBLISHED.get((sizes.width, sizes.vision_width))
    if published is None:
        raise InputError(
            f"the sizes of the VLM {name} stand in its own config.json, which is neither in nor beside {folder}; give it "
            "with --vlm-config."
        )
    return published


def _read_vlm(folder: epath.Path, file: epath.Path, sizes: Measured) -> VlmSettings:
    """A VLM's configuration, with the defaults of transformers where a key is missing."""
    config = json.loads(file.read_text())
    text, vision = config.get("text_config", {}), config.get("vision_config", {})
    heads = text.get("num_attention_heads", 32)
    expected: dict[str, tuple[Any, Any]] = {
        "text_config.model_type": (text.get("model_type", "llama"), "llama"),
        "text_config.hidden_act": (text.get("hidden_act", "silu"), "silu"),
        "text_config.attention_bias": (text.get("attention_bias", False), False),
        "text_config.mlp_bias": (text.get("mlp_bias", False), False),
        "text_config.hidden_size": (text.get("hidden_size", 2048), sizes.width),
        "text_config.intermediate_size": (text.get("intermediate_size", sizes.mlp_dim), sizes.mlp_dim),
        "vision_config.hidden_size": (vision.get("hidden_size", 1152), sizes.vision_width),
        "vision_config.hidden_act": (vision.get("hidden_act", "gelu_pytorch_tanh"), "gelu_pytorch_tanh"),
        "vision_config.layer_norm_eps": (vision.get("layer_norm_eps", 1e-6), 1e-6),
        "vision_config.patch_size": (vision.get("patch_size", 32), sizes.patch_size),
        "vision_config.image_size": (vision.get("image_size", 224), sizes.image_size),
    }
    for key, (value, needed) in expected.items():
        if value != needed:
            raise InputError(
                f"{file} says {key} = {value!r}, this SmolVLA needs {needed!r}; give the file of its own VLM with "
                "--vlm-config."
            )
    return VlmSettings(
        num_heads=heads,
        num_kv_heads=text.get("num_key_value_heads") or heads,
        head_dim=text.get("head_dim") or sizes.width // heads,
        rms_eps=text.get("rms_norm_eps", 1e-6),
        vision_heads=vision.get("num_attention_heads", 16),
        blocks=text.get("num_hidden_layers"),
        scale_factor=config.get("scale_factor", 2),
        image_tokens=_token_ids(folder / "tokenizer.json", "<fake_token_around_image>", "<global-img>"),
    )


def _token_ids(file: epath.Path, *names: str) -> Any:
    """Ids of added tokens; None without a tokenizer or without them."""
    if not file.exists():
        return None
    ids = {token["content"]: token["id"] for token in json.loads(file.read_text()).get("added_tokens", ())}
    return tuple(ids[name] for name in names) if all(name in ids for name in names) else None
