"""Image augmentation for training: openpi's (models/model.py, preprocess_observation, 15a9616), with augmax."""

from collections.abc import Mapping
from typing import Any

import jax
from jaxtyping import Float

from clp_jax.aliases import Array

_CROP = 0.95
_DEGREES = 5


def augment_images(key: jax.Array, images: Mapping[str, Float[Array, "b h w 3"]]) -> dict[str, Float[Array, "b h w 3"]]:
    """Other views of the same scenes: a random crop, a small rotation, other colours.

    Wrist cameras move with the hand, so only their colours change. Every observation has its own random numbers, which
    its cameras share. For use inside jit.

    Args:
      key: random key of the step.
      images: per camera, in [-1, 1].

    Returns:
      Images of the same shapes in [-1, 1].
    """
    return {
        camera: jax.vmap(_chain(image.shape[1], image.shape[2], wrist="wrist" in camera))(
            jax.random.split(key, image.shape[0]), image / 2.0 + 0.5
        )
        * 2.0
        - 1.0
        for camera, image in images.items()
    }


def _chain(height: int, width: int, *, wrist: bool) -> Any:
    import augmax

    colours = augmax.ColorJitter(brightness=0.3, contrast=0.4, saturation=0.5)
    if wrist:
        return augmax.Chain(colours)
    crop = augmax.RandomCrop(int(width * _CROP), int(height * _CROP))
    return augmax.Chain(crop, augmax.Resize(width, height), augmax.Rotate((-_DEGREES, _DEGREES)), colours)
