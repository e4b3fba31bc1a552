"""SigLIP, the image encoder of every family: a ViT without pooling whose blocks are one scan.

Patches, position embedding and their sum run in float32, the blocks in the activation dtype. Leaf names follow openpi
models/siglip.py, commit 15a9616.
"""

import dataclasses
import math

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Float

from clp_jax.aliases import AnyArray, Array
from clp_jax.models.layers.gating import gated
from clp_jax.models.layers.lora import Adapters, adapted
from clp_jax.models.layers.scan import Rows, pinned, rematerialised
from clp_jax.models.layers.torch_rules import (
    Rule,
    convolution,
    copy,
    drop_first,
    flat,
    from_heads,
    linear,
    to_heads,
)


@dataclasses.dataclass(frozen=True)
class SiglipSizes:
    """The SigLIP image encoder: channels, blocks, feed-forward, heads, patch edge in pixels, tokens of an image.

    ``adapters`` are LoRA on queries, keys and values, if there is any.
    """

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    patch_size: int
    num_tokens: int
    adapters: Adapters | None = None

    @property
    def image_size(self) -> int:
        """Edge of the square input image in pixels."""
        return math.isqrt(self.num_tokens) * self.patch_size


class Heads(nn.Module):
    """Queries, keys or values by head, plus the adapter's product where there is one."""

    sizes: SiglipSizes
    dtype: str

    def setup(self) -> None:
        split = self.sizes.num_heads, self.sizes.width // self.sizes.num_heads
        self.dense = nn.DenseGeneral(split, kernel_init=nn.initializers.xavier_uniform(), dtype=self.dtype)
        nn.share_scope(self, self.dense)

    @nn.compact
    def __call__(self, x: Float[Array, "n s d"]) -> Float[Array, "n s h c"]:
        y, adapters = self.dense(x), self.sizes.adapters
        return y if adapters is None else adapted(self, y, x.astype(y.dtype), adapters)


class Attention(nn.Module):
    """Attention of all tokens to all, with the parameters and the arithmetic of flax's module."""

    sizes: SiglipSizes
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "n s d"]) -> Float[Array, "n s d"]:
        query, key, value = (Heads(self.sizes, self.dtype, name=name)(x) for name in ("query", "key", "value"))
        read = nn.dot_product_attention(query, key, value, dtype=self.dtype)
        init = nn.initializers.xavier_uniform()
        return nn.DenseGeneral(self.sizes.width, axis=(-2, -1), kernel_init=init, dtype=self.dtype, name="out")(read)


class MlpBlock(nn.Module):
    """Two dense layers with tanh-gelu between."""

    mlp_dim: int
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "n s d"]) -> Float[Array, "n s d"]:
        init = {"kernel_init": nn.initializers.xavier_uniform(), "bias_init": nn.initializers.normal(stddev=1e-6)}
        hidden = nn.gelu(nn.Dense(self.mlp_dim, dtype=self.dtype, **init)(x))
        return nn.Dense(x.shape[-1], dtype=self.dtype, **init)(hidden)


class EncoderBlock(nn.Module):
    """Pre-norm ViT block; a gate acts on the whole block."""

    sizes: SiglipSizes
    dtype: str
    capture: bool
    rows: Rows = None

    @nn.compact
    def __call__(self, x, gate):
        x = inputs = pinned(x, self.rows)
        y = nn.LayerNorm(dtype=self.dtype)(x)
        y = Attention(self.sizes, self.dtype, name="MultiHeadDotProductAttention_0")(y)
        x = x + y
        x = x + MlpBlock(self.sizes.mlp_dim, self.dtype)(nn.LayerNorm(dtype=self.dtype)(x))
        if gate is not None:
            x = gated(inputs, x, gate)
        return x, x if self.capture else None


class Encoder(nn.Module):
    """The scanned blocks and the final norm."""

    sizes: SiglipSizes
    dtype: str
    remat: str
    rows: Rows = None

    @nn.compact
    def __call__(self, x, gates, *, capture: bool):
        block = rematerialised(EncoderBlock, self.remat)
        stack = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.sizes.depth)
        y, states = stack(self.sizes, self.dtype, capture, self.rows, name="encoderblock")(x, gates)
        states = jnp.concatenate([x[None], states]) if capture else None
        return nn.LayerNorm(name="encoder_norm", dtype=self.dtype)(y), states


