"""A small model of every kind, made-up parameters and inputs for it, and one compiled function of each architecture."""

import dataclasses
import functools

import groot_recordings
import jax
import numpy as np
import recordings
import smolvla_recordings
import toys
from etils import epath

from clp_jax.models import Architecture, Lengths, abstract_params, family_of
from clp_jax.processing.norm_stats import NormStats
from clp_jax.processing.robots import Robot
from clp_jax.trees import flatten, unflatten

BATCH, STEPS = 2, 2

WRITERS = (
    r".*/MultiHeadDotProductAttention_0/out/.*|.*/MlpBlock_0/Dense_1/.*",  # SigLIP
    r".*/attn_vec_einsum(?:_1)?/w|.*/mlp(?:_1)?/linear",  # Gemma
    r".*/(?:even|odd)/(?:o_proj|down_proj)",  # SmolVLA's decoder
    r".*/llm/layers/(?:attn/o|mlp/down)/kernel",  # Qwen
    r".*/(?:cross|self|blocks)/(?:attn/out|ff/down)/.*",  # GR00T's transformers
)
"""The leaves that write to a residual stream: with them at zero a block does nothing."""


@functools.cache
def architecture(kind: str) -> Architecture:
    """Four blocks in every tower but the image encoder, which has fewer."""
    if kind in ("pi0", "pi05", "pi0_fast"):
        return toys.architecture(kind)
    full = smolvla_recordings.architecture() if kind == "smolvla" else groot_recordings.architecture("ckpt")
    return full.with_depths({tower.name: min(tower.depth, 4) for tower in full.towers})


def lengths(arch: Architecture) -> Lengths:
    """Short ones; the prompt of GR00T holds its images."""
    image_tokens = arch.vision.num_tokens if hasattr(arch, "image_token") else 0
    return Lengths(4, 5 + image_tokens)


@functools.cache
def params(arch: Architecture) -> dict:
    """Random parameters of which none is zero, so that every branch is alive."""
    rng, drawn = np.random.default_rng(0), {}
    for path, leaf in flatten(abstract_params(arch)).items():
        fan_in = leaf.shape[-2] if len(leaf.shape) > 1 else 100
        drawn[path] = (rng.standard_normal(leaf.shape) / fan_in**0.5).astype(np.float32)
    return unflatten(drawn)


def inputs(arch: Architecture, batch: int = BATCH) -> dict[str, np.ndarray]:
    """Random arrays of the shapes that the family describes, with its fixed noise and times."""
    rng, family, arrays = np.random.default_rng(1), family_of(arch), {}
    for key, leaf in family.inputs(arch, lengths(arch)).items():
        shape = batch, *leaf.shape
        if leaf.dtype == np.bool_:
            arrays[key] = np.ones(shape, bool)
        elif np.issubdtype(leaf.dtype, np.integer):
            arrays[key] = rng.integers(0, {"embodiment_id": 4}.get(key, 23), shape).astype(leaf.dtype)
            arrays[key] = np.ones_like(arrays[key]) if key == "token_ar_mask" else arrays[key]
        else:
            arrays[key] = rng.standard_normal(shape, np.float32)
    if hasattr(arch, "image_token"):
        arrays["tokenized_prompt"][:, 1 : 1 + arch.vision.num_tokens] = arch.image_token
    arrays = family.complete(arch, arrays)
    return arrays | family.fixed_draw(arch, arrays)


def gates(arch: Architecture, removed: dict[str, tuple[int, ...]] | None = None) -> dict[str, np.ndarray]:
    """A gate for every block of every tower, zero for those that go."""
    found = {name: np.ones((depth, 1), np.float32) for name, depth in arch.depths.items()}
    for name, blocks in (removed or {}).items():
        found[name][list(blocks)] = 0
    return found


def removal(arch: Architecture, group: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """Blocks that can go from a group: one, or one of every kind where kinds alternate; not the same in every group."""
    towers = [tower for tower in arch.towers if tower.name in group]
    period, depth = max(tower.period for tower in towers), min(tower.depth for tower in towers)
    first = arch.groups.index(group) % (depth - period + 1)
    return dict.fromkeys(group, tuple(range(first, first + period)))


@functools.cache
def run(arch: Architecture):
    """Output, states and losses, compiled, of parameters, inputs and gates."""
    family, model = family_of(arch), family_of(arch).build(arch)

    @jax.jit
    def compiled(params, inputs, gates):
        output, states = family.forward(model, params, inputs, gates=gates, capture=True)
        return output, states, family.losses(model, params, inputs, gates=gates)

    return compiled


@functools.cache
def whole(kind: str):
    """What the whole model gives for its inputs."""
    arch = architecture(kind)
    return jax.tree.map(np.asarray, run(arch)(params(arch), inputs(arch), gates(arch)))


@functools.cache
def processing(kind: str):
    """What stands between a robot of three joints and a model of the kind, whose sizes are small."""
    tokenizer_file = recordings.GOLDEN / "tokenizer/tiny_spm.model"
    robot = Robot("toy", {}, action_dim=3)
    if kind == "smolvla":
        arch, folder, given = smolvla_recordings.architecture(), smolvla_recordings.GOLDEN / "ckpt", None
        arch = dataclasses.replace(arch, true_state_dim=3, true_action_dim=3)
    elif kind == "groot_n15":
        arch, folder, given = (
            groot_recordings.architecture("ckpt", embodiment="so100"),
            groot_recordings.GOLDEN / "ckpt",
            None,
        )
    else:
        arch, folder, given = dataclasses.replace(architecture(kind), vocab_size=512), None, str(tokenizer_file)
    family = family_of(arch)
    cameras = family.camera_names(arch) or ("first", "second")
    robot = dataclasses.replace(robot, images={camera: camera for camera in cameras})
    low, high = np.array([-1.0, 0.0, 5.0]), np.array([1.0, 0.5, 9.0])
    stats = NormStats((low + high) / 2, (high - low) / 4, q01=low, q99=high, min=low, max=high)
    tokenizer = family.load_tokenizer(arch, given, None if folder is None else epath.Path(folder))
    lengths = Lengths(4, family.lengths(arch, len(cameras)).prompt)
    return family.processing(arch, robot, {"state": stats, "actions": stats}, tokenizer, lengths)
