"""Names and axes of GR00T-N1.5's files, NVIDIA's and lerobot's; and what its config.json says after a cut."""

import copy as copying
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from clp_jax.aliases import Tree
from clp_jax.errors import InputError
from clp_jax.models.layers.lora import is_adapter
from clp_jax.models.layers.siglip import siglip_rules
from clp_jax.models.layers.torch_rules import Layout, Rule, copy, linear, tensors_of
from clp_jax.models.stacks import blocks_of
from clp_jax.models.towers import Stack
from clp_jax.trees import assign, flatten

STACKS = (
    Stack(r"backbone/vision/Transformer/encoderblock/.*", "vision"),
    Stack(r"backbone/llm/layers/.*", "llm"),
    Stack(r"action_head/vl_self_attention/blocks/.*", "vl"),
    # Even blocks read the prompt, odd ones their own tokens.
    Stack(r"action_head/dit/cross/.*", "dit", first=0, step=2),
    Stack(r"action_head/dit/self/.*", "dit", first=1, step=2),
)

LEROBOT_PREFIX = "_groot_model."
"""Before every name in the files of a policy that lerobot has trained."""

_EAGLE = "backbone.eagle_model."
EMBEDDING = f"{_EAGLE}language_model.model.embed_tokens.weight"
HEAD = f"{_EAGLE}language_model.lm_head.weight"
"""Tied to the embedding: a file holds both, or either of them."""
POOLING = f"{_EAGLE}vision_model.vision_model.head."
"""Before the names of SigLIP's pooling head."""

_KNOBS = {
    "llm": ("backbone_cfg", "select_layer"),
    "vl": ("action_head_cfg", "vl_self_attention_cfg", "num_layers"),
    "dit": ("action_head_cfg", "diffusion_model_cfg", "num_layers"),
}
"""Where config.json says how many blocks a tower has."""


def layout(paths: Mapping[str, object], prefix: str = "", *, embedding: str = EMBEDDING) -> Layout:
    """The rule of every leaf.

    Args:
      paths: the leaves' paths.
      prefix: before every name in the file, `LEROBOT_PREFIX` or nothing.
      embedding: the tensor that holds the token embedding, `embedding_name` of the file's names.
    """
    rules = [*_backbone_rules(embedding), *_head_rules()]
    named = [(path, _prefixed(rule, prefix)) for path, rule in rules]
    return assign([(path, rule) for path, rule in named if path in paths], paths)


def embedding_name(names: Iterable[str]) -> str:
    """The tensor of a file that holds the token embedding: its own, or the tied head where that is missing."""
    stripped = {name.removeprefix(LEROBOT_PREFIX) for name in names}
    return HEAD if HEAD in stripped and EMBEDDING not in stripped else EMBEDDING


def prefix_of(names: Iterable[str]) -> str:
    """What stands before every name of a file.

    >>> prefix_of(["_groot_model.action_head.vlln.weight"])
    '_groot_model.'
    """
    return LEROBOT_PREFIX if any(name.startswith(LEROBOT_PREFIX) for name in names) else ""


def tensor_shapes(tree: Tree) -> dict[str, tuple[int, ...]]:
    """Shapes of a checkpoint's tensors by NVIDIA's names; adapters have none.

    Args:
      tree: a parameter tree, or the tensors of a file by name; arrays or their shapes.
    """
    if _is_file(tree):
        return {name.removeprefix(LEROBOT_PREFIX): tuple(leaf.shape) for name, leaf in tree.items()}
    leaves = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for path, leaf in flatten(tree).items()
        if not is_adapter(path)
    }
    tensors = tensors_of(leaves, layout(leaves), lambda path, rows: blocks_of(STACKS, path, rows))
    return {name: tuple(leaf.shape) for name, leaf in tensors.items()}


def recognises(tree: Tree) -> bool:
    """Whether the names of a parameter tree, or of a file's tensors, are GR00T-N1.5's."""
    if _is_file(tree):
        return any(name.removeprefix(LEROBOT_PREFIX).startswith(_EAGLE) for name in tree)
    backbone = tree.get("backbone")
    return "action_head" in tree and isinstance(backbone, Mapping) and {"vision", "mlp1", "llm"} <= backbone.keys()


def config_with_depths(config: Mapping[str, Any], depths: Mapping[str, int]) -> dict[str, Any]:
    """What a config.json says after a cut.

    Args:
      config: as it was.
      depths: blocks of the towers that were cut, by name.

    Raises:
      InputError: the file has no field for the depth of such a tower.

    >>> config_with_depths({"backbone_cfg": {"select_layer": 12}}, {"llm": 5})
    {'backbone_cfg': {'select_layer': 5}}
    """
    changed = copying.deepcopy(dict(config))
    for tower, depth in depths.items():
        *parents, last = _KNOBS.get(tower, ("",))
        node = changed
        for key in parents:
            node = node.get(key, {})
        if last not in node:
            raise InputError(
                f"config.json has no field for the depth of {tower}, so nothing upstream could load the result: leave "
                f"{tower} whole, or cut a checkpoint whose config.json has {'.'.join((*parents, last)) or 'one'}."
            )
        node[last] = depth
    return changed


