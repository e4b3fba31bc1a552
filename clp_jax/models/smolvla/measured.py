"""The sizes that shapes tell: of a parameter tree of ours, or of the tensors of a lerobot file."""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from clp_jax.aliases import Tree
from clp_jax.errors import InputError
from clp_jax.models.smolvla.layout import EXPERT, VLM
from clp_jax.trees import flatten

Shapes = Mapping[str, tuple[int, ...]]


class Measured(NamedTuple):
    """Widths and depths; ``vision_heads`` is None where the shapes do not tell it (a lerobot file)."""

    width: int
    mlp_dim: int
    depth: int
    expert_width: int
    expert_mlp_dim: int
    expert_depth: int
    query_dim: int
    kv_dim: int
    vocab_size: int
    state_dim: int
    action_dim: int
    connector_inputs: int
    vision_width: int
    vision_mlp_dim: int
    vision_depth: int
    vision_heads: int | None
    patch_size: int
    num_tokens: int

    @property
    def scale_factor(self) -> int:
        """Image tokens of each direction that the connector folds into one."""
        return math.isqrt(self.connector_inputs // self.vision_width)

    @property
    def image_size(self) -> int:
        """Edge of the square image in pixels."""
        return math.isqrt(self.num_tokens) * self.patch_size


def of_tree(tree: Tree) -> Measured:
    """The sizes of a parameter tree.

    Raises:
      InputError: it is no SmolVLA, or its leaves of even and odd blocks do not belong together.
    """
    shapes = {path: tuple(leaf.shape) for path, leaf in flatten(tree).items()}
    block = "vision/Transformer/encoderblock"
    vision_depth, vision_width, vision_heads, _ = _shape(
        shapes, f"{block}/MultiHeadDotProductAttention_0/query/kernel", 4
    )
    _, width, query_dim = _shape(shapes, "vlm/even/q_proj", 3)
    _, expert_width, _ = _shape(shapes, "action/even/q_proj", 3)
    return Measured(
        width=width,
        mlp_dim=_shape(shapes, "vlm/even/up_proj", 3)[2],
        depth=_alternating_depth(shapes, "vlm"),
        expert_width=expert_width,
        expert_mlp_dim=_shape(shapes, "action/even/up_proj", 3)[2],
        expert_depth=_alternating_depth(shapes, "action"),
        query_dim=query_dim,
        kv_dim=_shape(shapes, "vlm/even/k_proj", 3)[2],
        vocab_size=_shape(shapes, "embed_tokens", 2)[0],
        state_dim=_shape(shapes, "state_proj/kernel", 2)[0],
        action_dim=_shape(shapes, "action_in_proj/kernel", 2)[0],
        connector_inputs=_shape(shapes, "connector/kernel", 2)[0],
        vision_width=vision_width,
        vision_mlp_dim=_shape(shapes, f"{block}/MlpBlock_0/Dense_0/kernel", 3)[2],
        vision_depth=vision_depth,
        vision_heads=vision_heads,
        patch_size=_shape(shapes, "vision/embedding/kernel", 4)[0],
        num_tokens=_shape(shapes, "vision/pos_embedding", 3)[1],
    )


def of_tensors(tensors: Mapping[str, Any]) -> Measured:
    """The sizes of a lerobot file.

    Args:
      tensors: arrays, or what has their shapes, by name.

    Raises:
      InputError: it is no SmolVLA.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    text, vision = f"{VLM}model.text_model.", f"{VLM}model.vision_model."
    first, expert, seen = f"{text}layers.0.", f"{EXPERT}layers.0.", f"{vision}encoder.layers."
    query_dim, width = _shape(shapes, f"{first}self_attn.q_proj.weight", 2)
    vision_width, _, patch_size, _ = _shape(shapes, f"{vision}embeddings.patch_embedding.weight", 4)
    return Measured(
        width=width,
        mlp_dim=_shape(shapes, f"{first}mlp.up_proj.weight", 2)[0],
        depth=_numbered_depth(shapes, f"{text}layers."),
        expert_width=_shape(shapes, f"{expert}self_attn.q_proj.weight", 2)[1],
        expert_mlp_dim=_shape(shapes, f"{expert}mlp.up_proj.weight", 2)[0],
        expert_depth=_numbered_depth(shapes, f"{EXPERT}layers."),
        query_dim=query_dim,
        kv_dim=_shape(shapes, f"{first}self_attn.k_proj.weight", 2)[0],
        vocab_size=_shape(shapes, f"{text}embed_tokens.weight", 2)[0],
        state_dim=_shape(shapes, "model.state_proj.weight", 2)[1],
        action_dim=_shape(shapes, "model.action_in_proj.weight", 2)[1],
        connector_inputs=_shape(shapes, f"{VLM}model.connector.modality_projection.proj.weight", 2)[1],
        vision_width=vision_width,
        vision_mlp_dim=_shape(shapes, f"{seen}0.mlp.fc1.weight", 2)[0],
        vision_depth=_numbered_depth(shapes, seen),
        vision_heads=None,
        patch_size=patch_size,
        num_tokens=_shape(shapes, f"{vision}embeddings.position_embedding.weight", 2)[0],
    )


def _shape(shapes: Shapes, name: str, ndim: int) -> tuple[int, ...]:
    shape = shapes.get(name)
    if shape is None or len(shape) != ndim:
        found = "is missing" if shape is None else f"has shape {shape}"
        raise InputError(f"not the parameters of a SmolVLA: {name} {found}, expected {ndim} axes.")
    return shape


def _alternating_depth(shapes: Shapes, stream: str) -> int:
    even, odd = (_shape(shapes, f"{stream}/{kind}/q_proj", 3)[0] for kind in ("even", "odd"))
    if even - odd not in (0, 1):
        raise InputError(
            f"{stream} has {even} even blocks and {odd} odd ones, which cannot alternate; cut both kinds by one plan."
        )
    return even + odd


def _numbered_depth(shapes: Shapes, prefix: str) -> int:
    """Blocks of which there are tensors; numbers without a gap."""
    found = {int(m[1]) for name in shapes if (m := re.match(re.escape(prefix) + r"(\d+)\.", name))}
    if found != set(range(len(found))):
        missing = min(set(range(max(found))) - found)
        raise InputError(f"the tensors {prefix}N... have no block {missing} but later ones; the file is damaged.")
    return len(found)
