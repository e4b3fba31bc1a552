"""Small LeRobot data sets to damage: their info, tables and videos edited in place."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from clp_jax.data.lerobot import LeRobotData
from clp_jax.data.lerobot_meta import read_meta
from clp_jax.data.proof import Proof, prove
from scripts.make_lerobot_toy import FPS, write

STATE, ACTION, VIDEO, STILL = "observation.state", "action", "observation.video", "observation.still"
VERSIONS = ("v2.1", "v3.0")


def make(folder: Path, version: str, *, cameras: dict[str, str] | None = None) -> Path:
    """Three episodes of 7, 4 and 9 rows, ten a second."""
    write(folder, version, {STATE: 5, ACTION: 3}, {VIDEO: "video", STILL: "image"} if cameras is None else cameras)
    return folder


def copied(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))


def proven(folder: Path, *, cameras: tuple[str, ...] = (VIDEO, STILL), tolerance: float | None = None) -> Proof:
    data = LeRobotData(read_meta(folder, cameras), tolerance=tolerance)
    return prove(data, columns=(STATE, ACTION), cameras=cameras, tolerance=tolerance)


def edit_info(folder: Path, **changes) -> None:
    info = json.loads((folder / "meta/info.json").read_text())
    (folder / "meta/info.json").write_text(json.dumps(info | changes))


def edit_feature(folder: Path, key: str, **changes) -> None:
    info = json.loads((folder / "meta/info.json").read_text())
    info["features"][key] = info["features"].get(key, {}) | changes
    (folder / "meta/info.json").write_text(json.dumps(info))


def edit_table(file: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    pq.write_table(change(pq.read_table(file)), file)


def tables(folder: Path) -> list[Path]:
    return sorted(folder.glob("data/*/*.parquet"))


def last_table(folder: Path) -> Path:
    """Nine rows of episode 2 in either version."""
    return tables(folder)[-1]


def with_column(table: pa.Table, key: str, values) -> pa.Table:
    return table.set_column(table.schema.get_field_index(key), key, values)


def counter(key: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    """Edits a column of one number in the last table."""

    def edit(table: pa.Table) -> pa.Table:
        values = table.column(key).to_numpy().copy()
        return with_column(table, key, pa.array(change(values)))

    return lambda folder: edit_table(last_table(folder), edit)


def vectors(values: np.ndarray, kind: pa.DataType | None = None) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1), kind), values.shape[1])


def vector(key: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    """Edits a column of vectors in the last table."""

    def edit(table: pa.Table) -> pa.Table:
        column = table.column(key).combine_chunks()
        return with_column(table, key, vectors(change(column.flatten().to_numpy().reshape(len(column), -1).copy())))

    return lambda folder: edit_table(last_table(folder), edit)


def pictures(key: str, change: Callable[[bytes], bytes | None], row: int = 4) -> Callable[[Path], None]:
    """Edits one stored picture of the last table."""

    def edit(table: pa.Table) -> pa.Table:
        stored = [value["bytes"] for value in table.column(key).to_pylist()]
        stored[row] = change(stored[row])
        return with_column(table, key, pa.array([{"bytes": content, "path": None} for content in stored]))

    return lambda folder: edit_table(last_table(folder), edit)


def encoded(picture: np.ndarray, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, format=kind)
    return stream.getvalue()


def write_video(
    file: Path, frames: np.ndarray, *, codec: str = "libx264", options: dict[str, str] | None = None
) -> None:
    with av.open(str(file), "w") as container:
        stream = container.add_stream(codec, rate=FPS, options=options or {})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def edit_lines(file: Path, change: Callable[[list[dict]], list[dict]]) -> None:
    lines = [json.loads(line) for line in file.read_text().split("\n") if line]
    file.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in change(lines)))


def edit_episodes(folder: Path, change: Callable[[list[dict]], list[dict]]) -> None:
    """Edits the list of episodes of either version."""
    file = folder / "meta/episodes.jsonl"
    if file.exists():
        edit_lines(file, change)
    else:
        file = next(folder.glob("meta/episodes/*/*.parquet"))
        edit_table(file, lambda table: pa.Table.from_pylist(change(table.to_pylist())))


def edit_tasks(folder: Path, change: Callable[[list[dict]], list[dict]]) -> None:
    """Edits the list of tasks of either version."""
    file = folder / "meta/tasks.jsonl"
    if file.exists():
        edit_lines(file, change)
    else:
        edit_table(folder / "meta/tasks.parquet", lambda table: pa.Table.from_pylist(change(table.to_pylist())))
