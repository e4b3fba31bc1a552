"""Write a LeRobot data set (v3.0) without lerobot: vectors, and cameras as PNG in the tables, which is exact."""

import dataclasses
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from clp_jax.errors import InputError

_PATHS = {
    "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
    "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
}
_FILE_BYTES, _FILES_PER_CHUNK = 100 * 2**20, 1000
_ROWS_PER_GROUP = 16
"""Whoever wants one picture reads its row group."""
_PICTURES_MEASURED = 2000
"""Every so many-th picture enters the statistics, so that there are about as many."""
_COUNTERS = {"timestamp": "float32", "frame_index": "int64", "episode_index": "int64", "index": "int64"}


@dataclasses.dataclass(frozen=True)
class Recorded:
    """One episode.

    Attributes:
      task: the instruction.
      vectors: per feature float32 [n, d].
      images: per camera n pictures as PNG.
    """

    task: str
    vectors: Mapping[str, np.ndarray]
    images: Mapping[str, list[bytes]]

    def __len__(self) -> int:
        return len(next(iter(self.vectors.values())))


def write_lerobot(folder: Path, episodes: Iterable[Recorded], *, fps: int, robot_type: str) -> None:
    """Write a data set.

    Args:
      folder: exists and is empty.
      episodes: one after the other; none is kept in memory but the numbers.
      fps: rows per second.
      robot_type: as lerobot shows it.

    Raises:
      InputError: there are no episodes.
    """
    tables, rows, tasks = _Tables(folder), 0, {}
    vectors, pictures, places = {}, {}, []
    for number, episode in enumerate(episodes):
        task, n = tasks.setdefault(episode.task, len(tasks)), len(episode)
        frames = np.arange(n)
        columns = {key: _vector_column(values) for key, values in episode.vectors.items()}
        columns |= {key: [{"bytes": png, "path": None} for png in stored] for key, stored in episode.images.items()}
        counters = [(frames / fps).astype(np.float32), frames, np.full(n, number), rows + frames, np.full(n, task)]
        columns |= dict(zip([*_COUNTERS, "task_index"], counters, strict=True))
        chunk, file = tables.add(columns, sum(len(png) for stored in episode.images.values() for png in stored))
        places.append(
            {
                "episode_index": number,
                "tasks": [episode.task],
                "length": n,
                "data/chunk_index": chunk,
                "data/file_index": file,
                "dataset_from_index": rows,
                "dataset_to_index": rows + n,
                "meta/episodes/chunk_index": 0,
                "meta/episodes/file_index": 0,
            }
        )
        for key, values in [*episode.vectors.items(), *zip([*_COUNTERS, "task_index"], counters, strict=True)]:
            vectors.setdefault(key, []).append(np.reshape(values, (n, -1)))
        for key, stored in episode.images.items():
            pictures.setdefault(key, []).extend(stored)
        rows += n
    tables.close()
    if not places:
        raise InputError("a data set without episodes cannot be written.")
    numbers = {key: np.concatenate(parts) for key, parts in vectors.items()}
    shapes = {key: decode_png(stored[0]).shape for key, stored in pictures.items()}
    _write_meta(folder, places, list(tasks), _features(numbers, shapes), fps, robot_type)
    stats = {key: _statistics(values, len(values)) for key, values in numbers.items()}
    stats |= {key: _picture_statistics(stored) for key, stored in pictures.items()}
    (folder / "meta/stats.json").write_text(json.dumps(stats))


def png_of(picture: UInt8[np.ndarray, "h w 3"]) -> bytes:
    """A picture as PNG."""
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, format="PNG", compress_level=3)  # 6 is a quarter smaller and twice as slow
    return stream.getvalue()


def decode_png(content: bytes) -> UInt8[np.ndarray, "h w 3"]:
    """The inverse of `png_of`."""
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


