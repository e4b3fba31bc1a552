"""What a LeRobot data set says about itself: versions v2.0, v2.1 and v3.0 brought to one form.

Facts of the formats: lerobot 0.6.1 (v3.0) and the revision that openpi pins, 0cf8648 (v2.1; v2.0 differs only in the
statistics, which are not read).
"""

import contextlib
import dataclasses
import importlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from clp_jax.errors import InputError

VERSIONS = ("v2.0", "v2.1", "v3.0")


@dataclasses.dataclass(frozen=True)
class Episode:
    """One episode: its rows and where they are stored.

    Attributes:
      index: its number.
      length: number of rows.
      table: file with its rows.
      videos: video file by key.
      offset: seconds in the video file at which the episode begins, by key.
    """

    index: int
    length: int
    table: Path
    videos: Mapping[str, Path]
    offset: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Meta:
    """A data set without its rows.

    Attributes:
      folder: where it lies.
      fps: frames per second.
      features: per column or video its description in ``info.json``.
      episodes: in the order of their rows.
      tasks: text by task number.
    """

    folder: Path
    fps: float
    features: Mapping[str, Any]
    episodes: tuple[Episode, ...]
    tasks: Mapping[int, str]


def read_meta(folder: str | os.PathLike[str]) -> Meta:
    """Read ``meta/`` and check that every file it names is there.

    Raises:
      InputError: unknown version, or a file is missing or broken.
    """
    path = Path(folder).expanduser()
    info = _json(path / "meta" / "info.json")
    version = info.get("codebase_version") if isinstance(info, dict) else None
    if version not in VERSIONS:
        raise InputError(f"{folder} is a LeRobot data set of version {version}; {', '.join(VERSIONS)} are read.")
    try:
        videos = [key for key, feature in info["features"].items() if feature["dtype"] == "video"]
        episodes, tasks = (_read_v3 if version == "v3.0" else _read_v2)(path, info, videos)
        meta = Meta(path, float(info["fps"]), info["features"], tuple(episodes), tasks)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise InputError(f"{folder}/meta is not as LeRobot {version} writes it: {error!r}.") from error
    if not meta.episodes:
        raise InputError(f"{folder} holds no episodes.")
    files = {file for episode in episodes for file in (episode.table, *episode.videos.values())}
    missing = sorted(str(file) for file in files if not file.is_file())
    if missing:
        raise InputError(f"{folder} lacks {len(missing)} of the {len(files)} files of its meta; first {missing[0]}.")
    return meta


def find_folder(source: str | os.PathLike[str]) -> Path:
    """The folder of a data set, fetched from the hub if ``source`` is no folder but looks like ``owner/name``.

    Raises:
      InputError: no such folder, and no such data set, package or network.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not (folder / "meta" / "info.json").is_file():
            raise InputError(f"{source} is no LeRobot data set: it has no meta/info.json.")
        return folder
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(source)):
        raise InputError(f"there is no data at {source}; give a .npz, a LeRobot folder or a hub id (owner/name).")
    try:
        huggingface_hub = importlib.import_module("huggingface_hub")
    except ImportError:
        raise InputError(
            f"there is no folder {source}; to fetch it from the hub, pip install huggingface_hub."
        ) from None
    try:
        return Path(huggingface_hub.snapshot_download(str(source), repo_type="dataset"))
    except Exception as error:  # requests, httpx and the hub each raise their own
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise InputError(f"there is no folder {source}, and the hub does not give the data set: {reason}") from error


@contextlib.contextmanager
def readable(file: Path) -> Iterator[None]:
    """Turns what pyarrow raises about a broken file into an `InputError` of one line."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise InputError(f"{file} cannot be read, it is cut off or damaged: {reason}") from error


def _read_v2(folder: Path, info: Mapping[str, Any], videos: list[str]) -> tuple[list[Episode], dict[int, str]]:
    """One table file and one video file an episode."""
    episodes = []
    for line in sorted(_json_lines(folder / "meta" / "episodes.jsonl"), key=lambda line: line["episode_index"]):
        index = int(line["episode_index"])
        names = {"episode_chunk": index // int(info["chunks_size"]), "episode_index": index}
        files = {key: folder / info["video_path"].format(video_key=key, **names) for key in videos}
        table = folder / info["data_path"].format(**names)
        episodes.append(Episode(index, int(line["length"]), table, files, dict.fromkeys(videos, 0.0)))
    tasks = {int(line["task_index"]): str(line["task"]) for line in _json_lines(folder / "meta" / "tasks.jsonl")}
    return episodes, tasks


def _read_v3(folder: Path, info: Mapping[str, Any], videos: list[str]) -> tuple[list[Episode], dict[int, str]]:
    """Many episodes a file; an episode's row says where it lies."""
    files = sorted((folder / "meta" / "episodes").glob("chunk-*/file-*.parquet"))
    if not files:
        raise InputError(f"{folder}/meta/episodes holds no episodes table.")
    places = [f"videos/{key}/{name}" for key in videos for name in ("chunk_index", "file_index", "from_timestamp")]
    columns = ["episode_index", "length", "dataset_from_index", "data/chunk_index", "data/file_index", *places]
    rows = [row for file in files for row in _rows(file, columns)]
    episodes = []
    for row in sorted(rows, key=lambda row: row["dataset_from_index"]):
        table = info["data_path"].format(chunk_index=row["data/chunk_index"], file_index=row["data/file_index"])
        paths = {
            key: folder
            / info["video_path"].format(
                video_key=key, chunk_index=row[f"videos/{key}/chunk_index"], file_index=row[f"videos/{key}/file_index"]
            )
            for key in videos
        }
        offset = {key: float(row[f"videos/{key}/from_timestamp"]) for key in videos}
        episodes.append(Episode(int(row["episode_index"]), int(row["length"]), folder / table, paths, offset))
    tasks = folder / "meta" / "tasks.parquet"
    return episodes, {int(row["task_index"]): str(row[_task_column(row)]) for row in _rows(tasks)}


def _task_column(row: Mapping[str, Any]) -> str:
    """The text is the row label of a pandas table, which its writer may have named."""
    return next(key for key in ("task", "__index_level_0__") if key in row)


def _rows(file: Path, columns: list[str] | None = None) -> list[dict[str, Any]]:
    import pyarrow.parquet

    if not file.is_file():
        raise InputError(f"there is no {file}.")
    with readable(file):
        table = pyarrow.parquet.ParquetFile(file)
        absent = [name for name in columns or [] if name not in table.schema_arrow.names]
        if absent:
            raise InputError(f"{file} has no column {', '.join(absent)}.")
        return table.read(columns=columns).to_pylist()


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise InputError(f"{file} is no JSON: {error}.") from error


def _json_lines(file: Path) -> list[Any]:
    try:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise InputError(f"{file} holds a line that is no JSON: {error}.") from error
