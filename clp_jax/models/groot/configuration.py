"""The architecture of a GR00T-N1.5, from its shapes, its config.json and that of Eagle, its vision-language model.

A checkpoint has no file that says how Eagle's heads split its width or which token stands for an image: that is in
Eagle's own config.json, which comes with NVIDIA's and lerobot's code.
"""

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from clp_jax.aliases import Tree
from clp_jax.errors import InputError
from clp_jax.models.groot import config_keys
from clp_jax.models.groot.architecture import GROOT_N15, Architecture, AttentionSizes, DitSizes, Padding, QwenSizes
from clp_jax.models.groot.config_files import checkpoint_config, eagle_config
from clp_jax.models.groot.embodiments import number_of
from clp_jax.models.groot.layout import EMBEDDING, HEAD, POOLING, tensor_shapes
from clp_jax.models.groot.lerobot import embodiment_of
from clp_jax.models.groot.lora import ranks_of, with_ranks
from clp_jax.models.groot.metadata import only_tag
from clp_jax.models.layers.lora import is_adapter
from clp_jax.models.layers.siglip import SiglipSizes
from clp_jax.trees import flatten

_DROPOUT = 0.1
"""Of upstream's code."""

_VISION = "backbone.eagle_model.vision_model.vision_model."
_LLM = "backbone.eagle_model.language_model.model."
_ACTIONS = "action_head."
_BLOCKS = {
    "vision": f"{_VISION}encoder.layers",
    "llm": f"{_LLM}layers",
    "vl": f"{_ACTIONS}vl_self_attention.transformer_blocks",
    "dit": f"{_ACTIONS}model.transformer_blocks",
}


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Shapes of a checkpoint's tensors by NVIDIA's names."""

    by_name: Mapping[str, tuple[int, ...]]

    def of(self, name: str, ndim: int) -> tuple[int, ...]:
        """The shape of a tensor.

        Raises:
          InputError: it is missing or has another number of axes.
        """
        shape = self.by_name.get(name)
        if shape is None or len(shape) != ndim:
            found = "is missing" if shape is None else f"has shape {shape}"
            raise InputError(f"not a GR00T-N1.5: the tensor {name} {found}, expected {ndim} axes.")
        return shape

    def depth(self, tower: str) -> int:
        """Number of a tower's blocks.

        Raises:
          InputError: their numbers are not 0, 1, 2, ...
        """
        pattern = re.compile(re.escape(_BLOCKS[tower]) + r"\.(\d+)\..*")
        found = sorted({int(match[1]) for name in self.by_name if (match := pattern.fullmatch(name))})
        if not found or found != list(range(len(found))):
            raise InputError(f"the blocks {_BLOCKS[tower]} are numbered {found}, expected 0, 1, 2, ...")
        return len(found)


def architecture_of(
    tree: Tree,
    folder: epath.Path | None = None,
    *,
    dtype: str = "bfloat16",
    vlm_config: str | os.PathLike | None = None,
    cameras: Sequence[str] = GROOT_N15.cameras,
    embodiment: str | None = None,
    padding: Padding = "flash",
    lora_scale: float | None = None,
) -> Architecture:
    """The architecture of a checkpoint.

    Args:
      tree: parameters or their shapes; or the tensors of NVIDIA's or lerobot's files by name.
      folder: of the checkpoint, with its config.json and perhaps a folder ``eagle`` in it or beside it. Without a
        config.json the sizes must be the released ones.
      dtype: activation dtype of the model.
      vlm_config: Eagle's config.json or its folder. Without it, and without a folder ``eagle``, heads, constants and
        the image token are the released ones if the widths are.
      cameras: of the observations, in any order.
      embodiment: which of the model's robots this is: a tag of upstream's, or a number. Without it, the only one of
        which the checkpoint has statistics, or that for which lerobot trained it.
      padding: what attention gives to padding tokens of a prompt.
      lora_scale: alpha / rank of LoRA adapters, if it is another than NVIDIA's 16 / rank.

    Raises:
      InputError: the tree is no GR00T-N1.5, a file contradicts it, or says what clp_jax does not have.
    """
    shapes = Shapes(tensor_shapes(tree))
    config, eagle = checkpoint_config(folder), eagle_config(vlm_config, folder)
    architecture = dataclasses.replace(
        _from_shapes(shapes), dtype=dtype, cameras=tuple(sorted(cameras)), padding=padding
    )
    if embodiment is not None:
        number_of(embodiment, architecture.embodiments)
    architecture = dataclasses.replace(architecture, embodiment=embodiment or only_tag(folder) or embodiment_of(folder))
    architecture = _with_config(_with_eagle(architecture, eagle), config)
    return with_ranks(dataclasses.replace(architecture, lora_scale=lora_scale), ranks_of(_adapters(tree)))


def _adapters(tree: Tree) -> dict[str, tuple[int, ...]]:
    """Shapes of the adapters of a parameter tree; the tensors of a file are none."""
    return {path: tuple(leaf.shape) for path, leaf in flatten(tree).items() if is_adapter(path)}


def _from_shapes(shapes: Shapes) -> Architecture:
    """What shapes tell; heads of the image encoder and of the action head's transformers are the released ones."""
    block = {tower: f"{name}.0." for tower, name in _BLOCKS.items()}
    vision_width, _, patch, _ = shapes.of(f"{_VISION}embeddings.patch_embedding.weight", 4)
    vision = SiglipSizes(
        vision_width,
        shapes.depth("vision"),
        shapes.of(f"{block['vision']}mlp.fc1.weight", 2)[0],
        GROOT_N15.vision.num_heads,
        patch,
        shapes.of(f"{_VISION}embeddings.position_embedding.weight", 2)[0],
    )
    (head_dim,) = shapes.of(f"{block['llm']}self_attn.q_norm.weight", 1)
    mlp_dim, width = shapes.of(f"{block['llm']}mlp.gate_proj.weight", 2)
    heads, kv_heads = (shapes.of(f"{block['llm']}self_attn.{name}_proj.weight", 2)[0] // head_dim for name in "qk")
    llm = QwenSizes(
        width, shapes.depth("llm"), mlp_dim, heads, kv_heads, head_dim, GROOT_N15.llm.rope_theta, GROOT_N15.llm.eps
    )
    vl_mlp, vl_width = shapes.of(f"{block['vl']}ff.net.0.proj.weight", 2)
    vl = AttentionSizes(vl_width, shapes.depth("vl"), vl_mlp, GROOT_N15.vl.num_heads)
    dit_mlp, dit_width = shapes.of(f"{block['dit']}ff.net.0.proj.weight", 2)
    output = shapes.of(f"{_ACTIONS}model.proj_out_2.weight", 2)[0]
    channels = shapes.of(f"{_ACTIONS}model.timestep_encoder.timestep_embedder.linear_1.weight", 2)[1]
    dit = DitSizes(dit_width, shapes.depth("dit"), dit_mlp, GROOT_N15.dit.num_heads, output, channels)
    embodiments, state_dim, hidden = shapes.of(f"{_ACTIONS}state_encoder.layer1.W", 3)
    return dataclasses.replace(
        GROOT_N15,
        vision=vision,
        llm=llm,
        vl=vl,
        dit=dit,
        vocab_size=shapes.of(EMBEDDING if EMBEDDING in shapes.by_name else HEAD, 2)[0],
        action_dim=shapes.of(f"{_ACTIONS}action_decoder.layer2.b", 2)[1],
        state_dim=state_dim,
        hidden_width=hidden,
        embodiments=embodiments,
        max_seq_len=shapes.of(f"{_ACTIONS}position_embedding.weight", 2)[0],
        future_tokens=shapes.of(f"{_ACTIONS}future_tokens.weight", 2)[0],
        lm_head=EMBEDDING in shapes.by_name and HEAD in shapes.by_name,
        pooling_head=any(name.startswith(POOLING) for name in shapes.by_name),
    )


def _with_eagle(architecture: Architecture, eagle: tuple[str, Mapping[str, Any]] | None) -> Architecture:
    """The architecture with what Eagle's config.json says, which must fit the shapes."""
    vision, llm, released = architecture.vision, architecture.llm, GROOT_N15
    if eagle is None:
        told = vision.width, llm.width, llm.head_dim, architecture.vocab_size
        if told != (released.vision.width, released.llm.width, released.llm.head_dim, released.vocab_size):
            raise InputError(
                "the widths are not the released ones, and no shape tells how Eagle's heads split them; give Eagle's "
                "config.json with --vlm-config, or put its folder, named eagle, into the checkpoint's."
            )
        return architecture
    where, config = eagle
    text, image = config.get("text_config", {}), config.get("vision_config", {})
    config_keys.EAGLE.check(config, where)
    config_keys.TEXT.check(text, f"text_config in {where}")
    config_keys.VISION.check(image, f"vision_config in {where}")
    expected = {
        "hidden_size": llm.width,
        "intermediate_size": llm.mlp_dim,
        "num_attention_heads": llm.num_heads,
        "num_key_value_heads": llm.num_kv_heads,
        "head_dim": llm.head_dim,
        "vocab_size": architecture.vocab_size,
    }
    _agree(text, expected, f"text_config in {where}")
    expected = {
        "hidden_size": vision.width,
        "intermediate_size": vision.mlp_dim,
        "patch_size": vision.patch_size,
        "image_size": vision.image_size,
    }
    _agree(image, expected, f"vision_config in {where}")
    _agree(config, {"force_image_size": vision.image_size}, where)
    heads = _needed(image, "num_attention_heads", f"vision_config in {where}")
    rope, eps = (_needed(text, key, f"text_config in {where}") for key in ("rope_theta", "rms_norm_eps"))
    return dataclasses.replace(
        architecture,
        vision=dataclasses.replace(vision, num_heads=heads),
        llm=dataclasses.replace(llm, rope_theta=float(rope), eps=float(eps)),
        image_token=_needed(config, "image_token_index", where),
    )


def _with_config(architecture: Architecture, found: tuple[str, Mapping[str, Any]] | None) -> Architecture:
    """The architecture with what the checkpoint's config.json says, which must fit the shapes."""
    if found is None:
        told, released = (architecture.vl.width, architecture.dit.width), (GROOT_N15.vl.width, GROOT_N15.dit.width)
        if told != released:
            raise InputError(
                "the action head's widths are not the released ones, and no shape tells how its heads split them; give "
                "the checkpoint's folder with its config.json."
            )
        return architecture
    where, config = found
    head = _checked(architecture, config, where)
    named = f"action_head_cfg in {where}"
    return dataclasses.replace(
        architecture,
        vl=_with_attention(architecture.vl, head["vl_self_attention_cfg"], named),
        dit=_with_attention(architecture.dit, head["diffusion_model_cfg"], named),
        horizon=_needed(head, "action_horizon", named),
        num_timestep_buckets=head.get("num_timestep_buckets", GROOT_N15.num_timestep_buckets),
        noise_s=head.get("noise_s", GROOT_N15.noise_s),
        noise_alpha=head.get("noise_beta_alpha", GROOT_N15.noise_alpha),
        num_inference_timesteps=_needed(head, "num_inference_timesteps", named),
    )


def _with_attention(sizes: Any, given: Mapping[str, Any], where: str) -> Any:
    """Sizes of a transformer with its heads and its dropout, which upstream's code also has where no key says so."""
    return dataclasses.replace(
        sizes,
        num_heads=_needed(given, "num_attention_heads", where),
        dropout=float(given.get("dropout", _DROPOUT)),
        final_dropout=bool(given.get("final_dropout", True)),
    )


def _checked(architecture: Architecture, config: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The part about the action head, of a config.json whose keys are all known and fit the shapes."""
    head, backbone = (_needed(config, key, where) for key in ("action_head_cfg", "backbone_cfg"))
    dit, vl = (_needed(head, key, where) for key in ("diffusion_model_cfg", "vl_self_attention_cfg"))
    a = architecture
    told: list[tuple[config_keys.Section, Mapping[str, Any], str, dict[str, Any]]] = [
        (
            config_keys.CHECKPOINT,
            config,
            where,
            {"hidden_size": a.llm.width, "action_dim": a.action_dim, "action_horizon": head.get("action_horizon")},
        ),
        (config_keys.BACKBONE, backbone, "backbone_cfg", {"select_layer": a.llm.depth}),
        (config_keys.HEAD, head, "action_head_cfg", _head_numbers(a)),
        (
            config_keys.DIT,
            dit,
            "diffusion_model_cfg",
            {"num_layers": a.dit.depth, "cross_attention_dim": a.vl.width, "output_dim": a.dit.output_width},
        ),
        (config_keys.VL, vl, "vl_self_attention_cfg", {"num_layers": a.vl.depth}),
    ]
    for section, given, name, numbers in told:
        named = name if name == where else f"{name} in {where}"
        section.check(given, named)
        _agree(given, numbers, named)
    for given, name, width in ((dit, "diffusion_model_cfg", a.dit.width), (vl, "vl_self_attention_cfg", a.vl.width)):
        heads, channels = (
            _needed(given, key, f"{name} in {where}") for key in ("num_attention_heads", "attention_head_dim")
        )
        if heads * channels != width:
            raise InputError(
                f"{name} in {where} has {heads} heads of {channels}, but the width is {width}; correct it."
            )
    for given, name, key in (
        (backbone, "backbone_cfg", "select_layer"),
        (dit, "diffusion_model_cfg", "num_layers"),
        (vl, "vl_self_attention_cfg", "num_layers"),
    ):
        _needed(given, key, f"{name} in {where}")
    return head


def _head_numbers(a: Architecture) -> dict[str, Any]:
    return {
        "input_embedding_dim": a.dit.width,
        "backbone_embedding_dim": a.vl.width,
        "hidden_size": a.hidden_width,
        "max_seq_len": a.max_seq_len,
        "action_dim": a.action_dim,
        "max_state_dim": a.state_dim,
        "max_num_embodiments": a.embodiments,
        "num_target_vision_tokens": a.future_tokens,
    }


def _agree(given: Mapping[str, Any], numbers: Mapping[str, Any], where: str) -> None:
    """Refuses numbers that are not those of the shapes."""
    for key, expected in numbers.items():
        if key in given and given[key] != expected:
            raise InputError(
                f"{where} says {key} = {given[key]}, but the weights have {expected}; "
                "give the file that belongs to the checkpoint."
            )


def _needed(given: Mapping[str, Any], key: str, where: str) -> Any:
    if key not in given:
        raise InputError(f"{where} has no {key}; give the file that belongs to the checkpoint.")
    return given[key]
