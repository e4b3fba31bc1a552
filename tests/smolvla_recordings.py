"""Recordings of lerobot's SmolVLA: what went in, what came out, and how closely we must agree.

Tolerances are absolute. lerobot's own run with two threads differs from that with one by 1.2e-5 in hidden states (of
magnitude 28), 3e-6 in velocities, 1.4e-6 in samples; sums in another order may double that.
"""

import functools
import json
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from etils import epath

from clp_jax.checkpoint.safetensors.tensorfile import read_tensors
from clp_jax.models import abstract_params, blocks_of, smolvla
from clp_jax.models.layers.torch_rules import from_tensors
from clp_jax.trees import flatten, unflatten

GOLDEN = Path(__file__).parent / "golden" / "smolvla"
CAMERAS = ("top", "wrist", "side")
KEEPS = {"": (0, 1, 4, 5, 8, 11), "b/": (2, 3, 4, 9, 10)}
"""The blocks that the pruned recordings keep, by the prefix of their arrays."""

HIDDEN_TOLERANCE = 5e-5
VELOCITY_TOLERANCE = 2e-5
SAMPLE_TOLERANCE = 2e-5
"""Ten steps of which each adds a tenth of a velocity."""
RELATIVE_TOLERANCE = 1e-5
"""Of losses and of norms of gradients, which are sums over all of the above."""


@functools.cache
def recording(name: str = "") -> dict[str, np.ndarray]:
    """The arrays of ``golden_smolvla<name>.npz``."""
    with np.load(GOLDEN / f"golden_smolvla{name}.npz") as archive:
        return {key: archive[key] for key in archive.files}


@functools.cache
def tensors() -> dict[str, np.ndarray]:
    """The recorded checkpoint as lerobot wrote it."""
    return read_tensors(GOLDEN / "ckpt" / "model.safetensors")


def architecture(dtype: str = "float32") -> smolvla.Architecture:
    """The recorded checkpoint's."""
    return smolvla.architecture_of_tensors(tensors(), epath.Path(GOLDEN / "ckpt"), dtype=dtype)


def blocks(path: str, rows: int) -> range | None:
    """The block in each row of a leaf."""
    return blocks_of(smolvla.STACKS, path, rows)


@functools.cache
def params() -> dict:
    """The recorded parameters as our tree."""
    return tree_of(tensors(), architecture())


def tree_of(file: dict[str, np.ndarray], sizes: smolvla.Architecture) -> dict:
    """The tensors of a file as a tree."""
    leaves = flatten(abstract_params(sizes))
    rows: dict[str, list[np.ndarray]] = {path: [] for path in leaves}
    for path, _, array in from_tensors(leaves, smolvla.layout(leaves), blocks, file):
        rows[path].append(array)
    return unflatten({path: np.stack(a) if blocks(path, len(a)) else a[0] for path, a in rows.items()})


def parts(path: str, leaves: dict[str, np.ndarray]) -> Iterator[np.ndarray]:
    """The rows of a stacked leaf, or the one array of any other."""
    leaf = np.asarray(leaves[path])
    return iter(leaf if blocks(path, len(leaf)) is not None else leaf[None])


def cut(tree: dict, keep: tuple[int, ...]) -> dict:
    """The tree with the kept blocks of VLM and expert."""
    leaves = {}
    for path, leaf in flatten(tree).items():
        numbers = None if path.startswith("vision/") else blocks(path, leaf.shape[0])
        leaves[path] = leaf if numbers is None else leaf[[row for row, block in enumerate(numbers) if block in keep]]
    return unflatten(leaves)


def inputs(**changes: np.ndarray) -> dict[str, np.ndarray]:
    """The three recorded observations with their actions, noise and times, images as the cameras gave them."""
    g = recording()
    with np.load(GOLDEN / "images_u8.npz") as archive:
        arrays = {f"image/observation.images.{camera}": archive[camera] for camera in CAMERAS}
    arrays |= {f"image_mask/observation.images.{camera}": g[f"image_mask/{camera}"] for camera in CAMERAS}
    arrays |= {"tokenized_prompt": g["tokens"], "tokenized_prompt_mask": g["token_mask"]}
    arrays |= {name: g[name] for name in ("state", "actions", "noise", "time", "action_is_pad")}
    return smolvla.complete(architecture(), arrays | changes)


@functools.cache
def grad_norms() -> dict:
    """L2 norms of the gradient of every tensor and lists of what is trained."""
    return json.loads((GOLDEN / "grad_norms_smolvla.json").read_text())


def batch_loss(loss) -> jax.Array:
    """The loss of a batch."""
    return (loss.weight * loss.each).sum() / loss.weight.sum()


def assert_close(ours, theirs, tolerance: float) -> None:
    """All values within an absolute tolerance."""
    np.testing.assert_allclose(np.asarray(ours, np.float32), theirs, rtol=0, atol=tolerance)
