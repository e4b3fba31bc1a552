"""safetensors files as streams: the header first, then tensor by tensor, so that no model is ever in memory.

The format: eight bytes with the length of the header, a JSON header with dtype, shape and place of every tensor, then
their bytes in C order without gaps.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import jax
import jax.numpy as jnp
import numpy as np

from clp_jax.errors import InputError

DTYPE_CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_DTYPES = {code: jnp.dtype(name) for name, code in DTYPE_CODES.items()}


class TensorWriter:
    """Writes one safetensors file; every declared tensor must be written, in the order of the declaration.

    Args:
      file: path to create.
      tensors: shape and dtype by name.
      metadata: strings for the header.
    """

    def __init__(self, file: Path, tensors: Mapping[str, jax.ShapeDtypeStruct], metadata: Mapping[str, str]):
        self._pending = iter(tensors.items())
        header: dict[str, Any] = {"__metadata__": dict(metadata)}
        offset = 0
        for name, tensor in tensors.items():
            size = math.prod(tensor.shape) * tensor.dtype.itemsize
            place = [offset, offset + size]
            header[name] = {"dtype": DTYPE_CODES[tensor.dtype.name], "shape": list(tensor.shape), "data_offsets": place}
            offset += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # so that tensors begin at multiples of eight bytes
        self._path = file
        self._file: IO[bytes] = file.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def __enter__(self) -> "TensorWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._file.close()
        if kind is None and (left := [name for name, _ in self._pending]):
            raise AssertionError(f"{self._path} lacks {left}")

    def write(self, name: str, parts: Iterable[np.ndarray] | None) -> None:
        """Writes the next tensor.

        Args:
          name: must be the next one declared.
          parts: its values, in one array or several that follow each other in C order; None for zeros.

        Raises:
          InputError: a value is NaN or infinite.
        """
        expected, tensor = next(self._pending)
        assert name == expected, f"{name} is not next, {expected} is"
        size = math.prod(tensor.shape) * tensor.dtype.itemsize
        if parts is None:
            self._file.seek(size, 1)
            self._file.truncate()  # zeros, which take no place on most disks
            return
        for part in parts:
            assert part.dtype == tensor.dtype, f"{name} is {part.dtype}, not {tensor.dtype}"
            if not np.isfinite(part.sum(dtype=np.float32)) and not np.isfinite(part).all():
                raise InputError(
                    f"{name} holds NaN or infinity, the run that saved it has diverged; take another step."
                )
            self._file.write(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
            size -= part.nbytes
        assert size == 0, f"{name} is {size} bytes short"


def read_tensors(file: Path, *, raw: bool = False) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file as views of the mapped file: nothing is read before it is used.

    Args:
      file: path.
      raw: give their bytes instead, whatever their dtype.

    Raises:
      InputError: the header does not fit the file.
    """
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    data = np.memmap(file, np.uint8, "r", offset=8 + length)
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        if end > data.size:
            raise InputError(f"{file} ends before its tensor {name}; export it again.")
        tensors[name] = (
            data[begin:end] if raw else data[begin:end].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
        )
    return tensors
