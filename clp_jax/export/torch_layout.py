"""Names and axes of openpi's PyTorch π0 and π0.5 (lerobot's, too), and the way back.

A JAX parameter stacks its layers on axis 0; PyTorch has one tensor a layer, linear maps as (out, in), and gate and up
projections, keys and values apart. Every rule can be undone, so an exported file is compared with its source bit for
bit. Axes: D width, N heads, K key/value heads, H head dim, F hidden channels. Checked by numbers against openpi's
models_pytorch, commit 15a9616, and lerobot 0.6.1.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np

from clp_jax.aliases import Leaf
from clp_jax.models import Architecture
from clp_jax.prune import tower_of
from clp_jax.trees import assign

VLM_HEAD = "paligemma_with_expert.paligemma.lm_head.weight"
"""Tied to the token embedding, which openpi's files leave out."""

EXPERT_HEAD = "paligemma_with_expert.gemma_expert.lm_head.weight"
"""A parameter of the PyTorch model that nothing uses and no JAX parameter stands for: zeros here."""


@dataclasses.dataclass(frozen=True)
class _Rule:
    """How the array of one layer becomes PyTorch's tensors, and back.

    Attributes:
      names: of the tensors, "{i}" is the layer.
      split: array to as many tensors.
      join: tensors and the array's shape to the array.
    """

    names: tuple[str, ...]
    split: Callable[[Leaf], tuple[Leaf, ...]]
    join: Callable[[list[np.ndarray], tuple[int, ...]], np.ndarray]


def _copy(name: str) -> _Rule:
    """The same values; axes of length one or heads may be folded."""
    return _Rule((name,), lambda x: (x,), lambda parts, _: parts[0])


def _flat(name: str) -> _Rule:
    """(N, H) to (N H)."""
    return _Rule((name,), lambda x: (x.reshape(-1),), lambda parts, shape: parts[0].reshape(shape))


def _drop_first(name: str) -> _Rule:
    """(1, T, D) to (T, D)."""
    return _Rule((name,), lambda x: (x[0],), lambda parts, _: parts[0][None])


def _convolution(name: str) -> _Rule:
    """(height, width, in, out) to (out, in, height, width)."""
    return _Rule((name,), lambda x: (x.transpose(3, 2, 0, 1),), lambda parts, _: parts[0].transpose(2, 3, 1, 0))


def _linear(name: str) -> _Rule:
    """(in, out) to (out, in)."""
    return _Rule((name,), lambda x: (x.T,), lambda parts, _: parts[0].T)


def _to_heads(name: str) -> _Rule:
    """(D, N, H) to (N H, D)."""
    return _Rule((name,), lambda x: (x.reshape(x.shape[0], -1).T,), lambda parts, shape: parts[0].T.reshape(shape))


def _from_heads(name: str) -> _Rule:
    """(N, H, D) to (D, N H)."""
    return _Rule((name,), lambda x: (x.reshape(-1, x.shape[2]).T,), lambda parts, shape: parts[0].T.reshape(shape))


def _projection(name: str) -> _Rule:
    """(N, D, H) to (N H, D)."""
    return _Rule((name,), lambda x: (_per_head(x),), lambda parts, shape: _undo_per_head(parts[0], shape))


def _projections(*names: str) -> _Rule:
    """(2 or 3, K, D, H) to as many (K H, D)."""
    return _Rule(
        names,
        lambda x: tuple(_per_head(x[i]) for i in range(len(names))),
        lambda parts, shape: np.stack([_undo_per_head(part, shape[1:]) for part in parts]),
    )


def _gating(gate: str, up: str) -> _Rule:
    """(2, D, F) to two (F, D)."""
    return _Rule((gate, up), lambda x: (x[0].T, x[1].T), lambda parts, _: np.stack([part.T for part in parts]))


def _per_head(x: Leaf) -> Leaf:
    return x.transpose(0, 2, 1).reshape(-1, x.shape[1])


