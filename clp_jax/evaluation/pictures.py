"""What filmed episodes looked like: of each a video and a strip, of a task's strips a page, of two policies' one page.

A strip runs from left to right in time, its end framed green or red.
"""

import glob
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from clp_jax.evaluation.rollouts import Episode

_SOLVED, _FAILED = (40, 170, 70), (200, 50, 50)
_FRAME = 3


def strip(episode: Episode, *, columns: int = 8, width: int = 128) -> UInt8[np.ndarray, "height all_columns 3"]:
    """Pictures of a filmed episode, evenly spaced in time.

    Args:
      episode: with a film.
      columns: pictures; an episode with fewer repeats some.
      width: pixels of a picture, at its own proportions.
    """
    from PIL import Image

    assert episode.film is not None
    pictures, row = episode.film.pictures, []
    for index in np.linspace(0, len(pictures) - 1, columns).round().astype(int):
        picture = pictures[index]
        height = round(width * picture.shape[0] / picture.shape[1])
        row.append(np.array(Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS)))
    _frame(row[-1], _SOLVED if episode.success else _FAILED)
    return np.concatenate(row, axis=1)


def save_film(folder: Path, episode: Episode) -> None:
    """Save the strip and the video of a filmed episode.

    Args:
      folder: of films; created if absent.
      episode: with a film.
    """
    from PIL import Image

    assert episode.film is not None
    folder.mkdir(exist_ok=True)
    name = f"{episode.task}-{episode.number:04d}"
    Image.fromarray(strip(episode)).save(folder / f"{name}.png")
    (folder / f"{name}.mp4").write_bytes(episode.film.video)


def save_page(folder: Path, task: str, page: Path) -> None:
    """Save the strips of a task one below the other; no page where nothing was filmed."""
    _save_below(_strips(folder, task), page)


def save_page_of_two(folders: tuple[Path, Path], task: str, page: Path) -> None:
    """Save the strips of episodes that two policies were filmed in, of each the first's above the second's."""
    first, second = ({file.name for file in _strips(folder, task)} for folder in folders)
    _save_below([folder / name for name in sorted(first & second) for folder in folders], page)


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
