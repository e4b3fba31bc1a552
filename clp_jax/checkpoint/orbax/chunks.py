"""Where the encoded bytes of every chunk of a checkpoint lie: in files of their own, or within those of a database."""

import functools
import math
import urllib.parse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np
import tensorstore as ts
from etils import epath

from clp_jax.checkpoint.manifest import Listed, check_arrays, listed_arrays
from clp_jax.errors import InputError, blamed_on
from clp_jax.files import parse_json

_SPARE = 2**20
"""Elements by which a chunk may be larger than its array; what is far larger is no chunk of it."""
_MOST_CHUNKS = 10**7

PARAMS, TRAIN_STATE = "params", "train_state"
"""The items of a step that hold arrays."""
_IN_MANIFEST = {PARAMS: "arrays", TRAIN_STATE: "train_state"}
"""What the step's manifest calls them."""


@dataclass(frozen=True)
class Span:
    """A range of bytes of a file."""

    file: epath.Path
    offset: int
    length: int

    def open(self) -> IO[bytes]:
        """Opens the file at the beginning of the range.

        Raises:
          InputError: the file is missing.
        """
        try:
            file = self.file.open("rb")
            file.seek(self.offset)
        except OSError as error:
            raise InputError(f"{self.file} cannot be read ({error}); the checkpoint is incomplete") from error
        return file

    def read(self, most: int | None = None) -> bytes:
        """Returns the bytes of the range, or so many from its beginning."""
        with self.open() as file:
            return file.read(self.length if most is None else min(most, self.length))


@dataclass(frozen=True)
class StoredArray:
    """A zarr (version 2) array and the place of its encoded chunks.

    Attributes:
      name: name in the checkpoint, e.g. "params.PaliGemma.llm.embedder.input_embedding".
      metadata: content of ``.zarray``.
      chunks: encoded bytes, or where they lie, by the chunk's index in the grid.
      crc32: checksums of encoded chunks, by the index as files have it, where a manifest lists them.
    """

    name: str
    metadata: dict[str, Any]
    chunks: dict[tuple[int, ...], bytes | Span]
    crc32: Mapping[str, int] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return tuple(self.metadata["shape"])

    @property
    def chunk(self) -> tuple[int, ...]:
        """Shape of a chunk."""
        return tuple(self.metadata["chunks"])

    @functools.cached_property
    def dtype(self) -> np.dtype:
        """Dtype of the elements."""
        return _dtype(self.metadata["dtype"])

    @property
    def compressed(self) -> bool:
        """Whether chunks are zstd frames."""
        return self.metadata["compressor"] is not None

    def place(self, index: tuple[int, ...]) -> bytes | Span:
        """Returns the encoded chunk or its place; a chunk that was never written is an error, Orbax writes all."""
        if index not in self.chunks:
            raise InputError(f"{self.name} lacks chunk {index}, so the checkpoint is incomplete; copy or save it again")
        return self.chunks[index]


def stored_arrays(item: epath.Path) -> dict[str, StoredArray]:
    """Lists the arrays of a checkpoint item without reading any.

    Args:
      item: folder with ``manifest.ocdbt``, or (Orbax without OCDBT) with one folder per array.

    Returns:
      The arrays by name.

    Raises:
      InputError: the database is damaged, an array is of a form that Orbax does not write by default, or the manifest
        beside the item lists other names, shapes or dtypes.
    """
    entries = dict(_database(item) if (item / "manifest.ocdbt").exists() else _folders(item))
    arrays = {}
    for key, value in entries.items():
        name, _, leaf = key.rpartition("/")
        if leaf == ".zarray":
            content = value if isinstance(value, bytes) else value.read()
            arrays[name] = StoredArray(name, _checked(name, parse_json(content, f"the description of {name}")), {})
    for key, value in entries.items():
        name, _, leaf = key.rpartition("/")
        if name in arrays and leaf[0] != ".":
            index = tuple(int(i) for i in leaf.split(arrays[name].metadata.get("dimension_separator", ".")))
            arrays[name].chunks[index] = value
    listed = listed_arrays(item.parent, _IN_MANIFEST[item.name]) if item.name in _IN_MANIFEST else None
    if listed is None:
        return arrays
    check_arrays(item.parent, listed, {name: Listed(x.shape, x.dtype.name) for name, x in arrays.items()})
    return {name: replace(array, crc32=listed[name].crc32) for name, array in arrays.items()}