def _undo_per_head(part: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    heads, width, head_dim = shape
    return part.reshape(heads, head_dim, width).transpose(0, 2, 1)


def _gemma_rules(suffix: str, prefix: str) -> list[tuple[str, _Rule]]:
    """One expert: suffix "" with the names of the VLM, or "_1" with those of the action expert."""
    llm, layer = "PaliGemma/llm", f"{prefix}layers.{{i}}."
    attn, mlp = f"{layer}self_attn.", f"{layer}mlp."
    rules = [
        (f"{llm}/layers/attn/q_einsum{suffix}/w", _projection(f"{attn}q_proj.weight")),
        (f"{llm}/layers/attn/kv_einsum{suffix}/w", _projections(f"{attn}k_proj.weight", f"{attn}v_proj.weight")),
        (
            f"{llm}/layers/attn/qkv_einsum{suffix}/w",
            _projections(*(f"{attn}{name}_proj.weight" for name in "qkv")),
        ),
        (f"{llm}/layers/attn/attn_vec_einsum{suffix}/w", _from_heads(f"{attn}o_proj.weight")),
        (f"{llm}/layers/mlp{suffix}/gating_einsum", _gating(f"{mlp}gate_proj.weight", f"{mlp}up_proj.weight")),
        (f"{llm}/layers/mlp{suffix}/linear", _linear(f"{mlp}down_proj.weight")),
    ]
    norms = {
        f"{llm}/layers/pre_attention_norm{suffix}": f"{layer}input_layernorm",
        f"{llm}/layers/pre_ffw_norm{suffix}": f"{layer}post_attention_layernorm",
        f"{llm}/final_norm{suffix}": f"{prefix}norm",
    }
    for ours, theirs in norms.items():
        rules += [
            (f"{ours}/scale", _copy(f"{theirs}.weight")),
            (f"{ours}/Dense_0/kernel", _linear(f"{theirs}.dense.weight")),
            (f"{ours}/Dense_0/bias", _copy(f"{theirs}.dense.bias")),
        ]
    return rules


def _vision_rules(prefix: str) -> list[tuple[str, _Rule]]:
    img, tower = "PaliGemma/img", f"{prefix}vision_tower.vision_model."
    block, layer = f"{img}/Transformer/encoderblock", f"{tower}encoder.layers.{{i}}."
    attention = f"{block}/MultiHeadDotProductAttention_0"
    rules = [
        (f"{img}/embedding/kernel", _convolution(f"{tower}embeddings.patch_embedding.weight")),
        (f"{img}/embedding/bias", _copy(f"{tower}embeddings.patch_embedding.bias")),
        (f"{img}/pos_embedding", _drop_first(f"{tower}embeddings.position_embedding.weight")),
        (f"{img}/Transformer/encoder_norm/scale", _copy(f"{tower}post_layernorm.weight")),
        (f"{img}/Transformer/encoder_norm/bias", _copy(f"{tower}post_layernorm.bias")),
        (f"{img}/head/kernel", _linear(f"{prefix}multi_modal_projector.linear.weight")),
        (f"{img}/head/bias", _copy(f"{prefix}multi_modal_projector.linear.bias")),
        (f"{attention}/out/kernel", _from_heads(f"{layer}self_attn.out_proj.weight")),
        (f"{attention}/out/bias", _copy(f"{layer}self_attn.out_proj.bias")),
    ]
    for ours, theirs in (("query", "q"), ("key", "k"), ("value", "v")):
        rules += [
            (f"{attention}/{ours}/kernel", _to_heads(f"{layer}self_attn.{theirs}_proj.weight")),
            (f"{attention}/{ours}/bias", _flat(f"{layer}self_attn.{theirs}_proj.bias")),
        ]
    for i in (0, 1):
        rules += [
            (f"{block}/LayerNorm_{i}/scale", _copy(f"{layer}layer_norm{i + 1}.weight")),
            (f"{block}/LayerNorm_{i}/bias", _copy(f"{layer}layer_norm{i + 1}.bias")),
            (f"{block}/MlpBlock_0/Dense_{i}/kernel", _linear(f"{layer}mlp.fc{i + 1}.weight")),
            (f"{block}/MlpBlock_0/Dense_{i}/bias", _copy(f"{layer}mlp.fc{i + 1}.bias")),
        ]
    return rules


def _rules(paths: Mapping[str, object]) -> dict[str, _Rule]:
    model = "paligemma_with_expert.paligemma.model."
    rules = [
        ("PaliGemma/llm/embedder/input_embedding", _copy(VLM_HEAD)),
        *_vision_rules(model),
        *_gemma_rules("", f"{model}language_model."),
        *_gemma_rules("_1", "paligemma_with_expert.gemma_expert.model."),
    ]
    for name in ("action_in_proj", "action_out_proj", "state_proj", "action_time_mlp_in", "action_time_mlp_out"):
        rules += [(f"{name}/kernel", _linear(f"{name}.weight")), (f"{name}/bias", _copy(f"{name}.bias"))]
    for name in ("time_mlp_in", "time_mlp_out"):
        rules += [(f"{name}/kernel", _linear(f"{name}.weight")), (f"{name}/bias", _copy(f"{name}.bias"))]
    return assign([(path, rule) for path, rule in rules if path in paths], paths)


def tensors_of(
    leaves: Mapping[str, jax.ShapeDtypeStruct], architecture: Architecture
) -> dict[str, jax.ShapeDtypeStruct]:
    """Names, shapes and dtypes of a PyTorch file, in the order in which `to_torch` gives the tensors.

    Args:
      leaves: of the JAX model, by path, without adapters.
      architecture: of the same model.
    """
    tensors = {}
    for path, rule in _rules(leaves).items():
        leaf = leaves[path]
        stacked = tower_of(path) is not None
        part = jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype) if stacked else leaf
        shapes = jax.eval_shape(rule.split, part)
        for i in range(leaf.shape[0] if stacked else 1):
            tensors |= {name.format(i=i): shape for name, shape in zip(rule.names, shapes, strict=True)}
    assert architecture.action is not None
    embedding = leaves["PaliGemma/llm/embedder/input_embedding"]
    shape = (architecture.vocab_size, architecture.action.width)
    return tensors | {EXPERT_HEAD: jax.ShapeDtypeStruct(shape, embedding.dtype)}


