"""Weights as safetensors files in PyTorch's names: streamed out, in shards where they are large, and read back."""

import functools
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import numpy as np

from clp_jax.checkpoint.safetensors.listing import INDEX_FILE, WEIGHTS_FILE
from clp_jax.checkpoint.safetensors.tensorfile import TensorWriter, read_tensors
from clp_jax.errors import InputError
from clp_jax.export.result import same_bits, write_json
from clp_jax.export.weights import Weights
from clp_jax.models import blocks_of, family_of
from clp_jax.models.layers.torch_rules import Blocks, Layout, from_tensors, tensors_of, to_tensors
from clp_jax.progress import stage

SHARD_BYTES = 5 * 10**9
"""A file of more is split, as transformers splits it."""

Tensors = Mapping[str, jax.ShapeDtypeStruct]


def write_tensors(
    weights: Weights, folder: Path, *, zeros: Tensors | None = None, prefix: str = "", shard_bytes: int | None = None
) -> None:
    """Streams the weights into a folder: one file, or shards and the index that says where which tensor is.

    Args:
      weights: without adapters.
      folder: to write into.
      zeros: tensors that the file needs and no parameter stands for.
      prefix: of every name.
      shard_bytes: no shard holds more, unless it is one tensor; None for one file of any size.
    """
    layout, blocks = _layout(weights)
    absent = dict(zeros or {})
    tensors = tensors_of(weights.leaves, layout, blocks) | absent
    stream: Iterator[tuple[str, np.ndarray | None]] = itertools.chain(
        to_tensors(weights.leaves, layout, blocks, weights.parts), ((name, None) for name in absent)
    )
    shards = _shards(tensors, shard_bytes)
    with stage("writing", total=len(tensors), unit="tensors") as advance:
        for file, names in shards.items():
            held = {prefix + name: tensors[name] for name in names}
            with TensorWriter(folder / file, held, {"format": "pt"}) as writer:
                for name, tensor in itertools.islice(stream, len(names)):
                    writer.write(prefix + name, None if tensor is None else [tensor])
                    advance(1)
    if len(shards) > 1:
        places = {prefix + name: file for file, names in shards.items() for name in names}
        size = sum(_bytes(tensor) for tensor in tensors.values())
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))})


def check_tensors(weights: Weights, folder: Path, *, prefix: str = "") -> int:
    """Compares what lies in a folder with what was to be written, in JAX's layout, bit for bit.

    Returns:
      How many parameters there are.

    Raises:
      InputError: they differ.
    """
    index = folder / INDEX_FILE
    files = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {WEIGHTS_FILE}
    tensors = {
        name.removeprefix(prefix): tensor for file in files for name, tensor in read_tensors(folder / file).items()
    }
    source = ((path, i, part) for path in weights.leaves for i, part in enumerate(weights.parts(path)))
    layout, blocks = _layout(weights)
    read_back = from_tensors(weights.leaves, layout, blocks, tensors)
    with stage("reading back", total=None, unit="layers") as advance:
        for (path, i, back), (expected_path, j, part) in zip(read_back, source, strict=True):
            assert (path, i) == (expected_path, j)
            if not same_bits(back, part):
                raise InputError(
                    f"layer {i} of {path} does not read back as it was written; check the disk, export again."
                )
            advance(1)
    return len(weights.leaves)


def _layout(weights: Weights) -> tuple[Layout, Blocks]:
    """The rule of every leaf, and which leaves are stacked."""
    family = family_of(weights.architecture)
    return family.stored_layout(weights.leaves, ()), functools.partial(blocks_of, family.STACKS)


def _shards(tensors: Tensors, limit: int | None) -> dict[str, list[str]]:
    """Names of the tensors in every file, in their order."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if limit is not None and shards[-1] and size + _bytes(tensor) > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += _bytes(tensor)
    if len(shards) == 1:
        return {WEIGHTS_FILE: shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": names for i, names in enumerate(shards, 1)}


def _bytes(tensor: jax.ShapeDtypeStruct) -> int:
    return math.prod(tensor.shape) * tensor.dtype.itemsize
