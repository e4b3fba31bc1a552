"""A camera's image in the square that the model reads, as the two programs that train it make it."""

import numpy as np
from jaxtyping import UInt8

_KEPT = 0.95
"""Of height and width, in Isaac-GR00T; where it trains, the place is random, and `augmentation` chooses it."""


def stretched(image: UInt8[np.ndarray, "_ _ 3"], size: int) -> UInt8[np.ndarray, "size size 3"]:
    """The whole image, whatever its shape, as one tile of Eagle's image processor: lerobot's way; bicubic resampling.

    Upstream's library rounds after each direction and begins with the width; new releases of Pillow begin with the
    cheaper one, so each is asked for by itself. Pillow's weights are finer: values differ by one, rarely by two.
    """
    from PIL import Image

    if image.shape[:2] == (size, size):
        return image
    wide = Image.fromarray(image).resize((size, image.shape[0]), resample=Image.Resampling.BICUBIC)
    return np.asarray(wide.resize((size, size), resample=Image.Resampling.BICUBIC))


def resized(image: UInt8[np.ndarray, "_ _ 3"], size: int) -> UInt8[np.ndarray, "size size 3"]:
    """The whole image, resampled bilinearly as real numbers, which are cut off and not rounded: Isaac-GR00T's way."""
    from PIL import Image

    channels = np.moveaxis(image.astype(np.float32) / 255, -1, 0)
    if image.shape[:2] != (size, size):
        channels = [
            np.asarray(Image.fromarray(channel).resize((size, size), resample=Image.Resampling.BILINEAR))
            for channel in channels
        ]
    return (np.stack(list(channels), axis=-1) * np.float32(255)).astype(np.uint8)


def middle(image: UInt8[np.ndarray, "_ _ 3"]) -> UInt8[np.ndarray, "_ _ 3"]:
    """The middle 95 % in height and in width, which Isaac-GR00T's policies see.

    >>> middle(np.zeros((48, 64, 3), np.uint8)).shape
    (45, 60, 3)
    """
    height, width = (int(edge * _KEPT) for edge in image.shape[:2])
    top, left = round((image.shape[0] - height) / 2), round((image.shape[1] - width) / 2)
    return image[top : top + height, left : left + width]
