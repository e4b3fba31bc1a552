"""Frames of video files by time, with a few files kept open."""

import contextlib
import dataclasses
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from clp_jax.errors import InputError, blamed_on

OPEN_FILES = 32
"""Idle files of a kind that stay open; with many threads a few more are open while in use."""

_MOST_PIXELS = 2**27
"""Of a frame; four times 8K."""

_STEPS_BACK = (0.0, 2.0, 10.0, math.inf)
"""Seconds before the wanted frame at which decoding is begun, one after the other until the frame is found."""


_TOLERANCE = 1e-3
"""Seconds between the time of a row and of its frame: ten times what lerobot allows."""
_OWN_FRAME = 0.4
"""Periods of a video within which a frame is nearer than any other."""


def frame_tolerance(fps: float, tolerance: float | None = None) -> float:
    """Seconds by which a row and its frame may differ: the default or more, and never so many that another is meant.

    Raises:
      InputError: the tolerance is no number above 0.

    >>> frame_tolerance(30.0), frame_tolerance(1000.0), frame_tolerance(10.0, 0.01)
    (0.001, 0.0004, 0.01)
    """
    if tolerance is not None and not 0 < tolerance < math.inf:
        raise InputError(f"a tolerance of {tolerance} s is none; give a number above 0.")
    return min(max(_TOLERANCE, tolerance or 0.0), _OWN_FRAME / fps)


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
        self._files = OpenFiles(open_video)

    def frame(self, path: Path, seconds: float, *, tolerance: float) -> UInt8[np.ndarray, "h w 3"]:
        """The frame shown at a time.

        Args:
          path: video file.
          seconds: from the file's beginning.
          tolerance: seconds by which the frame's own time may differ.

        Raises:
          InputError: the file cannot be decoded, or has no frame at that time.
        """
        image = nearest = None
        with (
            blamed_on(f"the video {path}", verb=f"cannot be decoded at {seconds:.3f} s"),
            self._files.borrow(path) as container,
        ):
            for back in _STEPS_BACK:
                start = max(0.0, seconds - tolerance - back)
                image, nearest = _decode_until(container, start, seconds, tolerance)
                # Some encoders' keyframes are no clean starts, and a decoder may begin later than asked to.
                if image is not None or start == 0.0 or (nearest is not None and nearest < seconds - tolerance):
                    break
        if image is None and nearest is not None and abs(nearest - seconds) <= tolerance:
            raise InputError(f"the video {path} cannot be decoded at {seconds:.3f} s: its data are damaged there.")
        if image is None:
            near = "it ends before" if nearest is None else f"the nearest is at {nearest:.3f} s"
            raise InputError(
                f"the video {path} has no frame at {seconds:.3f} s, which the table asks for; {near}. "
                "Table and video do not belong together, or the video is cut off."
            )
        return image


@dataclasses.dataclass(frozen=True)
class Film:
    """What the head of a video file says, no picture decoded.

    Attributes:
      times: of the frames, in seconds from the file's beginning, ascending.
      height: in pixels.
      width: in pixels.
      pixels: FFmpeg's name of their format.
    """

    times: Float[np.ndarray, " n"]
    height: int
    width: int
    pixels: str


def read_film(path: Path) -> Film:
    """The times of a video's frames, from its index or else from its packets.

    Raises:
      InputError: it is no video, is cut off, or its first frame cannot be decoded.
    """
    with blamed_on(f"the video {path}", verb="cannot be decoded"), open_video(path) as container:
        stream = container.streams.video[0]
        times = _times_of_index(container, path.stat().st_size)
        if times is None:
            ticks = [packet.pts for packet in container.demux(stream) if packet.pts is not None and packet.size]
            times = np.sort(np.asarray(ticks, np.float64)) * float(stream.time_base)
            container.seek(0, stream=stream)
        if next(container.decode(stream), None) is None:
            raise InputError(f"the video {path} cannot be decoded: it has no frames.")
        decoder = stream.codec_context
        return Film(times, decoder.height, decoder.width, str(decoder.pix_fmt))


def _times_of_index(container: Any, size: int) -> np.ndarray | None:
    """From an MP4's index, which lists all frames in decoding order; None if it does not tell when they are shown.

    Frames that are evenly spaced in one order are so in the other, and the first is shown at the stream's start.
    """
    stream = container.streams.video[0]
    entries = list(getattr(stream, "index_entries", None) or ())
    if "mp4" not in container.format.name or len(entries) != stream.frames or stream.start_time is None:
        return None
    if any(entry.pos + entry.size > size for entry in entries):
        raise InputError(f"the video {container.name} cannot be decoded: it is cut off.")
    ticks = np.array([entry.timestamp for entry in entries], np.float64)
    if len(ticks) == 0 or len(np.unique(np.diff(ticks))) > 1:
        return None
    return (ticks - ticks[0] + stream.start_time) * float(stream.time_base)


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
            # A decoder conceals what it cannot read with guesses, and says so only in this flag.
            return (None if frame.is_corrupt else frame.to_ndarray(format="rgb24")), nearest
        if frame.time > seconds:
            break
    return None, nearest


def open_video(path: Path) -> Any:
    """A video file with one thread per decoder, since frames are decoded in parallel by our own threads.

    Raises:
      InputError: it has no video that can be decoded.
      av.error.FFmpegError: it is no video file.
    """
    import av

    # Texts in the file's head, in whatever encoding, are read by nobody. PyAV 19 never fails over them.
    lenient: Any = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
    container = av.open(str(path), **lenient)
    # A file whose end is missing may still open: with no stream, or with one whose codec nobody knows.
    decoder = next((stream.codec_context for stream in container.streams.video), None)
    if decoder is None:
        container.close()
        raise InputError(f"the video {path} cannot be decoded: it is cut off or damaged, or of an unknown codec.")
    if decoder.height * decoder.width > _MOST_PIXELS:
        container.close()
        raise InputError(f"the video {path} is {decoder.width}x{decoder.height} pixels large, which is no camera's.")
    decoder.thread_count = 1
    return container
