"""Pictures in the tables, proven intact without decoding them."""

import dataclasses
import hashlib
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from clp_jax.data import pictures
from clp_jax.data.lerobot import LeRobotData, Rows
from clp_jax.data.lerobot_files import check_columns, readable
from clp_jax.data.proof.findings import Check, Finding, limited
from clp_jax.data.proof.videos import other_sizes
from clp_jax.data.tables import open_table
from clp_jax.errors import InputError
from clp_jax.progress import track_stage

_FILES_AT_A_TIME = 4


def check_stills(data: LeRobotData, rows: Rows, key: str, *, most_bytes: int | None) -> Check:
    """Proves the pictures of a camera.

    Args:
      data: the data set.
      rows: of it.
      key: of the camera.
      most_bytes: how much to read, spread over the files; None reads all.
    """
    files = list(dict.fromkeys(place.file for place in rows.places))
    sizes = {file: _column_bytes(file, key) for file in files}
    total = sum(sizes.values())
    share = 1.0 if most_bytes is None else min(1.0, most_bytes / max(total, 1))
    owners = {file: [] for file in files}
    for episode, place in zip(rows.episodes, rows.places, strict=True):
        owners[place.file].append((place.row, episode.length, episode.index))
    with ThreadPoolExecutor(_FILES_AT_A_TIME) as pool:
        found = pool.map(lambda file: _File(file, key, share, owners[file]), files)
        read = [next(found) for _ in track_stage(files, f"checking {key}", unit="files")]
    findings = [Finding(_named(owners[file.path], file, key, bad)) for file in read for bad in file.problems]
    sizes = frozenset(size for file in read for size in file.sizes)
    findings += other_sizes(data, key, sorted(sizes))
    count = sum(file.count for file in read)
    if count < rows.ends[-1] and not findings:
        findings.append(
            Finding(f"{key}: {count:,} of {rows.ends[-1]:,} pictures were proven, spread over the files.", fatal=False)
        )
    digest = hashlib.sha256("".join(file.digest for file in read).encode()).hexdigest()
    amount = f"{count:,} pictures, {share * total / 2**20:,.0f} MiB"
    return Check(f"camera {key}", amount, limited(findings), digest, sizes)


@dataclasses.dataclass
class _Bad:
    """The first bad picture of an episode, or where a file could not be read on, and how many more there are."""

    row: int
    text: str
    more: int = 0


class _File:
    """What was found in the rows of its episodes; an episode has one sentence about its first bad picture."""

    def __init__(self, path: Path, key: str, share: float, owners: list[tuple[int, int, int]]):
        self.path, self.row, self.count = path, 0, 0
        bad: dict[int, _Bad] = {}
        self.sizes: set[tuple[int, int]] = set()
        checksum = 0
        owner = np.full(max(first + length for first, length, _ in owners), -1)
        for position, (first, length, _) in enumerate(owners):
            owner[first : first + length] = position
        try:
            for row, content in _stored(path, key, share):
                self.row = row
                if row >= len(owner) or owner[row] < 0:
                    continue
                try:
                    if content is None:
                        raise InputError("no image bytes.")
                    checksum = zlib.crc32(content, checksum)
                    picture = pictures.verify(content)
                except InputError as error:
                    if (position := int(owner[row])) in bad:
                        bad[position].more += 1
                    else:
                        bad[position] = _Bad(row, str(error))
                    continue
                self.sizes.add((picture.height, picture.width))
                self.count += 1
        except InputError as error:
            bad[len(owners)] = _Bad(self.row, str(error))
        self.problems = tuple(bad.values())
        self.digest = f"{self.count} {checksum:08x};"


def _named(owners: list[tuple[int, int, int]], file: _File, key: str, bad: _Bad) -> str:
    first, _, episode = max((owner for owner in owners if owner[0] <= bad.row), default=owners[0])
    held = bad.text if bad.text.startswith(str(file.path)) else f"{file.path} holds {bad.text}"
    more = f" So it is with {bad.more} more of this episode." if bad.more else ""
    return f"episode {episode}, frame {bad.row - first}, {key}: {held}{more}"


def _stored(path: Path, key: str, share: float) -> Iterator[tuple[int, Any]]:
    """Row and content (None if absent) of each picture of some row groups, spread over the file."""
    with readable(path), open_table(path) as table:
        check_columns(path, table.schema_arrow.names, [key])
        groups, row = table.num_row_groups, 0
        chosen = (
            set(np.linspace(0, groups - 1, max(1, round(share * groups))).astype(int).tolist()) if groups else set()
        )
        for group in range(groups):
            if group in chosen:
                column = table.read_row_group(group, columns=[key], use_threads=False).column(key)
                yield from enumerate(_contents(column), row)
            row += table.metadata.row_group(group).num_rows


def _contents(column: Any) -> Iterator[Any]:
    from pyarrow import types

    for chunk in column.chunks:
        kind = chunk.type
        if not types.is_struct(kind) or kind.get_field_index("bytes") < 0:
            raise InputError(f"no image bytes, but {kind}.")
        for value, inside in zip(chunk.field("bytes"), chunk.is_valid(), strict=True):
            whole = inside.as_py() and value.is_valid
            yield memoryview(value.as_buffer()).cast("B") if whole else None


def _column_bytes(path: Path, key: str) -> int:
    try:
        with readable(path), open_table(path) as table:
            meta = table.metadata
            groups = [meta.row_group(number) for number in range(meta.num_row_groups)]
            columns = [group.column(number) for group in groups for number in range(group.num_columns)]
            return sum(c.total_compressed_size for c in columns if f"{c.path_in_schema}.".startswith(f"{key}."))
    except InputError:
        return 0
