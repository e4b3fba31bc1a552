"""Pictures stored in tables: decoded, or proven intact without decoding."""

import contextlib
import dataclasses
import io
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import UInt8

from clp_jax.errors import InputError, reason_of

_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"
_WIDE_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
"""Pillow's pictures of more than 8 bits, which it would cut off at 255 when asked for colours."""
_FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""JPEG segments that hold the picture's size."""


@dataclasses.dataclass(frozen=True)
class Picture:
    """What a stored picture says about itself.

    Attributes:
      height: in pixels.
      width: in pixels.
      bits: of one value of a pixel.
    """

    height: int
    width: int
    bits: int


def decode(content: bytes) -> UInt8[np.ndarray, "h w 3"]:
    """The pixels of a stored picture.

    Raises:
      InputError: it is damaged, has 16 bits a value, or is larger than Pillow opens.
    """
    with _opened(content) as image:
        _check(Picture(image.height, image.width, _bits(content, image)))
        return np.asarray(image.convert("RGB"))


def verify(content: bytes | memoryview) -> Picture:
    """Proves a stored picture intact: PNG by its check sums, JPEG by its segments and its end, others by decoding.

    Raises:
      InputError: as `decode`.
    """
    try:
        if content[:8] == _PNG:
            picture = _verified_png(content)
        elif content[:2] == _JPEG:
            picture = _verified_jpeg(content)
        else:
            with _opened(bytes(content)) as image:
                image.load()
                picture = Picture(image.height, image.width, _bits(bytes(content), image))
    except (struct.error, IndexError):
        raise InputError("a broken image: it is cut off.") from None
    _check(picture)
    return picture


def _check(picture: Picture) -> None:
    from PIL import Image

    if picture.bits > 8:
        raise InputError(
            f"a picture of {picture.bits} bits a value (a depth map?), which no camera of the model reads; write "
            "colours of 8 bits, or leave this camera out."
        )
    most = Image.MAX_IMAGE_PIXELS
    if most is not None and picture.height * picture.width > most:
        raise InputError(
            f"a picture of {picture.width}x{picture.height} pixels, more than the {most} that Pillow takes for safe."
        )


@contextlib.contextmanager
def _opened(content: bytes) -> Iterator[Any]:
    """Pillow's view of a picture; whatever Pillow raises about it, now or while it is used, is one line."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(content)) as image:
            yield image
    except InputError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"a picture that is too large: {error}") from error
    except UnidentifiedImageError:
        raise InputError("a broken image: it is of no format that Pillow knows.") from None
    except Exception as error:  # Pillow's readers of formats raise almost anything
        raise InputError(f"a broken image: {reason_of(error)}.") from error


def _bits(content: bytes, image: Any) -> int:
    if content[:8] == _PNG:
        return content[24]  # Pillow shows 16 bits a colour as 8
    return 16 if image.mode in _WIDE_MODES else 8


def _verified_png(content: bytes | memoryview) -> Picture:
    """Walks through the chunks: their check sums, the head first, the end last."""
    position, head = 8, None
    while True:
        size, kind = struct.unpack_from(">I4s", content, position)
        (expected,) = struct.unpack_from(">I", content, position + 8 + size)
        if zlib.crc32(content[position + 4 : position + 8 + size]) != expected:
            raise InputError("a broken image: a check sum of the PNG is wrong.")
        if head is None:
            if kind != b"IHDR":
                raise InputError("a broken image: the PNG does not begin with its head.")
            head = struct.unpack_from(">IIB", content, position + 8)
        if kind == b"IEND":
            return Picture(height=head[1], width=head[0], bits=head[2])
        position += 12 + size


def _verified_jpeg(content: bytes | memoryview) -> Picture:
    """Walks through the segments up to the pixels, and looks for the end mark."""
    position = 2
    while True:
        mark, kind, size = struct.unpack_from(">BBH", content, position)
        if mark != 0xFF:
            raise InputError("a broken image: a segment of the JPEG is damaged.")
        if kind in _FRAME_MARKERS:
            bits, height, width = struct.unpack_from(">BHH", content, position + 4)
            if b"\xff\xd9" not in bytes(content[-64:]):
                raise InputError("a broken image: the JPEG has no end, it is cut off.")
            return Picture(height, width, bits)
        position += 2 + size