class Siglip(nn.Module):
    """Images to tokens of the language model's width."""

    sizes: SiglipSizes
    output_width: int | None
    dtype: str
    remat: str = "all"
    rows: Rows = None

    @nn.compact
    def __call__(
        self, image: Float[Array, "n h w c"], *, gates: Float[AnyArray, "depth _g"] | None = None, capture: bool = False
    ) -> tuple[Float[Array, "n s d"], Float[Array, "l n s v"] | None]:
        """Encode square RGB images.

        Args:
          image: float32 in [-1, 1], ``sizes.image_size`` pixels on each side.
          gates: per block, for the batch or for each observation; an observation's images are neighbours.
          capture: also return the residual stream.

        Returns:
          Tokens [n, num_tokens, output_width] (without an output width, the normalised stream), and the states
          [depth + 1, n, num_tokens, width] (None if not captured).
        """
        patch = (self.sizes.patch_size, self.sizes.patch_size)
        x = nn.Conv(self.sizes.width, patch, strides=patch, padding="VALID", name="embedding", dtype=jnp.float32)(
            image.astype(jnp.float32)
        )
        x = x.reshape(x.shape[0], -1, self.sizes.width)
        init = nn.initializers.normal(stddev=self.sizes.width**-0.5)
        x = x + self.param("pos_embedding", init, (1, self.sizes.num_tokens, self.sizes.width)).astype(jnp.float32)
        x, states = Encoder(self.sizes, self.dtype, self.remat, self.rows, name="Transformer")(
            pinned(x.astype(self.dtype), self.rows), gates, capture=capture
        )
        if self.output_width is None:
            return pinned(x, self.rows), states
        head = nn.Dense(self.output_width, dtype=self.dtype, name="head", kernel_init=nn.initializers.zeros)
        return pinned(head(x), self.rows), states


def siglip_rules(ours: str, theirs: str) -> list[tuple[str, Rule]]:
    """The PyTorch tensors of every leaf but the head's.

    Args:
      ours: path of the module.
      theirs: prefix of transformers' SigLIP, with its dot.
    """
    block, layer = f"{ours}/Transformer/encoderblock", f"{theirs}encoder.layers.{{i}}."
    attention = f"{block}/MultiHeadDotProductAttention_0"
    rules = [
        (f"{ours}/embedding/kernel", convolution(f"{theirs}embeddings.patch_embedding.weight")),
        (f"{ours}/embedding/bias", copy(f"{theirs}embeddings.patch_embedding.bias")),
        (f"{ours}/pos_embedding", drop_first(f"{theirs}embeddings.position_embedding.weight")),
        (f"{ours}/Transformer/encoder_norm/scale", copy(f"{theirs}post_layernorm.weight")),
        (f"{ours}/Transformer/encoder_norm/bias", copy(f"{theirs}post_layernorm.bias")),
        (f"{attention}/out/kernel", from_heads(f"{layer}self_attn.out_proj.weight")),
        (f"{attention}/out/bias", copy(f"{layer}self_attn.out_proj.bias")),
    ]
    for name, letter in (("query", "q"), ("key", "k"), ("value", "v")):
        rules += [
            (f"{attention}/{name}/kernel", to_heads(f"{layer}self_attn.{letter}_proj.weight")),
            (f"{attention}/{name}/bias", flat(f"{layer}self_attn.{letter}_proj.bias")),
        ]
    for i in (0, 1):
        rules += [
            (f"{block}/LayerNorm_{i}/scale", copy(f"{layer}layer_norm{i + 1}.weight")),
            (f"{block}/LayerNorm_{i}/bias", copy(f"{layer}layer_norm{i + 1}.bias")),
            (f"{block}/MlpBlock_0/Dense_{i}/kernel", linear(f"{layer}mlp.fc{i + 1}.weight")),
            (f"{block}/MlpBlock_0/Dense_{i}/bias", copy(f"{layer}mlp.fc{i + 1}.bias")),
        ]
    return rules
