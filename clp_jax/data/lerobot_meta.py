"""What a LeRobot data set says about itself: versions v2.0, v2.1 and v3.0 brought to one form.

Facts of the formats: lerobot 0.6.1 (v3.0) and the revision that openpi pins, 0cf8648 (v2.1; v2.0 differs only in the
statistics, which are not read).
"""

import collections
import dataclasses
import importlib
import math
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from clp_jax.data.episodes import chosen
from clp_jax.data.lerobot_files import one_text, read_json_lines, read_rows
from clp_jax.errors import InputError, blamed_on
from clp_jax.files import check_regular, read_json_object
from clp_jax.folders import check_inside, check_open

VERSIONS = ("v2.0", "v2.1", "v3.0")
_MOST = 2**53
"""Whole numbers above are not exact in float64, which rows are counted in."""


@dataclasses.dataclass(frozen=True)
class Episode:
    """One episode: its rows and where they are stored.

    Attributes:
      index: its number.
      length: number of rows.
      table: file with its rows, as the data set's meta says.
      videos: video file by key.
      offset: seconds in the video file at which the episode begins, by key.
      first: the number that its first row should have in the column ``index``; None where meta does not say.
      tasks: texts of its tasks, in no order; none where meta does not list them.
    """

    index: int
    length: int
    table: Path
    videos: Mapping[str, Path]
    offset: Mapping[str, float]
    first: int | None = None
    tasks: frozenset[str] = frozenset()


@dataclasses.dataclass(frozen=True)
class Meta:
    """A data set without its rows.

    Attributes:
      folder: where it lies.
      fps: frames per second.
      features: per column or video its description in ``info.json``.
      episodes: in the order of their rows.
      tasks: text by task number; None where the data set lists the number without a text.
      totals: ``total_episodes``, ``total_frames`` and ``total_tasks`` of ``info.json``, as far as they are there.
      left_out: episodes that are not to be read; nothing is asked about their rows and videos.
    """

    folder: Path
    fps: float
    features: Mapping[str, Any]
    episodes: tuple[Episode, ...]
    tasks: Mapping[int, str | None]
    totals: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    left_out: tuple[Episode, ...] = ()


def read_meta(
    folder: str | os.PathLike[str], cameras: Collection[str] | None = None, *, episodes: str | None = None
) -> Meta:
    """Read ``meta/`` and check that every file it names is there.

    Args:
      folder: of the data set.
      cameras: keys of the cameras that will be read; where the others are stored is neither asked nor checked. None
        stands for all.
      episodes: which to keep or leave out, as `episodes.chosen` reads it; None keeps all.

    Raises:
      InputError: unknown version, a file is missing or broken, or there are no such episodes.
    """
    path = Path(folder).expanduser()
    info = read_json_object(path / "meta" / "info.json")
    version = info.get("codebase_version")
    if version not in VERSIONS:
        raise InputError(f"{folder} is a LeRobot data set of version {version}; {', '.join(VERSIONS)} are read.")
    with blamed_on(f"{folder}/meta", verb=f"is not as LeRobot {version} writes it"):
        features = {key: feature if isinstance(feature, dict) else {} for key, feature in info["features"].items()}
        wanted = features if cameras is None else cameras
        videos = [key for key, feature in features.items() if feature.get("dtype") == "video" and key in wanted]
        listed, tasks = (_read_v3 if version == "v3.0" else _read_v2)(path, info, videos)
        totals = {name: info[name] for name in ("total_episodes", "total_frames", "total_tasks") if name in info}
        meta = Meta(path, _fps(path, info), features, tuple(listed), tasks, totals)
    if not meta.episodes:
        raise InputError(f"{folder} holds no episodes.")
    if episodes is not None:
        kept = chosen(episodes, [episode.index for episode in listed])
        parts = (tuple(e for e in listed if (e.index in kept) is stays) for stays in (True, False))
        meta = dataclasses.replace(meta, **dict(zip(("episodes", "left_out"), parts, strict=True)))
    _check_episodes(meta)
    files = {file for episode in meta.episodes for file in (episode.table, *episode.videos.values())}
    missing = sorted(str(file) for file in files if not _is_file(file))
    if missing:
        raise InputError(f"{folder} lacks {len(missing)} of the {len(files)} files of its meta; first {missing[0]}.")
    for file in sorted(files):
        check_regular(file)
    return meta


