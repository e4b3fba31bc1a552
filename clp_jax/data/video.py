"""Frames of video files by time, with a few files kept open."""

import contextlib
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from clp_jax.errors import InputError

OPEN_FILES = 32
"""Idle files of a kind that stay open; with many threads a few more are open while in use."""

_STEPS_BACK = (0.0, 2.0, 10.0, math.inf)
"""Seconds before the wanted frame at which decoding is begun, one after the other until the frame is found."""


class OpenFiles:
    """Files that are lent to one thread at a time and stay open afterwards; the longest unused are closed first.

    Args:
      open_file: opens a path; what it returns has a ``close``.
      limit: how many idle ones stay open.
    """

    def __init__(self, open_file: Callable[[Path], Any], limit: int = OPEN_FILES):
        self._open, self._limit = open_file, limit
        self._idle: OrderedDict[tuple[Path, int], Any] = OrderedDict()
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def borrow(self, path: Path) -> Iterator[Any]:
        """Lends the file; one that fails in use is closed and not kept."""
        with self._lock:
            key = next((key for key in reversed(self._idle) if key[0] == path), None)
            file = None if key is None else self._idle.pop(key)
        file = self._open(path) if file is None else file
        try:
            yield file
        except BaseException:
            file.close()
            raise
        with self._lock:
            self._idle[path, id(file)] = file
            surplus = self._idle.popitem(last=False)[1] if len(self._idle) > self._limit else None
        if surplus is not None:
            surplus.close()


class VideoFrames:
    """Decodes single frames: seeks to the keyframe before and goes on from there."""

    def __init__(self):
        self._files = OpenFiles(_open)

    def frame(self, path: Path, seconds: float, *, tolerance: float) -> UInt8[np.ndarray, "h w 3"]:
        """The frame shown at a time.

        Args:
          path: video file.
          seconds: from the file's beginning.
          tolerance: seconds by which the frame's own time may differ.

        Raises:
          InputError: the file cannot be decoded, or has no frame at that time.
        """
        import av.error

        image = nearest = None
        try:
            with self._files.borrow(path) as container:
                for back in _STEPS_BACK:
                    start = max(0.0, seconds - tolerance - back)
                    image, nearest = _decode_until(container, start, seconds, tolerance)
                    # Some encoders' keyframes are no clean starts, and a decoder may begin later than asked to.
                    if image is not None or start == 0.0 or (nearest is not None and nearest < seconds):
                        break
        except (av.error.FFmpegError, OSError, IndexError) as error:
            raise InputError(f"the video {path} cannot be decoded at {seconds:.3f} s: {error}.") from error
        if image is None:
            near = "it ends before" if nearest is None else f"the nearest is at {nearest:.3f} s"
            raise InputError(
                f"the video {path} has no frame at {seconds:.3f} s, which the table asks for; {near}. "
                "Table and video do not belong together, or the video is cut off."
            )
        return image


def _decode_until(
    container: Any, start: float, seconds: float, tolerance: float
) -> tuple[np.ndarray | None, float | None]:
    """The frame at that time, from the keyframe before ``start`` on; and the time of the nearest frame."""
    stream, nearest = container.streams.video[0], None
    container.seek(int(start / stream.time_base), stream=stream)
    for frame in container.decode(stream):
        if frame.time is None:
            continue
        if nearest is None or abs(frame.time - seconds) < abs(nearest - seconds):
            nearest = frame.time
        if abs(frame.time - seconds) <= tolerance:
            return frame.to_ndarray(format="rgb24"), nearest
        if frame.time > seconds:
            break
    return None, nearest


def _open(path: Path) -> Any:
    import av

    container = av.open(str(path))
    try:
        container.streams.video[0].codec_context.thread_count = 1  # frames are decoded in parallel by our own threads
    except IndexError:
        container.close()
        raise
    return container
