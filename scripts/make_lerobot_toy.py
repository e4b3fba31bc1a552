"""Write a tiny LeRobot data set without lerobot: version v2.1 or v3.0, cameras as video or as still images.

``python scripts/make_lerobot_toy.py FOLDER v3.0`` writes three short episodes that `clp norm-stats`, `clp analyse` and
the tests read. Pictures and numbers are made up; each frame differs from every other by its brightness.
"""

import io
import json
import sys
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

FPS = 10
LENGTHS = (7, 4, 9)
TASKS = ("push the button", "open the_drawer")
V21_PATHS = {
    "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
    "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
}
V30_PATHS = {
    "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
    "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
}
V30_FILES = (0, 0, 1)
"""The file in which each episode lies, so that one holds two and there are two."""


def main() -> None:
    """Write MetaWorld-like data to the folder of the command line."""
    if len(sys.argv) != 3 or sys.argv[2] not in ("v2.1", "v3.0"):
        sys.exit("usage: python scripts/make_lerobot_toy.py FOLDER v2.1|v3.0")
    write(Path(sys.argv[1]), sys.argv[2], {"observation.state": 4, "action": 4}, {"observation.image": "video"})


def write(
    folder: Path,
    version: str,
    columns: dict[str, int],
    cameras: dict[str, str],
    *,
    size: tuple[int, int] = (48, 64),
    lengths: tuple[int, ...] = LENGTHS,
) -> dict[str, np.ndarray]:
    """Write a data set and return what is in it.

    Args:
      folder: to create.
      version: v2.1 or v3.0.
      columns: dimensions of each vector.
      cameras: ``video`` or ``image`` per camera.
      size: height and width of a picture.
      lengths: rows of each episode.

    Returns:
      All rows by key; of videos the pictures before compression.
    """
    rng, rows = np.random.default_rng(0), sum(lengths)
    truth = {key: rng.uniform(-1, 1, (rows, d)).astype(np.float32) for key, d in columns.items()}
    truth |= {key: pictures(rows, size, hue) for hue, key in enumerate(cameras)}
    truth["frame_index"] = np.concatenate([np.arange(n) for n in lengths])
    truth["timestamp"] = (truth["frame_index"] / FPS).astype(np.float32)
    truth["episode_index"] = np.repeat(np.arange(len(lengths)), lengths)
    truth["index"] = np.arange(rows)
    truth["task_index"] = truth["episode_index"] % len(TASKS)
    features = {key: {"dtype": "float32", "shape": [d], "names": None} for key, d in columns.items()}
    features |= {
        key: {"dtype": kind, "shape": [*size, 3], "names": ["height", "width", "channels"]}
        for key, kind in cameras.items()
    }
    features |= {
        key: {"dtype": str(truth[key].dtype), "shape": [1], "names": None}
        for key in ("timestamp", "frame_index", "episode_index", "index", "task_index")
    }
    (folder / "meta").mkdir(parents=True)
    (_write_v21 if version == "v2.1" else _write_v30)(folder, truth, features, lengths)
    return truth


def pictures(rows: int, size: tuple[int, int], hue: int) -> np.ndarray:
    """A smooth gradient whose brightness counts the rows."""
    y, x = np.mgrid[0 : 1 : size[0] * 1j, 0 : 1 : size[1] * 1j]
    shade = 40 + 150 * np.arange(rows)[:, None, None] / max(1, rows - 1) + 40 * (x + y - 1)
    weights = np.roll([1.0, 0.8, 0.6], hue)
    return (shade[..., None] * weights).round().clip(0, 255).astype(np.uint8)


def _write_v21(folder: Path, truth: dict[str, np.ndarray], features: dict, lengths: tuple[int, ...]) -> None:
    videos = [key for key, feature in features.items() if feature["dtype"] == "video"]
    episodes, statistics = [], []
    for episode, length in enumerate(lengths):
        rows = np.flatnonzero(truth["episode_index"] == episode)
        names = {"episode_chunk": 0, "episode_index": episode}
        _write_table(folder / V21_PATHS["data_path"].format(**names), [rows], truth, features)
        for key in videos:
            _write_video(folder / V21_PATHS["video_path"].format(video_key=key, **names), truth[key][rows])
        tasks = [TASKS[truth["task_index"][rows[0]]]]
        episodes.append({"episode_index": episode, "tasks": tasks, "length": length})
        statistics.append({"episode_index": episode, "stats": _statistics(truth, features, rows)})
    _write_info(folder, "v2.1", features, lengths, V21_PATHS | {"total_videos": 3 * len(videos), "total_chunks": 1})
    _write_lines(folder / "meta/episodes.jsonl", episodes)
    _write_lines(folder / "meta/episodes_stats.jsonl", statistics)
    _write_lines(folder / "meta/tasks.jsonl", [{"task_index": i, "task": task} for i, task in enumerate(TASKS)])


