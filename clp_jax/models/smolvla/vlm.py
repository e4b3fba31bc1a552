"""What only the configuration of SmolVLA's vision-language model says: heads, epsilon, ids of special tokens."""

import os
from typing import Any, NamedTuple

from etils import epath

from clp_jax.errors import InputError
from clp_jax.files import read_json_object
from clp_jax.folders import leads_out
from clp_jax.limits import Limits
from clp_jax.models.smolvla.measured import Measured


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


def vlm_settings(name: str, folder: epath.Path, given: str | os.PathLike[str] | None, sizes: Measured) -> VlmSettings:
    """From the first of: the file that is given, a folder in or beside the checkpoint, the published sizes.

    Args:
      name: of the vision-language model, for lerobot; one that leads out of a folder is not followed.
      folder: of the policy.
      given: ``config.json`` of the vision-language model, or its folder.
      sizes: told by the shapes.

    Raises:
      InputError: nothing says the sizes, or a file contradicts the shapes.
    """
    if given is not None:
        path = epath.Path(given)
        file = path / "config.json" if path.is_dir() else path
        if not file.exists():
            raise InputError(f"there is no file {file}; --vlm-config is the VLM's config.json or its folder.")
        return _read_vlm(file, sizes)
    for place in vlm_places(folder, name):
        if (place / "config.json").exists():
            return _read_vlm(place / "config.json", sizes)
    published = PUBLISHED.get((sizes.width, sizes.vision_width))
    if published is None:
        raise InputError(
            f"the sizes of the VLM {name} stand in its own config.json, which is neither in nor beside {folder}; give "
            "it with --vlm-config."
        )
    return published


def vlm_places(folder: epath.Path, name: str | None) -> list[epath.Path]:
    """Where a policy's folder may have the vision-language model's files, the first that has them counts.

    Args:
      folder: of the policy.
      name: of the vision-language model, for lerobot; one that leads out of a folder is not followed.
    """
    named = [] if name is None or leads_out(name) else [folder / name, folder.parent / name]
    return [*named, folder / "vlm"]


def _read_vlm(file: epath.Path, sizes: Measured) -> VlmSettings:
    """A VLM's configuration, with the defaults of transformers where a key is missing."""
    config = read_json_object(file)
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
    eps, vision_heads = text.get("rms_norm_eps", 1e-6), vision.get("num_attention_heads", 16)
    Limits(0, above=True).check(eps, f"{file} says text_config.rms_norm_eps")
    counts = {"text_config.num_attention_heads": heads, "vision_config.num_attention_heads": vision_heads}
    for key, count in (counts | {"scale_factor": config.get("scale_factor", 2)}).items():
        Limits(1, whole=True).check(count, f"{file} says {key}")
    return VlmSettings(
        num_heads=heads,
        num_kv_heads=text.get("num_key_value_heads") or heads,
        head_dim=text.get("head_dim") or sizes.width // heads,
        rms_eps=eps,
        vision_heads=vision_heads,
        blocks=text.get("num_hidden_layers"),
        scale_factor=config.get("scale_factor", 2),
        image_tokens=_token_ids(file.parent / "tokenizer.json", "<fake_token_around_image>", "<global-img>"),
    )


def _token_ids(file: epath.Path, *names: str) -> Any:
    """Ids of added tokens; None without a tokenizer or without them."""
    if not file.exists():
        return None
    ids = {token["content"]: token["id"] for token in read_json_object(file).get("added_tokens", ())}
    return tuple(ids[name] for name in names) if all(name in ids for name in names) else None
