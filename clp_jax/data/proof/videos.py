"""Videos proven against the rows by the times of their frames, no picture decoded but the first."""

import hashlib
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from clp_jax.data.lerobot import LeRobotData, Rows
from clp_jax.data.lerobot_meta import shape_of
from clp_jax.data.proof.findings import Check, Finding, limited
from clp_jax.data.video import Film, read_film
from clp_jax.errors import InputError
from clp_jax.progress import track_stage

_FILES_AT_A_TIME = 4
_BLOCK, _BLOCKS = 1 << 16, 8
"""Bytes and number of the blocks of a file that enter its identity; the index of its frames is in the first or last."""


def check_videos(data: LeRobotData, rows: Rows, key: str) -> Check:
    """Proves that every row has a frame of its own in the video of a camera.

    Args:
      data: the data set.
      rows: of it, with ``timestamp``.
      key: of the camera.
    """
    by_file: dict[Path, list[int]] = {}
    for position, episode in enumerate(rows.episodes):
        by_file.setdefault(episode.videos[key], []).append(position)
    with ThreadPoolExecutor(_FILES_AT_A_TIME) as pool:
        read = pool.map(_film, by_file)
        films = dict(zip(track_stage(list(by_file), f"checking {key}", unit="videos"), read, strict=True))
        digests = list(pool.map(file_digest, by_file))
    broken = {file: film for file, film in films.items() if isinstance(film, InputError)}
    sound = {file: film for file, film in films.items() if isinstance(film, Film)}
    findings = [
        Finding(f"episode {rows.episodes[by_file[file][0]].index}, {key}: {error}") for file, error in broken.items()
    ]
    spare = 0
    for file, film in sound.items():
        wrong, unused = _frames(data, rows, key, by_file[file], film)
        findings += wrong
        spare += 0 if wrong else unused
    if spare and len(rows.episodes) == len(data.meta.episodes) and not data.meta.left_out:
        findings.append(Finding(f"{key}: {spare} frames of the videos belong to no row.", fatal=False))
    findings += _formats(data, key, sound)
    frames = sum(len(film.times) for film in sound.values())
    amount = f"{len(films):,} videos, {frames:,} frames"
    sizes = frozenset((film.height, film.width) for film in sound.values())
    digest = hashlib.sha256("".join(digests).encode()).hexdigest()
    return Check(f"camera {key}", amount, limited(findings), digest, sizes)


def file_digest(file: Path) -> str:
    """Identity of a large file by its size and blocks spread over it, the first and the last among them."""
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        for start in sorted({int(at) for at in np.linspace(0, max(0, size - _BLOCK), _BLOCKS)}):
            stream.seek(start)
            digest.update(stream.read(_BLOCK))
    return digest.hexdigest()


def _film(file: Path) -> Film | InputError:
    try:
        return read_film(file)
    except InputError as error:
        return error


def _frames(data: LeRobotData, rows: Rows, key: str, positions: list[int], film: Film) -> tuple[list[Finding], int]:
    """What is wrong between the rows of a file's episodes and its frames, and how many frames no row asks for."""
    findings, taken = [], np.full(len(film.times), -1)
    if not len(film.times):
        return [Finding(f"{key}: the video {rows.episodes[positions[0]].videos[key]} has no frames.")], 0
    for position in positions:
        episode, end = rows.episodes[position], int(rows.ends[position])
        wanted = rows.columns["timestamp"][end - episode.length : end, 0].astype(np.float64) + episode.offset[key]
        nearest = _nearest(film.times, wanted)
        lost = np.flatnonzero(np.abs(film.times[nearest] - wanted) > data.frame_tolerance)
        if len(lost):
            findings.append(Finding(_lost(key, position, rows, film, wanted, lost)))
            continue
        others = np.unique(taken[nearest])
        others = others[others >= 0]
        if len(others) or len(np.unique(nearest)) < len(nearest):
            other = rows.episodes[others[0]].index if len(others) else episode.index
            findings.append(
                Finding(
                    f"episodes {other} and {episode.index} claim the same frames of the video {episode.videos[key]}, "
                    f"from {wanted[0]:.3f} to {wanted[-1]:.3f} s; repair from_timestamp of {key} in meta/episodes."
                    if len(others)
                    else f"rows of episode {episode.index} claim the same frame of the video {episode.videos[key]}."
                )
            )
        taken[nearest] = position
    return findings, int((taken < 0).sum())


def _nearest(times: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    after = np.clip(np.searchsorted(times, wanted), 0, len(times) - 1)
    before = np.maximum(after - 1, 0)
    return np.where(np.abs(times[before] - wanted) <= np.abs(times[after] - wanted), before, after)


def _lost(key: str, position: int, rows: Rows, film: Film, wanted: np.ndarray, lost: np.ndarray) -> str:
    episode, row = rows.episodes[position], int(lost[0])
    more = f", nor for {len(lost) - 1} more of its {episode.length} rows" if len(lost) > 1 else ""
    return (
        f"episode {episode.index}, frame {row}, {key}: the video {episode.videos[key]} has no frame at "
        f"{wanted[row]:.3f} s, which the table asks for{more}; it "
        f"has {len(film.times)} frames from {film.times[0]:.3f} to {film.times[-1]:.3f} s. Table and video do not "
        "belong together, or the video is cut off."
    )


def _formats(data: LeRobotData, key: str, films: Mapping[Path, Film]) -> Iterator[Finding]:
    deep = [file for file, film in films.items() if re.match(r"gray1\d", film.pixels)]
    if deep:
        yield Finding(
            f"{key}: the video {deep[0]} holds {films[deep[0]].pixels}, more than 8 bits a value (a depth map?), which "
            "no camera of the model reads; leave this camera out."
        )
    yield from other_sizes(data, key, [(film.height, film.width) for film in films.values()])


def other_sizes(data: LeRobotData, key: str, sizes: list[tuple[int, int]]) -> Iterator[Finding]:
    """Pictures of another size than info.json declares, which is said but does no harm."""
    shape = shape_of(data.meta.features[key])
    if shape is None or len(shape) != 3:
        return
    declared = {shape[:2], shape[1:]}
    other = [size for size in sizes if size not in declared]
    if other:
        (height, width), sides = other[0], shape[1:] if shape[0] in (1, 3, 4) else shape[:2]
        yield Finding(
            f"pictures of {key} are {height}x{width}, info.json says {sides[0]}x{sides[1]}; they are read as they are.",
            fatal=False,
        )
