"""Checkpoints of random weights for measurements, written as they are released."""

import functools
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import zstandard
from etils import epath

from clp_jax.checkpoint.orbax.writer import COMPRESSOR, ArrayForm, ItemWriter
from clp_jax.checkpoint.safetensors.folder import CONFIG_FILE
from clp_jax.checkpoint.safetensors.listing import WEIGHTS_FILE
from clp_jax.checkpoint.safetensors.tensorfile import TensorWriter
from clp_jax.models import abstract_params, blocks_of, smolvla
from clp_jax.models.layers.torch_rules import tensors_of
from clp_jax.trees import flatten

Layout = Literal["leaf", "orbax", "layer"]
"""Chunks of a checkpoint: one a leaf; as Orbax saves a model (halved until at most 2 GiB); one a row of axis 0."""

ORBAX_CHUNK_BYTES = 2**31


def make_checkpoint(
    folder: os.PathLike,
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    *,
    layout: Layout,
    bfloat16_exact: bool = False,
    seed: int = 0,
) -> None:
    """Writes a checkpoint of random weights, one chunk in memory at a time.

    Args:
      folder: step folder to create.
      shapes: shape and dtype by path; dtypes of two bytes or more.
      layout: how the arrays are cut into chunks.
      bfloat16_exact: round every value to what bfloat16 holds.
      seed: of the random weights.
    """
    random = np.random.default_rng(seed)
    pool = random.standard_normal(2**24, np.float32) * 0.02
    if bfloat16_exact:
        pool = (pool.view(np.uint32) & 0xFFFF0000).view(np.float32)
    with ItemWriter(epath.Path(folder) / "params") as writer:
        for path, leaf in shapes.items():
            name, dtype = ".".join(["params", *path.split("/")]), np.dtype(leaf.dtype)
            chunk = _chunk_shape(leaf.shape, dtype.itemsize, layout)
            writer.add(name, ArrayForm(leaf.shape, chunk, dtype))
            values = pool.astype(dtype)
            for index in np.ndindex(*(math.ceil(n / c) for n, c in zip(leaf.shape, chunk, strict=True))):
                with writer.open_chunk(name, index) as file:
                    encoder = zstandard.ZstdCompressor(COMPRESSOR["level"]).compressobj(
                        size=math.prod(chunk) * dtype.itemsize
                    )
                    for block in _random_blocks(random, values, math.prod(chunk)):
                        file.write(encoder.compress(block.view(np.uint8).data))
                    file.write(encoder.flush())


def make_folder(folder: Path, architecture: smolvla.Architecture, *, seed: int = 0) -> None:
    """Writes the config and the weights of a policy folder, random float32.

    Args:
      folder: to create.
      architecture: of the policy.
      seed: of the random weights.
    """
    random, leaves = np.random.default_rng(seed), flatten(abstract_params(architecture))
    pool = random.standard_normal(2**24, np.float32) * 0.02
    tensors = tensors_of(leaves, smolvla.stored_layout(leaves, ()), functools.partial(blocks_of, smolvla.STACKS))
    folder.mkdir()
    (folder / CONFIG_FILE).write_text(json.dumps({"type": "smolvla", "num_vlm_layers": architecture.depths["vlm"]}))
    with TensorWriter(folder / WEIGHTS_FILE, tensors, {"format": "pt"}) as writer:
        for name, tensor in tensors.items():
            writer.write(name, _random_blocks(random, pool, math.prod(tensor.shape)))


def _chunk_shape(shape: tuple[int, ...], itemsize: int, layout: Layout) -> tuple[int, ...]:
    """Returns the shape of a chunk.

    >>> _chunk_shape((18, 2, 2048, 16384), 4, "orbax")
    (18, 2, 2048, 4096)
    """
    if layout == "layer" and len(shape) > 2:
        return (1, *shape[1:])
    chunk = list(shape)
    while layout == "orbax" and math.prod(chunk) * itemsize > ORBAX_CHUNK_BYTES:
        chunk[int(np.argmax(chunk))] //= 2
    return tuple(chunk)


def _random_blocks(random: np.random.Generator, pool: np.ndarray, count: int) -> Iterator[np.ndarray]:
    """Yields elements: stretches of a pool far longer than what zstd looks back on, so none seems repeated."""
    while count:
        start = int(random.integers(pool.size - pool.size // 4))
        block = pool[start : start + min(count, pool.size // 4)]
        count -= block.size
        yield block
