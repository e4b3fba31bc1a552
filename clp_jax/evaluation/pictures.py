"""A page of filmed episodes: one row each, time from left to right, the end framed green or red."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from clp_jax.evaluation.rollouts import Episode

_SOLVED, _FAILED = (40, 170, 70), (200, 50, 50)
_FRAME = 3


def contact_sheet(
    episodes: Sequence[Episode], *, columns: int = 8, width: int = 128
) -> UInt8[np.ndarray, "height all_columns 3"]:
    """Pictures of filmed episodes, evenly spaced in time.

    Args:
      episodes: with pictures.
      columns: pictures of an episode; one with fewer repeats some.
      width: pixels of a picture, at its own proportions.
    """
    from PIL import Image

    rows = []
    for episode in episodes:
        chosen = np.linspace(0, len(episode.pictures) - 1, columns).round().astype(int)
        row = []
        for picture in (episode.pictures[i] for i in chosen):
            height = round(width * picture.shape[0] / picture.shape[1])
            row.append(np.array(Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS)))
        _frame(row[-1], _SOLVED if episode.success else _FAILED)
        rows.append(np.concatenate(row, axis=1))
    return np.concatenate(rows)


def _frame(picture: np.ndarray, colour: tuple[int, int, int]) -> None:
    for edge in (picture[:_FRAME], picture[-_FRAME:], picture[:, :_FRAME], picture[:, -_FRAME:]):
        edge[:] = colour
