"""What filmed episodes looked like: of each a video and a strip, of a task's strips a page, of two policies' one page.

A strip runs from left to right in time, its end framed green or red.
"""

import glob
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from clp_jax.evaluation.rollouts import Episode

_SOLVED, _FAILED = (40, 170, 70), (200, 50, 50)
_FRAME = 3
_PICTURES_A_SECOND = 5.0
"""Of a video whose robot's time is not known."""


def strip(episode: Episode, *, columns: int = 8, width: int = 128) -> UInt8[np.ndarray, "height all_columns 3"]:
    """Pictures of a filmed episode, evenly spaced in time.

    Args:
      episode: with pictures.
      columns: pictures; an episode with fewer repeats some.
      width: pixels of a picture, at its own proportions.
    """
    from PIL import Image

    chosen = np.linspace(0, len(episode.pictures) - 1, columns).round().astype(int)
    row = []
    for picture in (episode.pictures[i] for i in chosen):
        height = round(width * picture.shape[0] / picture.shape[1])
        row.append(np.array(Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS)))
    _frame(row[-1], _SOLVED if episode.success else _FAILED)
    return np.concatenate(row, axis=1)


def save_film(folder: Path, episode: Episode, fps: float | None) -> None:
    """Save the strip and the video of a filmed episode.

    Args:
      folder: of films; created if absent.
      episode: with pictures, one whenever the policy was asked.
      fps: pictures per second of the robot's time; None is not known.
    """
    from PIL import Image

    folder.mkdir(exist_ok=True)
    name = f"{episode.task}-{episode.number:04d}"
    Image.fromarray(strip(episode)).save(folder / f"{name}.png")
    write_video(folder / f"{name}.mp4", episode.pictures, fps or _PICTURES_A_SECOND)


def save_page(folder: Path, task: str, page: Path) -> None:
    """Save the strips of a task one below the other; no page where nothing was filmed."""
    _save_below(_strips(folder, task), page)


def save_page_of_two(folders: tuple[Path, Path], task: str, page: Path) -> None:
    """Save the strips of episodes that two policies were filmed in, of each the first's above the second's."""
    first, second = ({file.name for file in _strips(folder, task)} for folder in folders)
    _save_below([folder / name for name in sorted(first & second) for folder in folders], page)


def write_video(file: Path, pictures: Sequence[UInt8[np.ndarray, "h w 3"]], fps: float) -> None:
    """Write an mp4 (H.264) that every player shows.

    Args:
      file: to write.
      pictures: all of one size; an odd last row or column is left out.
      fps: pictures per second.
    """
    import av

    height, width = (size // 2 * 2 for size in pictures[0].shape[:2])
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for picture in pictures:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture[:height, :width]), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _save_below(files: Sequence[Path], page: Path) -> None:
    from PIL import Image

    strips = [Image.open(file) for file in files]
    if not strips:
        return
    whole = Image.new("RGB", (max(one.width for one in strips), sum(one.height for one in strips)))
    top = 0
    for one in strips:
        with one:
            whole.paste(one, (0, top))
        top += one.height
    whole.save(page)


def _strips(folder: Path, task: str) -> list[Path]:
    return sorted(folder.glob(f"{glob.escape(task)}-[0-9][0-9][0-9][0-9].png"))


def _frame(picture: np.ndarray, colour: tuple[int, int, int]) -> None:
    for edge in (picture[:_FRAME], picture[-_FRAME:], picture[:, :_FRAME], picture[:, -_FRAME:]):
        edge[:] = colour
