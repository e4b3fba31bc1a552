"""Image augmentation for training: Isaac-GR00T's, release n1.5. lerobot trains on images as they are."""

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Float

from clp_jax.aliases import Array

_CROP = 0.95
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = 0.3, 0.4, 0.5, 0.08
_LUMA = (0.2989, 0.587, 0.114)


def augment_images(key: jax.Array, images: Mapping[str, Float[Array, "b h w 3"]]) -> dict[str, Float[Array, "b h w 3"]]:
    """Other views of the same scenes: a random crop of 95 %, resized, and other colours.

    Every observation has its own random numbers, which its cameras share. For use inside jit.

    Args:
      key: random key of the step.
      images: per camera, in [-1, 1].

    Returns:
      Images of the same shapes in [-1, 1].
    """
    return {
        camera: jax.vmap(_augmented)(jax.random.split(key, image.shape[0]), image / 2 + 0.5) * 2 - 1
        for camera, image in images.items()
    }


def _augmented(key: jax.Array, image: Float[Array, "h w 3"]) -> Float[Array, "h w 3"]:
    crop_key, colour_key = jax.random.split(key)
    return _jittered(colour_key, _cropped(crop_key, image))


def _cropped(key: jax.Array, image: Float[Array, "h w 3"]) -> Float[Array, "h w 3"]:
    size = jnp.array(image.shape[:2])
    kept = (size * _CROP).astype(jnp.int32)
    corner = jax.random.randint(key, (2,), 0, size - kept + 1)
    scale = size / kept
    # Output pixels are at scale * (input pixels - corner); enlarging needs no filter against aliasing.
    return jax.image.scale_and_translate(
        image, image.shape, (0, 1), scale, -corner * scale, method="linear", antialias=False
    ).clip(0, 1)


def _jittered(key: jax.Array, image: Float[Array, "h w 3"]) -> Float[Array, "h w 3"]:
    """Brightness, contrast, saturation and hue in random order, as torchvision's ColorJitter changes them."""
    order_key, *keys = jax.random.split(key, 5)
    strengths = _BRIGHTNESS, _CONTRAST, _SATURATION
    factors = [
        jax.random.uniform(k, minval=1 - strength, maxval=1 + strength)
        for k, strength in zip(keys, strengths, strict=False)
    ]
    turn = jax.random.uniform(keys[-1], minval=-_HUE, maxval=_HUE)
    steps = [
        lambda x: (x * factors[0]).clip(0, 1),
        lambda x: _blend(x, _grey(x).mean(), factors[1]),
        lambda x: _blend(x, _grey(x), factors[2]),
        partial(_turned, turn=turn),
    ]
    order = jax.random.permutation(order_key, len(steps))
    return jax.lax.fori_loop(0, len(steps), lambda i, x: jax.lax.switch(order[i], steps, x), image)


def _grey(image: Float[Array, "h w 3"]) -> Float[Array, "h w 1"]:
    return (image @ jnp.array(_LUMA))[..., None]


def _blend(image: Float[Array, "h w 3"], other: Array, factor: Array) -> Float[Array, "h w 3"]:
    return (factor * image + (1 - factor) * other).clip(0, 1)


def _turned(image: Float[Array, "h w 3"], turn: Array) -> Float[Array, "h w 3"]:
    """The image with its hues turned by a part of the full circle; lightness and saturation in HSV stay."""
    top, low = image.max(axis=-1), image.min(axis=-1)
    chroma = top - low
    safe = jnp.where(chroma > 0, chroma, 1.0)
    r, g, b = jnp.moveaxis(image, -1, 0)
    sector = jnp.where(top == r, (g - b) / safe % 6, jnp.where(top == g, (b - r) / safe + 2, (r - g) / safe + 4))
    hue = sector + 6 * turn
    # Channel n of HSV: v - c * max(0, min(k, 4 - k, 1)) with k = (n + hue) mod 6 and n = 5, 3, 1.
    k = (jnp.array([5.0, 3.0, 1.0]) + hue[..., None]) % 6
    return top[..., None] - chroma[..., None] * jnp.clip(jnp.minimum(k, 4 - k), 0, 1)