class _Tables:
    """The files of rows: a new one when one is full."""

    def __init__(self, folder: Path):
        self._folder, self._writer = folder, None
        self._number, self._bytes = 0, 0

    def add(self, columns: Mapping[str, Any], size: int) -> tuple[int, int]:
        """Append an episode of about so many bytes; the chunk and the file that it is in."""
        import pyarrow
        import pyarrow.parquet

        if self._writer is not None and self._bytes + size > _FILE_BYTES:
            self.close()
            self._number += 1
        place = divmod(self._number, _FILES_PER_CHUNK)
        table = pyarrow.table(dict(columns))
        if self._writer is None:
            file = self._folder / _PATHS["data_path"].format(chunk_index=place[0], file_index=place[1])
            file.parent.mkdir(parents=True, exist_ok=True)
            self._writer, self._bytes = pyarrow.parquet.ParquetWriter(file, table.schema), 0
        self._writer.write_table(table, row_group_size=_ROWS_PER_GROUP)
        self._bytes += size
        return place

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer = None


def _vector_column(values: np.ndarray) -> Any:
    import pyarrow

    flat = pyarrow.array(np.ascontiguousarray(values, np.float32).reshape(-1))
    return pyarrow.FixedSizeListArray.from_arrays(flat, values.shape[1])


def _features(numbers: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    kinds = _COUNTERS | {"task_index": "int64"}
    images = {
        key: {"dtype": "image", "shape": list(shape), "names": ["height", "width", "channels"]}
        for key, shape in shapes.items()
    }
    return images | {
        key: {"dtype": kinds.get(key, "float32"), "shape": [values.shape[1]], "names": None}
        for key, values in numbers.items()
    }


def _write_meta(
    folder: Path, places: list[dict], tasks: list[str], features: dict[str, Any], fps: int, robot_type: str
) -> None:
    import pyarrow
    import pyarrow.parquet

    info = {
        "codebase_version": "v3.0",
        "robot_type": robot_type,
        "total_episodes": len(places),
        "total_frames": places[-1]["dataset_to_index"],
        "total_tasks": len(tasks),
        "chunks_size": _FILES_PER_CHUNK,
        "data_files_size_in_mb": _FILE_BYTES // 2**20,
        "video_files_size_in_mb": 200,
        "fps": fps,
        "splits": {"train": f"0:{len(places)}"},
        **_PATHS,
        "video_path": None,
        "features": features,
    }
    table = folder / "meta/episodes/chunk-000/file-000.parquet"
    table.parent.mkdir(parents=True)
    (folder / "meta/info.json").write_text(json.dumps(info, indent=4))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(places), table)
    # The texts are the row labels of a pandas table, which lerobot reads them as.
    kinds = {"task_index": ("int64", "int64"), "task": ("unicode", "object")}
    described = [
        {"name": key, "field_name": key, "pandas_type": pandas, "numpy_type": numpy, "metadata": None}
        for key, (pandas, numpy) in kinds.items()
    ]
    label = {"index_columns": ["task"], "columns": described, "pandas_version": "2.0.0", "column_indexes": []}
    named = pyarrow.table({"task_index": list(range(len(tasks))), "task": tasks})
    named = named.replace_schema_metadata({"pandas": json.dumps(label)})
    pyarrow.parquet.write_table(named, folder / "meta/tasks.parquet")


def _statistics(values: np.ndarray, count: int) -> dict[str, Any]:
    """lerobot's statistics of rows [n, d]."""
    values = values.astype(np.float64)
    found = {name: getattr(values, name)(axis=0) for name in ("min", "max", "mean", "std")}
    found |= {f"q{share:02d}": np.quantile(values, share / 100, axis=0) for share in (1, 10, 50, 90, 99)}
    return {name: value.tolist() for name, value in found.items()} | {"count": [count]}


def _picture_statistics(stored: list[bytes]) -> dict[str, Any]:
    """The same per channel, of values in 0..1, from some of the pictures."""
    chosen = list(_every(stored, max(1, len(stored) // _PICTURES_MEASURED)))
    pixels = np.concatenate([decode_png(png)[::4, ::4].reshape(-1, 3) for png in chosen]) / 255.0
    found = _statistics(pixels, len(chosen))
    return {name: value if name == "count" else np.reshape(value, (3, 1, 1)).tolist() for name, value in found.items()}


def _every(items: list[bytes], step: int) -> Iterator[bytes]:
    return iter(items[::step])