def _is_file(tree: Tree) -> bool:
    return bool(tree) and all("." in name and not isinstance(leaf, Mapping) for name, leaf in tree.items())


def _prefixed(rule: Rule, prefix: str) -> Rule:
    return Rule(tuple(prefix + name for name in rule.names), rule.split, rule.join)


def _dense(ours: str, theirs: str) -> list[tuple[str, Rule]]:
    return [(f"{ours}/kernel", linear(f"{theirs}.weight")), (f"{ours}/bias", copy(f"{theirs}.bias"))]


def _norm(ours: str, theirs: str) -> list[tuple[str, Rule]]:
    return [(f"{ours}/scale", copy(f"{theirs}.weight")), (f"{ours}/bias", copy(f"{theirs}.bias"))]


def _backbone_rules(embedding: str) -> list[tuple[str, Rule]]:
    ours, theirs = "backbone/llm/layers", f"{_EAGLE}language_model.model.layers.{{i}}."
    rules = [
        *siglip_rules("backbone/vision", f"{_EAGLE}vision_model.vision_model."),
        *_dense("backbone/mlp1", f"{_EAGLE}mlp1.0"),
        ("backbone/llm/embed_tokens", copy(embedding)),
        ("backbone/llm/lm_head", copy(HEAD)),
        ("backbone/llm/norm/scale", copy(f"{_EAGLE}language_model.model.norm.weight")),
        (f"{ours}/attn_norm/scale", copy(f"{theirs}input_layernorm.weight")),
        (f"{ours}/mlp_norm/scale", copy(f"{theirs}post_attention_layernorm.weight")),
    ]
    rules += [(f"{ours}/attn/{name}/kernel", linear(f"{theirs}self_attn.{name}_proj.weight")) for name in "qkvo"]
    rules += [(f"{ours}/attn/{name}_norm/scale", copy(f"{theirs}self_attn.{name}_norm.weight")) for name in "qk"]
    rules += [
        (f"{ours}/mlp/{name}/kernel", linear(f"{theirs}mlp.{name}_proj.weight")) for name in ("gate", "up", "down")
    ]
    unused = ["probe", *(f"attention/{name}" for name in ("in_proj_weight", "in_proj_bias"))]
    unused += [f"{layer}/{name}" for layer in _POOLING_LAYERS for name in ("weight", "bias")]
    rules += [(f"backbone/vision_head/{path}", copy(POOLING + path.replace("/", "."))) for path in unused]
    return rules


_POOLING_LAYERS = ("attention/out_proj", "layernorm", "mlp/fc1", "mlp/fc2")


def _head_rules() -> list[tuple[str, Rule]]:
    head, dit = "action_head.", "action_head.model."
    rules = [
        *_norm("action_head/vlln", f"{head}vlln"),
        ("action_head/future_tokens", copy(f"{head}future_tokens.weight")),
        ("action_head/position_embedding", copy(f"{head}position_embedding.weight")),
        *_dense("action_head/dit/time_1", f"{dit}timestep_encoder.timestep_embedder.linear_1"),
        *_dense("action_head/dit/time_2", f"{dit}timestep_encoder.timestep_embedder.linear_2"),
        *_dense("action_head/dit/proj_out_1", f"{dit}proj_out_1"),
        *_dense("action_head/dit/proj_out_2", f"{dit}proj_out_2"),
    ]
    layers = {"state_encoder": ("layer1", "layer2"), "action_encoder": ("W1", "W2", "W3")}
    layers["action_decoder"] = layers["state_encoder"]
    for module, names in layers.items():
        rules += [
            (f"action_head/{module}/{name}/{part}", copy(f"{head}{module}.{name}.{part}"))
            for name in names
            for part in ("W", "b")
        ]
    for kind in ("cross", "self"):
        ours, theirs = f"action_head/dit/{kind}", f"{dit}transformer_blocks.{{i}}."
        rules += [*_block_rules(ours, theirs), *_dense(f"{ours}/modulation", f"{theirs}norm1.linear")]
    ours, theirs = "action_head/vl_self_attention/blocks", f"{head}vl_self_attention.transformer_blocks.{{i}}."
    rules += [*_block_rules(ours, theirs), *_norm(f"{ours}/norm1", f"{theirs}norm1")]
    return rules + _norm(f"{ours}/norm3", f"{theirs}norm3")


def _block_rules(ours: str, theirs: str) -> list[tuple[str, Rule]]:
    """Attention and feed-forward of diffusers' block."""
    rules = [*_dense(f"{ours}/ff/up", f"{theirs}ff.net.0.proj"), *_dense(f"{ours}/ff/down", f"{theirs}ff.net.2")]
    for name in ("q", "k", "v"):
        rules += _dense(f"{ours}/attn/{name}", f"{theirs}attn1.to_{name}")
    return rules + _dense(f"{ours}/attn/out", f"{theirs}attn1.to_out.0")
