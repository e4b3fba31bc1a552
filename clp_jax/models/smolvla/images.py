"""Camera images as the encoder reads them: lerobot's resizing with padding, and pixels in [-1, 1]."""

import jax
import jax.numpy as jnp
from jaxtyping import Float

from clp_jax.aliases import AnyArray, Array
from clp_jax.errors import InputError


def model_image(image: AnyArray, size: int) -> Float[Array, "b h w 3"]:
    """An image batch as float32 in [-1, 1], resized with padding to ``size`` pixels.

    The aspect ratio is kept, small images are enlarged, edges are rounded down, pixels are interpolated without
    antialiasing, and the padding is black and lies on the left and on top.

    Args:
      image: uint8 of any size, or float32 in [-1, 1] of ``size`` pixels on both sides [b, h, w, 3].
      size: edge of the square image that the encoder reads.

    Raises:
      InputError: a float image has another size.
    """
    x = jnp.asarray(image)
    height, width = x.shape[1:3]
    if x.dtype != jnp.uint8:
        if (height, width) != (size, size):
            raise InputError(
                f"an image of {height} x {width} pixels is {x.dtype}; only uint8 images are resized, give uint8 or "
                f"float32 in [-1, 1] with {size} x {size} pixels."
            )
        return x.astype(jnp.float32)
    x = x.astype(jnp.float32) / 255.0
    if (height, width) != (size, size):
        ratio = max(width / size, height / size)
        new = int(height / ratio), int(width / ratio)
        x = jax.image.resize(x, (x.shape[0], *new, x.shape[3]), "linear", antialias=False)
        x = jnp.pad(x, ((0, 0), (size - new[0], 0), (size - new[1], 0), (0, 0)))
    return x * 2.0 - 1.0


def folded(x: Float[Array, "n s d"], factor: int) -> Float[Array, "n _t _c"]:
    """Squares of ``factor`` x ``factor`` tokens as one token each, their channels side by side, row by row.

    >>> folded(jnp.arange(4.0).reshape(1, 4, 1), 2).tolist()
    [[[0.0, 1.0, 2.0, 3.0]]]
    """
    n, tokens, channels = x.shape
    side = int(tokens**0.5) // factor
    x = x.reshape(n, side, factor, side, factor, channels).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(n, side * side, factor * factor * channels)