def _write_v30(folder: Path, truth: dict[str, np.ndarray], features: dict, lengths: tuple[int, ...]) -> None:
    videos = [key for key, feature in features.items() if feature["dtype"] == "video"]
    rows_of = [np.flatnonzero(truth["episode_index"] == episode) for episode in range(len(lengths))]
    for file in sorted(set(V30_FILES)):
        groups = [rows for rows, home in zip(rows_of, V30_FILES, strict=True) if home == file]
        names = {"chunk_index": 0, "file_index": file}
        _write_table(folder / V30_PATHS["data_path"].format(**names), groups, truth, features)
        for key in videos:
            _write_video(
                folder / V30_PATHS["video_path"].format(video_key=key, **names), truth[key][np.concatenate(groups)]
            )
    episodes = []
    for episode, (rows, file) in enumerate(zip(rows_of, V30_FILES, strict=True)):
        before = sum(len(r) for r, home in zip(rows_of[:episode], V30_FILES[:episode], strict=True) if home == file)
        row = {"episode_index": episode, "tasks": [TASKS[truth["task_index"][rows[0]]]], "length": len(rows)}
        row |= {"data/chunk_index": 0, "data/file_index": file}
        row |= {"dataset_from_index": int(rows[0]), "dataset_to_index": int(rows[-1]) + 1}
        for key in videos:
            row |= {f"videos/{key}/chunk_index": 0, f"videos/{key}/file_index": file}
            row |= {
                f"videos/{key}/from_timestamp": before / FPS,
                f"videos/{key}/to_timestamp": (before + len(rows)) / FPS,
            }
        episodes.append(row | {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0})
    _write_info(
        folder, "v3.0", features, lengths, V30_PATHS | {"data_files_size_in_mb": 100, "video_files_size_in_mb": 200}
    )
    (folder / "meta/stats.json").write_text(json.dumps(_statistics(truth, features, truth["index"])))
    table = folder / "meta/episodes/chunk-000/file-000.parquet"
    table.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(episodes), table)
    kinds = {"task_index": ("int64", "int64"), "task": ("unicode", "object")}
    described = [
        {"name": key, "field_name": key, "pandas_type": pandas, "numpy_type": numpy, "metadata": None}
        for key, (pandas, numpy) in kinds.items()
    ]
    label = {"index_columns": ["task"], "columns": described, "pandas_version": "2.0.0", "column_indexes": []}
    tasks = pa.table({"task_index": list(range(len(TASKS))), "task": list(TASKS)})
    pq.write_table(tasks.replace_schema_metadata({"pandas": json.dumps(label)}), folder / "meta/tasks.parquet")


def _write_info(folder: Path, version: str, features: dict, lengths: tuple[int, ...], more: dict) -> None:
    info = {
        "codebase_version": version,
        "robot_type": "toy",
        "total_episodes": len(lengths),
        "total_frames": sum(lengths),
        "total_tasks": len(TASKS),
        "chunks_size": 1000,
        "fps": FPS,
        "splits": {"train": f"0:{len(lengths)}"},
        "features": features,
    }
    (folder / "meta/info.json").write_text(json.dumps(info | more, indent=4))


def _write_table(file: Path, groups: list[np.ndarray], truth: dict[str, np.ndarray], features: dict) -> None:
    """One row group an episode; images as PNG, marked as such for the datasets library."""
    file.parent.mkdir(parents=True, exist_ok=True)
    marks = {}
    for key, feature in features.items():
        if feature["dtype"] == "image":
            marks[key] = {"_type": "Image"}
        elif feature["dtype"] != "video":
            value = {"dtype": feature["dtype"], "_type": "Value"}
            several = truth[key].ndim == 2
            marks[key] = {"feature": value, "length": feature["shape"][0], "_type": "Sequence"} if several else value
    mark = {"huggingface": json.dumps({"info": {"features": marks}})}
    writer = None
    for rows in groups:
        table = pa.table({key: _column(truth[key][rows]) for key in marks}).replace_schema_metadata(mark)
        writer = writer or pq.ParquetWriter(file, table.schema)
        writer.write_table(table)
    if writer is not None:
        writer.close()


def _column(values: np.ndarray) -> pa.Array:
    if values.ndim == 4:
        return pa.array([{"bytes": _png(picture), "path": None} for picture in values])
    if values.ndim == 2:
        return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
    return pa.array(values)


def _png(picture: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, format="PNG")
    return stream.getvalue()


def _write_video(file: Path, frames: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "10", "g": "2"})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def _statistics(truth: dict[str, np.ndarray], features: dict, rows: np.ndarray) -> dict:
    statistics = {}
    for key, feature in features.items():
        values, image = truth[key][rows].astype(np.float64), feature["dtype"] in ("image", "video")
        axes = (0, 1, 2) if image else (0,)
        shape = (3, 1, 1) if image else tuple(feature["shape"])
        scale = 255.0 if image else 1.0
        found = {name: getattr(values, name)(axis=axes) / scale for name in ("min", "max", "mean", "std")}
        statistics[key] = {name: value.reshape(shape).tolist() for name, value in found.items()}
        statistics[key]["count"] = [len(rows)]
    return statistics


def _write_lines(file: Path, lines: list[dict]) -> None:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
