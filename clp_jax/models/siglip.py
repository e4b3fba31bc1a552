"""SigLIP, π0's image encoder: a ViT without pooling whose blocks are one scan.

Patches, position embedding and their sum run in float32, the blocks in the activation dtype. Leaf names follow openpi
models/siglip.py, commit 15a9616.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Float

from clp_jax.aliases import AnyArray, Array
from clp_jax.models.architecture import SiglipSizes
from clp_jax.models.remat import rematerialised
from clp_jax.models.rows import Rows, pinned


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
    """Pre-norm ViT block; a gate g gives ``(1 - g) x + g y`` as in ``gemma.Block``."""

    sizes: SiglipSizes
    dtype: str
    capture: bool
    rows: Rows = None

    @nn.compact
    def __call__(self, x, gate):
        x = inputs = pinned(x, self.rows)
        y = nn.LayerNorm(dtype=self.dtype)(x)
        y = nn.MultiHeadDotProductAttention(
            num_heads=self.sizes.num_heads, kernel_init=nn.initializers.xavier_uniform(), dtype=self.dtype
        )(y, y)
        x = x + y
        x = x + MlpBlock(self.sizes.mlp_dim, self.dtype)(nn.LayerNorm(dtype=self.dtype)(x))
        if gate is not None:
            gate = gate[:, None, None].astype(x.dtype)
            x = (1 - gate) * inputs + gate * x
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
    output_width: int
    dtype: str
    remat: str = "all"
    rows: Rows = None

    @nn.compact
    def __call__(
        self, image: Float[Array, "n h w c"], *, gates: Float[AnyArray, "depth #n"] | None = None, capture: bool = False
    ) -> tuple[Float[Array, "n s d"], Float[Array, "l n s v"] | None]:
        """Encode square RGB images.

        Args:
          image: float32 in [-1, 1], ``sizes.image_size`` pixels on each side.
          gates: per block and image, 1 keeps and 0 removes.
          capture: also return the residual stream.

        Returns:
          Tokens [n, num_tokens, output_width], and the states [depth + 1, n, num_tokens, width] (None if not captured).
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
        head = nn.Dense(self.output_width, dtype=self.dtype, name="head", kernel_init=nn.initializers.zeros)
        return pinned(head(x), self.rows), states