def to_torch(
    leaves: Mapping[str, jax.ShapeDtypeStruct], parts: Callable[[str], Iterator[np.ndarray]]
) -> Iterator[tuple[str, np.ndarray | None]]:
    """Yields names and tensors, layer by layer; None stands for zeros.

    Args:
      leaves: of the JAX model, by path, without adapters.
      parts: gives the layers of a stacked parameter, or the one array of any other.
    """
    for path, rule in _rules(leaves).items():
        for i, part in enumerate(parts(path)):
            for name, tensor in zip(rule.names, rule.split(part), strict=True):
                yield name.format(i=i), tensor
    yield EXPERT_HEAD, None


def from_torch(
    leaves: Mapping[str, jax.ShapeDtypeStruct], tensors: Mapping[str, np.ndarray]
) -> Iterator[tuple[str, int, np.ndarray]]:
    """Yields path, layer and array of the JAX model, made from the tensors of a PyTorch file.

    Args:
      leaves: of the JAX model, by path, without adapters.
      tensors: of the file, by name.
    """
    for path, rule in _rules(leaves).items():
        shape = leaves[path].shape
        stacked = tower_of(path) is not None
        for i in range(shape[0] if stacked else 1):
            parts = [tensors[name.format(i=i)] for name in rule.names]
            yield path, i, rule.join(parts, shape[1:] if stacked else shape)
