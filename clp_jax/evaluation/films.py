"""A film of an episode while it is played: the video is written as it goes, so that long episodes need no memory."""

import io
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

_KEPT = 64
_UNKNOWN_FPS = 10.0
"""Of an environment that does not tell the robot's time."""


class Film(NamedTuple):
    """An episode that was filmed.

    Attributes:
      video: an mp4 (H.264) that every player shows.
      pictures: some [h, w, 3], evenly spaced in time but for the last one, which is the end.
    """

    video: bytes
    pictures: tuple[UInt8[np.ndarray, "h w 3"], ...]


class Camera:
    """Films one episode.

    Args:
      fps: pictures per second; None is not known.
    """

    def __init__(self, fps: float | None):
        self._fps = Fraction(fps or _UNKNOWN_FPS).limit_denominator(1000)
        self._video = io.BytesIO()
        self._container: Any = None
        self._stream: Any = None
        self._count, self._every = 0, 1
        self._kept: list[np.ndarray] = []
        self._last: Any = None

    def shoot(self, picture: UInt8[np.ndarray, "h w 3"]) -> None:
        """Add a picture, of the first one's size; in the video an odd last row or column is left out."""
        import av

        height, width = (size // 2 * 2 for size in picture.shape[:2])
        if self._container is None:
            self._container = av.open(self._video, "w", format="mp4")
            self._stream = self._container.add_stream("libx264", rate=self._fps)
            self._stream.height, self._stream.width, self._stream.pix_fmt = height, width, "yuv420p"
        self._last = picture.copy()  # some environments draw into the same array again
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(self._last[:height, :width]), format="rgb24")
        self._container.mux(self._stream.encode(frame))
        if self._count % self._every == 0:
            self._kept.append(self._last)
        if len(self._kept) > _KEPT:
            self._kept, self._every = self._kept[::2], 2 * self._every
        self._count += 1

    def film(self) -> Film:
        """What was filmed, which ends it; at least one picture was."""
        self._container.mux(self._stream.encode())
        self._container.close()
        end = [] if self._kept[-1] is self._last else [self._last]
        return Film(self._video.getvalue(), (*self._kept, *end))
