"""openpi-client's wire format: msgpack with NumPy arrays. Strict in both directions, and never pickle.

An array travels as ``{b"__ndarray__": True, b"data": <its bytes>, b"dtype": "<f4", b"shape": [2, 3]}`` and a NumPy
scalar as ``{b"__npgeneric__": True, b"data": <the value>, b"dtype": "<f4"}``: openpi_client/msgpack_numpy.py at commit
15a9616. That module lets NumPy interpret whatever dtype a message names; here it is one of a few.
"""

import itertools
import math
import re
import sys
from collections.abc import Mapping
from typing import Any

import msgpack
import numpy as np

from clp_jax.errors import InputError

_DTYPE = re.compile(r"\|b1|\|?[iu]1|[<>][iu][248]|[<>]f[248]")
_TEXT = re.compile(r"[<>]U[1-9]\d{0,4}|\|S[1-9]\d{0,4}")
"""Dtypes of text and of its bytes, which NumPy's users send as a prompt."""
_ARRAY, _SCALAR = b"__ndarray__", b"__npgeneric__"
_MAX_ENTRIES = 1024
"""Of one list or map, and lists and maps of one message: bytes are many only inside arrays."""
_MAX_AXES = 8


def pack(value: Any) -> bytes:
    """A message of numbers, text, lists, maps and arrays.

    Raises:
      TypeError: some part is none of these, or an array of objects, text or complex numbers.

    >>> unpack(pack({"actions": np.zeros((2, 3), np.float32)}))["actions"].shape
    (2, 3)
    """
    return msgpack.packb(value, default=_plain)


def unpack(message: bytes) -> Any:
    """What `pack` or openpi-client packed; arrays are read-only views of the message.

    Raises:
      InputError: no msgpack, or an array that is not what it says.

    >>> unpack(b"no msgpack at all")
    Traceback (most recent call last):
    clp_jax.errors.InputError: the message is no msgpack: unpack(b) received extra data.
    """
    count = itertools.count(1)

    def counted(container: Any) -> Any:
        if next(count) > _MAX_ENTRIES:
            raise InputError(f"the message holds more than {_MAX_ENTRIES} lists and maps.")
        return container

    try:
        return msgpack.unpackb(
            message,
            object_hook=lambda pairs: counted(_restored(pairs)),
            list_hook=counted,
            ext_hook=_refuse_extension,
            max_array_len=_MAX_ENTRIES,
            max_map_len=_MAX_ENTRIES,
        )
    except InputError:
        raise
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException) as error:
        reason = str(error).split("\n")[0].rstrip(".") or type(error).__name__
        raise InputError(f"the message is no msgpack: {reason}.") from error


def _plain(value: Any) -> dict[bytes, Any]:
    if not isinstance(value, np.ndarray | np.generic):
        raise TypeError(f"{type(value).__name__} cannot be sent")
    if not _DTYPE.fullmatch(value.dtype.str):
        raise TypeError(f"arrays of {value.dtype} cannot be sent")
    if isinstance(value, np.ndarray):
        shape = list(value.shape)
        return {_ARRAY: True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": shape}
    return {_SCALAR: True, b"data": value.item(), b"dtype": value.dtype.str}


def _restored(pairs: dict[Any, Any]) -> Any:
    """An array or a scalar where a map stands for one."""
    if _ARRAY in pairs:
        return _array(pairs)
    if _SCALAR in pairs:
        return _scalar(pairs)
    return pairs


def _array(pairs: Mapping[bytes, Any]) -> np.ndarray:
    data, shape, dtype = pairs.get(b"data"), pairs.get(b"shape"), _dtype(pairs, text=True)
    if not isinstance(data, bytes) or not isinstance(shape, list) or len(shape) > _MAX_AXES:
        raise InputError(f"an array needs its bytes and a shape of at most {_MAX_AXES} axes.")
    if not all(type(size) is int and 0 <= size < 2**31 for size in shape):
        raise InputError("the shape of an array holds something other than sizes.")
    if math.prod(shape) * dtype.itemsize != len(data):
        raise InputError(f"an array of shape {tuple(shape)} and dtype {dtype} is not {len(data)} bytes long.")
    flat = np.frombuffer(data, dtype)
    if dtype.kind == "b" and flat.view(np.uint8).max(initial=0) > 1:
        raise InputError("an array of bools holds other bytes than 0 and 1.")
    if dtype.kind == "U" and not _are_characters(flat.view(f"{dtype.str[0]}u4")):
        raise InputError("an array of text holds numbers that are no characters.")
    return flat.reshape(shape)


def _scalar(pairs: Mapping[Any, Any]) -> np.generic:
    dtype = _dtype(pairs)
    value: Any = pairs.get(b"data")
    wanted = {"b": (bool,), "i": (int,), "u": (int,), "f": (int, float)}[dtype.kind]
    if type(value) not in wanted:
        raise InputError(f"a scalar of dtype {dtype} holds a {type(value).__name__}.")
    if dtype.kind in "iu" and not np.iinfo(dtype).min <= int(value) <= np.iinfo(dtype).max:
        raise InputError(f"a scalar of dtype {dtype} is out of its range.")
    return dtype.type(value)


def _are_characters(codes: np.ndarray) -> bool:
    return not ((codes > sys.maxunicode) | ((codes >= 0xD800) & (codes <= 0xDFFF))).any()


def _dtype(pairs: Mapping[bytes, Any], *, text: bool = False) -> np.dtype:
    name = pairs.get(b"dtype")
    if not isinstance(name, str) or not (_DTYPE.fullmatch(name) or (text and _TEXT.fullmatch(name))):
        raise InputError(f"arrays of dtype {str(name)[:40]!r} are not read; send bool, integers or floats.")
    return np.dtype(name)


def _refuse_extension(code: int, _: bytes) -> None:
    raise InputError(f"the message holds a msgpack extension ({code}), which means nothing here.")