def described(feature: Mapping[str, Any]) -> str:
    """Type and shape of a feature, for messages; whatever ``info.json`` holds instead of them.

    >>> described({"dtype": "float32", "shape": [2, 3]}), described({"dtype": "string", "shape": None})
    ('float32 2x3', 'string')
    """
    shape = shape_of(feature)
    return str(feature.get("dtype")) + ("" if shape is None else " " + "x".join(map(str, shape)))


def shape_of(feature: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The shape of a feature, None if ``info.json`` gives none or something that is no shape."""
    shape = feature.get("shape")
    if not isinstance(shape, list) or not all(type(size) is int and size > 0 for size in shape):
        return None
    return tuple(shape)


def find_folder(source: str | os.PathLike[str]) -> Path:
    """The folder of a data set; of a hub id (``owner/name``) the one below lerobot's home, or fetched from the hub.

    lerobot's home is where lerobot and openpi look too: ``HF_LEROBOT_HOME``, or else ``lerobot`` below ``HF_HOME``.

    Raises:
      InputError: no such folder, and no such data set, package or network.
    """
    folder = Path(source).expanduser()
    check_open(folder)
    if folder.is_dir():
        if not _is_set(folder):
            raise InputError(f"{source} is no LeRobot data set: it has no meta/info.json.")
        return folder
    if folder.is_file():
        raise InputError(f"{source} is a file; a LeRobot data set is a folder with meta/info.json in it.")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(source)):
        raise InputError(
            f"there is no folder {source}; give the folder of a LeRobot data set or its hub id (owner/name)."
        )
    home = lerobot_home()
    if _is_set(home / str(source)):
        return home / str(source)
    try:
        huggingface_hub = importlib.import_module("huggingface_hub")
    except ImportError:
        raise InputError(
            f"there is no folder {source}, nor {home / str(source)}; to fetch it from the hub, "
            "pip install huggingface_hub."
        ) from None
    try:
        return Path(huggingface_hub.snapshot_download(str(source), repo_type="dataset"))
    except Exception as error:  # requests, httpx and the hub each raise their own
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise InputError(f"there is no folder {source}, and the hub does not give the data set: {reason}") from error


def lerobot_home() -> Path:
    """Where lerobot keeps data sets by hub id."""
    caches = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(os.environ.get("HF_LEROBOT_HOME") or Path(caches) / "lerobot").expanduser()


def _is_set(folder: Path) -> bool:
    return (folder / "meta" / "info.json").is_file()


def _is_file(file: Path) -> bool:
    try:
        return file.is_file()
    except OSError:  # no file system takes such a name
        return False


def _fps(folder: Path, info: Mapping[str, Any]) -> float:
    fps = info["fps"]
    if isinstance(fps, bool) or not isinstance(fps, int | float) or not math.isfinite(fps) or fps <= 0:
        raise InputError(f"{folder}/meta/info.json says fps {fps!r}; it must be a number above 0.")
    return float(fps)


def _count(value: Any, name: str) -> int:
    """A whole number from 0 on; ``True``, ``"3"`` and ``2.5`` are none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _MOST or value != int(value):
        raise ValueError(f"{name} {value!r} is no whole number")
    return int(value)


def _read_v2(folder: Path, info: Mapping[str, Any], videos: list[str]) -> tuple[list[Episode], dict[int, str | None]]:
    """One table file and one video file an episode."""
    episodes, chunk = [], _count(info["chunks_size"], "chunks_size")
    if not chunk:
        raise ValueError("chunks_size is 0")
    lines = read_json_lines(folder / "meta" / "episodes.jsonl")
    for line in sorted(lines, key=lambda line: _count(line["episode_index"], "episode_index")):
        index = int(line["episode_index"])
        names = {"episode_chunk": index // chunk, "episode_index": index}
        files = {key: _place(folder, info, "video_path", video_key=key, **names) for key in videos}
        table = _place(folder, info, "data_path", **names)
        length = _count(line["length"], f"length of episode {index}")
        starts = dict.fromkeys(videos, 0.0)
        episodes.append(Episode(index, length, table, files, starts, tasks=_listed_texts(line.get("tasks"))))
    file = folder / "meta" / "tasks.jsonl"
    lines = read_json_lines(file) if file.is_file() else []
    return episodes, _texts(file, [(line["task_index"], line.get("task")) for line in lines])


def _place(folder: Path, info: Mapping[str, Any], template: str, **names: Any) -> Path:
    """A file of the set, by the template in ``info.json``."""
    try:
        name = info[template].format(**names)
    except (KeyError, IndexError, AttributeError, ValueError, TypeError):
        raise InputError(
            f"{folder}/meta/info.json: {template} is {info.get(template)!r}, where {', '.join(names)} can be put in; "
            "correct it."
        ) from None
    return folder / check_inside(name, f"{folder}/meta/info.json: {template}")


def _read_v3(folder: Path, info: Mapping[str, Any], videos: list[str]) -> tuple[list[Episode], dict[int, str | None]]:
    """Many episodes a file; an episode's row says where it lies."""
    files = sorted((folder / "meta" / "episodes").glob("chunk-*/file-*.parquet"))
    if not files:
        raise InputError(f"{folder}/meta/episodes holds no episodes table.")
    places = [f"videos/{key}/{name}" for key in videos for name in ("chunk_index", "file_index", "from_timestamp")]
    columns = ["episode_index", "length", "dataset_from_index", "data/chunk_index", "data/file_index", *places]
    rows = [row for file in files for row in read_rows(file, columns, optional=("tasks",))]
    episodes = []
    for row in sorted(rows, key=lambda row: _count(row["dataset_from_index"], "dataset_from_index")):
        index = _count(row["episode_index"], "episode_index")
        table = _place(folder, info, "data_path", **_numbers(row, "data"))
        paths = {
            key: _place(folder, info, "video_path", video_key=key, **_numbers(row, f"videos/{key}")) for key in videos
        }
        offset = {key: float(row[f"videos/{key}/from_timestamp"]) for key in videos}
        length = _count(row["length"], f"length of episode {index}")
        texts = _listed_texts(row.get("tasks"))
        episodes.append(Episode(index, length, table, paths, offset, int(row["dataset_from_index"]), texts))
    file = folder / "meta" / "tasks.parquet"
    rows = read_rows(file) if file.is_file() else []
    return episodes, _texts(file, [(row["task_index"], one_text(file, row)) for row in rows])


def _numbers(row: Mapping[str, Any], of: str) -> dict[str, int]:
    """Chunk and file in which an episode's rows or video lie; whole numbers in whatever type pandas made of them."""
    names = ("chunk_index", "file_index")
    return {name: _count(row[f"{of}/{name}"], f"{of}/{name}") for name in names}


def _listed_texts(value: Any) -> frozenset[str]:
    """An episode's texts as meta lists them; whatever is no list of texts says nothing."""
    return frozenset(x for x in value if isinstance(x, str)) if isinstance(value, list) else frozenset()


def _texts(file: Path, pairs: list[tuple[Any, Any]]) -> dict[int, str | None]:
    """Task texts by number; a blank, null or other value is no text.

    Raises:
      InputError: a number has two texts.
    """
    texts: dict[int, str | None] = {}
    for task_index, value in pairs:
        number, text = _count(task_index, "task_index"), value if isinstance(value, str) and value.strip() else None
        if texts.setdefault(number, text) != text:
            raise InputError(f"{file} gives task {number} two texts, {texts[number]!r} and {text!r}; keep one.")
    return texts


def _check_episodes(meta: Meta) -> None:
    """Raise where the list of episodes contradicts itself."""
    numbers = [episode.index for episode in meta.episodes]
    twice = [number for number, times in collections.Counter(numbers).items() if times > 1]
    if twice:
        raise InputError(f"{meta.folder}/meta lists episode {twice[0]} twice; remove one of the two.")
    for episode in meta.episodes:
        if episode.length < 1:
            raise InputError(f"{meta.folder}/meta lists episode {episode.index} with {episode.length} rows; remove it.")
        if any(not (math.isfinite(offset) and offset >= 0) for offset in episode.offset.values()):
            raise InputError(f"{meta.folder}/meta says that episode {episode.index} begins at no time of its video.")
    for before, after in zip(meta.episodes, meta.episodes[1:], strict=False):
        if before.first is not None and after.first is not None and before.first + before.length > after.first:
            raise InputError(
                f"{meta.folder}/meta gives the same rows to episodes {before.index} and {after.index}: the first has "
                f"{before.length} from {before.first} on, the second begins at {after.first}."
            )