def chunk_name(index: tuple[int, ...]) -> str:
    """Name of a chunk's file."""
    return ".".join(map(str, index)) or "0"


def store_address(folder: epath.Path) -> str:
    """Returns the address of a folder as tensorstore spells it."""
    text = str(folder)
    return f"{text}/" if "://" in text else f"file://{urllib.parse.quote(str(Path(text).absolute()))}/"


def _checked(name: str, metadata: dict[str, Any]) -> dict[str, Any]:
    """The content of a ``.zarray``, of which each field is what we take it for."""
    with blamed_on(f"the .zarray of {name}", verb="is damaged"):
        shape, chunk, compressor = metadata["shape"], metadata["chunks"], metadata["compressor"]
        for what, sizes, least in (("shape", shape, 0), ("chunks", chunk, 1)):
            if not isinstance(sizes, list) or not all(type(size) is int and size >= least for size in sizes):
                raise ValueError(f"{what} is {sizes!r}, no list of whole numbers from {least}")
        if len(shape) != len(chunk):
            raise ValueError(f"shape {shape} and chunks {chunk} have different numbers of axes")
        if math.prod(chunk) > _SPARE + 2 * math.prod(shape) or math.prod(map(_parts, shape, chunk)) > _MOST_CHUNKS:
            raise ValueError(f"chunks of {chunk} do not belong to an array of shape {shape}")
        if compressor is not None and not isinstance(compressor, dict):
            raise ValueError(f"compressor is {compressor!r}")
        if metadata.get("dimension_separator", ".") not in (".", "/"):
            raise ValueError(f"dimension_separator is {metadata['dimension_separator']!r}")
        if _dtype(metadata["dtype"]).kind not in "fiubV" or _dtype(metadata["dtype"]).itemsize == 0:
            raise ValueError(f"dtype is {metadata['dtype']!r}, no numbers")
        supported = metadata["order"] == "C" and not metadata.get("filters")
    level = 1 if compressor is None else compressor.get("level", 1)
    if not supported or (compressor is not None and compressor.get("id") != "zstd") or type(level) is not int:
        form = {key: metadata.get(key) for key in ("compressor", "filters", "order")}
        raise InputError(f"{name} is stored as {form}, not in C order with zstd; save it with Orbax's default settings")
    return metadata


def _parts(size: int, chunk: int) -> int:
    return -(-size // chunk)


def _dtype(text: str) -> np.dtype:
    """tensorstore spells bfloat16 and its like by their names."""
    return np.dtype(text if text[0] in "<>|" else getattr(ml_dtypes, text))


def _database(item: epath.Path) -> Iterator[tuple[str, bytes | Span]]:
    """Yields the entries of an OCDBT database; small values are part of its index."""
    base = ts.KvStore.open(store_address(item)).result()
    root = ts.ocdbt.dump(base).result()["versions"][-1]["root"]
    pending = [(root["location"], b"")]
    while pending:
        location, prefix = pending.pop()
        for entry in ts.ocdbt.dump(base, location).result()["entries"]:
            if "location" in entry:
                pending.append((entry["location"], prefix + entry["subtree_common_prefix"]))
                continue
            value = entry.get("inline_value")
            yield (prefix + entry["key"]).decode(), _span(item, entry["indirect_value"]) if value is None else value


def _span(item: epath.Path, reference: str) -> Span:
    """Parses "value:<folder>:<file>:<offset>:<length>"; the folder is that of one writing process, or empty."""
    _, folder, file, offset, length = reference.split(":")
    return Span(item / (urllib.parse.unquote(folder) + urllib.parse.unquote(file)), int(offset), int(length))


def _folders(item: epath.Path) -> Iterator[tuple[str, Span]]:
    for folder in item.iterdir():
        if (folder / ".zarray").exists():
            for file in folder.iterdir():
                yield f"{folder.name}/{file.name}", Span(file, 0, file.stat().length)
