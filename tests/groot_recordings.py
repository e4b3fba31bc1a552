"""Recordings of the real GR00T-N1.5: what went in, what came out, and how closely we must agree.

Tolerances are absolute. Upstream's own float32 and float64 runs differ by 5e-5 in the states of the diffusion
transformer (whose values reach 28) and by 1.5e-5 in those of the language model; its float32 tables of sines, which are
exact to 4e-5, move the former by another 1.1e-4 and velocities by 2e-5.
"""

import functools
import json
from pathlib import Path

import jax
import numpy as np
from etils import epath

from clp_jax.checkpoint.safetensors.tensorfile import read_tensors
from clp_jax.models import abstract_params, blocks_of, groot, rows_kept, stack_of
from clp_jax.models.layers.torch_rules import from_tensors, tensors_of
from clp_jax.trees import abstract, flatten, unflatten

GOLDEN = Path(__file__).parent / "golden" / "groot"
KEEP: dict[str, list[int]] = json.loads((GOLDEN / "keep.json").read_text())
KEPT = {"llm": KEEP["llm"], "vl": KEEP["vl_self_attention"], "dit": KEEP["dit"]}
"""The blocks that the pruned checkpoint keeps, by tower."""

STATE_TOLERANCE = 5e-5
DIT_TOLERANCE = 3e-4
OUTPUT_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 5e-5


def blocks(path, rows):
    """The block in each row of a leaf."""
    return blocks_of(groot.STACKS, path, rows)


@functools.cache
def recording(name: str = "golden") -> dict[str, np.ndarray]:
    """The arrays of a recording."""
    with np.load(GOLDEN / f"{name}.npz") as archive:
        return {key: archive[key] for key in archive.files}


def tensors(name: str) -> dict[str, np.ndarray]:
    """The tensors of a recorded checkpoint."""
    return read_tensors(GOLDEN / name / "model.safetensors")


def architecture_folder(name: str) -> epath.Path:
    """The folder of a recorded checkpoint."""
    return epath.Path(GOLDEN / name)


@functools.cache
def architecture(name: str, **settings) -> groot.Architecture:
    """The architecture of a recorded checkpoint, in float32 unless said otherwise."""
    return groot.architecture_of(tensors(name), architecture_folder(name), **{"dtype": "float32", **settings})


def tree_of(tensors, architecture, **layout) -> dict:
    """The parameter tree that the tensors of a file make."""
    leaves = flatten(abstract_params(architecture))
    arrays = {path: np.zeros(leaf.shape, leaf.dtype) for path, leaf in leaves.items()}
    for path, row, part in from_tensors(leaves, groot.layout(leaves, **layout), blocks, tensors):
        target = arrays[path] if blocks(path, 1) is None else arrays[path][row]
        assert target.dtype == part.dtype
        target[...] = part
    return unflatten(arrays)


@functools.cache
def checkpoint(name: str) -> dict:
    """The parameters of a recorded checkpoint."""
    return tree_of(tensors(name), architecture(name))


def named(tree) -> dict[str, np.ndarray]:
    """A tree's arrays by the names of the tensors that they become."""
    leaves = flatten(tree)
    layout, found = groot.layout(leaves), {}
    for path, leaf in leaves.items():
        numbers = blocks(path, leaf.shape[0])
        rows = [(0, leaf)] if numbers is None else list(zip(numbers, leaf, strict=True))
        for i, part in rows:
            parts = zip(layout[path].names, layout[path].split(np.asarray(part)), strict=True)
            found |= {name.format(i=i): tensor for name, tensor in parts}
    return found


def shapes_of(tree) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that a tree becomes."""
    leaves = flatten(abstract(tree))
    return {name: tuple(leaf.shape) for name, leaf in tensors_of(leaves, groot.layout(leaves), blocks).items()}


def sliced(tree, kept) -> dict:
    """The rows of the kept blocks of every stacked leaf."""
    result = {}
    for path, leaf in flatten(tree).items():
        stack = stack_of(groot.STACKS, path)
        cut = stack is not None and stack.tower in kept
        rows = list(rows_kept(stack.blocks(len(leaf)), kept[stack.tower])) if cut else ...
        result[path] = leaf[rows]
    return unflatten(result)


def inputs(index: int | None = None) -> dict[str, np.ndarray]:
    """The three recorded observations, or one of them alone and without the padding of its prompt."""
    g = recording()
    arrays = {
        "image/ego_view": g["images_u8"],
        "state": g["state"][:, 0],
        "tokenized_prompt": g["input_ids"].astype(np.int32),
        "tokenized_prompt_mask": g["attention_mask"].astype(bool),
        "embodiment_id": g["embodiment_id"].astype(np.int32),
        "actions": g["action"],
        "action_mask": g["action_mask"],
        "noise": g["noise"],
        "time": g["time"],
        "sample_noise": g["sample_noise"],
    }
    if index is None:
        return arrays
    arrays = {key: array[index : index + 1] for key, array in arrays.items()}
    real = arrays["tokenized_prompt_mask"][0]
    return arrays | {key: arrays[key][:, real] for key in ("tokenized_prompt", "tokenized_prompt_mask")}


def batch_loss(loss) -> jax.Array:
    """The loss of a batch from those of its observations."""
    return (loss.each * loss.weight).sum() / loss.weight.sum()


@functools.cache
def runner(architecture: groot.Architecture, capture: bool = True):
    """Velocity, states and sampled actions in one compiled function of parameters, inputs and gates."""
    model = groot.build(architecture)

    @jax.jit
    def run(params, inputs, gates):
        velocity, towers = groot.forward(model, params, inputs, gates=gates, capture=capture)
        noise, steps = inputs["sample_noise"], groot.num_steps(architecture)
        actions = groot.sample(model, params, inputs, noise=noise, num_steps=steps, gates=gates)
        return {"velocity": velocity, "towers": towers, "actions": actions}

    def with_loss(params, inputs, gates=None):
        out = run(params, inputs, gates or {})
        # Not `losses`, which would compile the model again; it is tested with its gradient.
        mask = inputs["action_mask"]
        error = np.square(np.asarray(out["velocity"], np.float32) - (inputs["actions"] - inputs["noise"]))
        return out | {"loss": (error * mask).sum() / mask.sum(), "error": error}

    return with_loss


@functools.cache
def gradient():
    """`Loss` and gradient of the whole recorded checkpoint, as one compiled function of parameters and inputs."""
    model = groot.build(architecture("ckpt"))

    def loss(params, inputs):
        each = groot.losses(model, params, inputs)
        return batch_loss(each), each

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@functools.cache
def ours(name: str, **settings) -> dict:
    """Our outputs for a recorded checkpoint on the recorded inputs."""
    return runner(architecture(name, **settings))(checkpoint(name), inputs())


def largest_difference(ours, theirs) -> float:
    """max |a - b| in float64."""
    a, b = (np.asarray(x, np.float32).astype(np.float64) for x in (ours, theirs))
    assert a.shape == b.shape
    return float(np.abs(a - b).max())
