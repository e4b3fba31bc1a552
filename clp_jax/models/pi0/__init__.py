"""π0, π0.5 and π0-FAST with openpi's parameter trees, at any size. Functions are those of `models.family.Family`."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Float, Int

from clp_jax.aliases import AnyArray, Array, Leaf, Tree
from clp_jax.errors import InputError
from clp_jax.models.family import Lengths, Loss, Times
from clp_jax.models.layers.flow import fixed_noise, noisy_actions, spread, velocity_at
from clp_jax.models.layers.scan import Rows
from clp_jax.models.layers.torch_rules import Layout
from clp_jax.models.pi0 import lerobot, lora
from clp_jax.models.pi0.architecture import (
    PI0,
    PI0_FAST,
    PI05,
    Architecture,
    GemmaSizes,
    architecture_of_tree,
    is_pi0,
)
from clp_jax.models.pi0.augmentation import augment_images
from clp_jax.models.pi0.conventions import CONFIGURATIONS, UNRECORDED_CONFIGURATIONS
from clp_jax.models.pi0.fast import Pi0Fast, cross_entropy, divergence, sample_tokens
from clp_jax.models.pi0.fast_processing import FAST_CAMERAS, UNREAD_STATE, FastProcessing
from clp_jax.models.pi0.fast_tokenizer import FastTokenizer, load_action_tokenizer
from clp_jax.models.pi0.flow import Pi0, compute_loss, draw_noise_and_time, sample_actions, squared_error
from clp_jax.models.pi0.layout import layout, torch_config, why_no_torch, zero_tensors
from clp_jax.models.pi0.observation import Observation, model_image
from clp_jax.models.pi0.processing import CAMERAS, Processing
from clp_jax.models.pi0.robots import ROBOTS, UNRECORDED_ROBOTS
from clp_jax.models.towers import Capture, Gates, Projection, Stack, TowerStates
from clp_jax.processing.norm_stats import NormStats
from clp_jax.processing.robots import Robot
from clp_jax.processing.tokenizer import PromptTokenizer
from clp_jax.processing.tokenizer import load_tokenizer as load_paligemma_tokenizer

KINDS = ("pi0", "pi05", "pi0_fast")

RELEASED = {"pi0": PI0, "pi05": PI05, "pi0-fast": PI0_FAST}

STACKS = (
    Stack(r"PaliGemma/img/Transformer/encoderblock/.*", "vision"),
    # The second expert's modules end in _1: attn/q_einsum_1/w, mlp_1/linear, pre_ffw_norm_1/Dense_0/kernel.
    Stack(r"PaliGemma/llm/layers/(?:[^/]+/)*[^/]+_1(?:/.*)?", "action"),
    Stack(r"PaliGemma/llm/layers/.*", "vlm"),
)

WRITES = (
    Projection("vlm", "attention", "PaliGemma/llm/layers/attn/attn_vec_einsum/w"),
    Projection("vlm", "mlp", "PaliGemma/llm/layers/mlp/linear"),
    Projection("action", "attention", "PaliGemma/llm/layers/attn/attn_vec_einsum_1/w"),
    Projection("action", "mlp", "PaliGemma/llm/layers/mlp_1/linear"),
)

OF_LOSSES = frozenset({"actions"})

TIMES = Times(0.0, 1.0, noise=1.0)

MAX_SAMPLES = 2048

LORA = lora

LEROBOT = lerobot

TARGETS = ("openpi", "openpi-pytorch", "lerobot", "stablehlo")

TITLES = {"pi0": "π0", "pi05": "π0.5", "pi0_fast": "π0-FAST"}

LICENCES = """The weights derive from Gemma and PaliGemma: they are under Google's [Gemma terms of use]\
(https://ai.google.dev/gemma/terms), pruned, fine-tuned or converted; who passes them on passes the terms and the
prohibited-use policy on, too, and says that the files were changed. openpi's own weights and code are under
Apache-2.0."""

_LENGTHS = {"pi0": Lengths(50, 48), "pi05": Lengths(50, 200), "pi0_fast": Lengths(32, 250)}


def recognises(tree: Tree) -> bool:
    """Whether the names of a parameter tree are openpi's."""
    return is_pi0(tree)


def architecture_of(
    tree: Tree, folder: epath.Path | None = None, *, dtype: str = "bfloat16", lora_scale: float = 1.0
) -> Architecture:
    """Read the architecture from the shapes of a parameter tree; openpi has no file that says more.

    Args:
      tree: nested parameters below ``params`` (arrays or ``jax.ShapeDtypeStruct``), without a trailing ``value``.
      folder: not read.
      dtype: activation dtype of the model.
      lora_scale: alpha / rank of attention adapters, which no shape tells (1.0 for the variants openpi ships).

    Returns:
      The sizes. They are not proven consistent here: compare ``models.abstract_params`` of the result with the tree.

    Raises:
      InputError: the tree is not a π0-family model, or its experts have different depths.
    """
    del folder
    return architecture_of_tree(tree, dtype=dtype, lora_scale=lora_scale)


def architecture_of_tensors(
    tensors: Mapping[str, Any], folder: epath.Path | None, *, dtype: str = "bfloat16"
) -> Architecture:
    """PyTorch's files of π0 are written by ``clp export``, but not read.

    Raises:
      InputError: always.
    """
    del tensors, folder, dtype
    raise InputError(
        "a π0 is read from openpi's JAX checkpoints, not from PyTorch files; give a step folder of openpi."
    )


def as_example(architecture: Architecture, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Random arrays as they are: any tokens make a prompt."""
    del architecture
    return dict(arrays)


def stored_layout(leaves: Mapping[str, Any], names: Iterable[str]) -> Layout:
    """The tensors of openpi's and lerobot's PyTorch files for every leaf."""
    del names
    return layout(leaves)


def build(architecture: Architecture, rows: Rows = None) -> Pi0 | Pi0Fast:
    """The model of an architecture, without parameters; ``rows`` is how a batch is split over devices."""
    return Pi0Fast(architecture, rows) if architecture.kind == "pi0_fast" else Pi0(architecture, rows)


def init_params(architecture: Architecture, rng: jax.Array) -> dict:
    """Freshly initialised parameters, float32."""
    model = build(architecture)
    one = {key: jnp.zeros((1, *leaf.shape), leaf.dtype) for key, leaf in inputs(architecture, Lengths(1, 2)).items()}
    if isinstance(model, Pi0Fast):
        return model.init(rng, Observation.of(one))["params"]
    return model.init(rng, Observation.of(one), one["actions"], jnp.ones(1, jnp.float32))["params"]


def lengths(architecture: Architecture, cameras: int | None = None) -> Lengths:
    """openpi's chunk and prompt for a kind of model."""
    del cameras
    return _LENGTHS[architecture.kind]


def robot_cameras(architecture: Architecture) -> tuple[str, ...]:
    """The names that a robot may give the model's cameras: of π0-FAST its own or, as openpi's LIBERO does, π0's."""
    return (*FAST_CAMERAS, *CAMERAS[1:]) if architecture.kind == "pi0_fast" else CAMERAS


def camera_names(architecture: Architecture) -> tuple[str, ...]:
    """The model's cameras in the order in which it reads them, which is also the sorted one."""
    return FAST_CAMERAS if architecture.kind == "pi0_fast" else CAMERAS


def inputs(
    architecture: Architecture, lengths: Lengths, cameras: Sequence[str] | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """What the model reads of one observation, without a batch axis.

    Args:
      architecture: of the model.
      lengths: chunk and prompt.
      cameras: those that are there; all of the model's if None.
    """
    size, fast = architecture.vision.image_size, architecture.kind == "pi0_fast"
    names = camera_names(architecture) if cameras is None else cameras
    dim = architecture.action_dim or UNREAD_STATE
    shapes: dict[str, Any] = {f"image/{camera}": ((size, size, 3), jnp.uint8) for camera in names}
    shapes |= {f"image_mask/{camera}": ((), jnp.bool_) for camera in names}
    shapes |= {
        "state": ((dim,), jnp.float32),
        "tokenized_prompt": ((lengths.prompt,), jnp.int32),
        "tokenized_prompt_mask": ((lengths.prompt,), jnp.bool_),
    }
    if fast:
        shapes |= {"token_ar_mask": ((lengths.prompt,), jnp.int32), "token_loss_mask": ((lengths.prompt,), jnp.bool_)}
    else:
        shapes |= {"actions": ((lengths.horizon, dim), jnp.float32)}
    return {key: jax.ShapeDtypeStruct(*entry) for key, entry in shapes.items()}


def any_size(architecture: Architecture) -> frozenset[str]:
    """π0 projects the state; π0.5 and π0-FAST have it in the prompt and never read this array."""
    return frozenset() if architecture.kind == "pi0" else frozenset(["state"])


def complete(architecture: Architecture, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """openpi's model inputs are complete as they are."""
    del architecture
    return dict(arrays)


def without_unseen(architecture: Architecture, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Drop cameras that are masked in every observation: nothing attends to their tokens, so nothing changes but time.

    One camera stays in any case. (π0-FAST keeps all: its masked tokens hold places in the cache.)
    """
    if architecture.kind == "pi0_fast":
        return dict(arrays)
    absent = [c for c in CAMERAS if f"image_mask/{c}" in arrays and not arrays[f"image_mask/{c}"].any()]
    dropped = {f"{prefix}/{c}" for c in absent[-(len(CAMERAS) - 1) :] for prefix in ("image", "image_mask")}
    return {key: array for key, array in arrays.items() if key not in dropped}


def training_defaults(architecture: Architecture, steps: int) -> dict[str, Any]:
    """openpi's settings of a run, by the names of the flags of ``clp finetune``; the same for all lengths."""
    del architecture, steps
    return {
        "schedule": "warmup-cosine",
        "peak_lr": 2.5e-5,
        "warmup_steps": 1000,
        "decay_steps": 30_000,
        "decay_lr": 2.5e-6,
        "b1": 0.9,
        "b2": 0.95,
        "eps": 1e-8,
        "weight_decay": 1e-10,
        "not_decayed": "",
        "clip_norm": 1.0,
        "ema_decay": 0.99,
        "frozen_dtype": "bfloat16",
        "batch_size": 32,
    }


def norm_stats_of(folder: epath.Path, architecture: Architecture | None = None, robot: Robot | None = None) -> None:
    """openpi's statistics are files of their own, ``norm_stats.json``."""
    del folder, architecture, robot


def known_robot(architecture: Architecture, robot: Robot, folder: epath.Path | None) -> Robot:
    """The robot as it is; openpi's checkpoints say nothing of one."""
    del architecture, folder
    return robot


def own_statistics(folder: epath.Path) -> dict[str, dict[str, NormStats]]:
    """None beside ``norm_stats.json``."""
    del folder
    return {}


def side_files(folder: epath.Path | None, **changes: Any) -> dict[str, bytes]:
    """openpi's checkpoints need no file beside the weights."""
    del folder, changes
    return {}


def own_robot(architecture: Architecture) -> Robot | None:
    """openpi's checkpoints say nothing about a robot."""
    del architecture
    return None


def load_tokenizer(
    architecture: Architecture, path: str | None, assets: epath.Path | None, *, fast_tokenizer: str | None = None
) -> PromptTokenizer | FastTokenizer:
    """PaliGemma's tokenizer, and π0-FAST's of actions: those given, the checkpoint's, cached or public ones."""
    if architecture.kind == "pi0_fast":
        actions = load_action_tokenizer(fast_tokenizer, assets)
        return FastTokenizer(load_paligemma_tokenizer(path, assets=assets), actions)
    return load_paligemma_tokenizer(path, assets=assets)


def processing(
    architecture: Architecture,
    robot: Robot,
    norm_stats: Mapping[str, NormStats],
    tokenizer: PromptTokenizer | FastTokenizer,
    lengths: Lengths,
    *,
    state_in_prompt: bool | None = None,
) -> Processing | FastProcessing:
    """What stands between a robot and the model; if nothing is said, all prompts but π0's spell the state, if any."""
    if isinstance(tokenizer, FastTokenizer):
        if state_in_prompt is False:
            raise InputError("the prompt of a π0-FAST always spells the state; leave --state-in-prompt out.")
        return FastProcessing(robot, architecture, norm_stats, tokenizer, *lengths)
    spelled = architecture.kind == "pi05" and robot.state != () if state_in_prompt is None else state_in_prompt
    return Processing(robot, architecture, norm_stats, tokenizer, *lengths, spelled)


def draw(
    architecture: Architecture, rng: jax.Array, batch: Mapping[str, Leaf], samples: int = 1
) -> tuple[dict[str, Leaf], jax.Array]:
    """The batch with fresh noise and times, and the key of the augmentation, drawn as openpi draws them."""
    if architecture.kind == "pi0_fast":
        if samples != 1:
            raise InputError(f"a π0-FAST draws no noise: {samples} action samples make no sense, leave 1.")
        return dict(batch), rng
    noise, time = draw_noise_and_time(rng, batch["actions"].shape, samples)
    return {**batch, "noise": noise, "time": time}, jax.random.split(rng, 3)[0]


def fixed_draw(architecture: Architecture, batch: Mapping[str, AnyArray]) -> dict[str, np.ndarray]:
    """The same noise and times for the same shape, so that runs compare.

    Times are quantiles of openpi's t ~ 0.999 Beta(1.5, 1) + 0.001, whose distribution function is t^1.5.
    """
    if architecture.kind == "pi0_fast":
        return {}
    shape = batch["actions"].shape
    time = (spread(shape[0]) ** (2.0 / 3.0) * 0.999 + 0.001).astype(np.float32)
    return {"noise": fixed_noise(shape), "time": time}


def frozen_rules(architecture: Architecture) -> tuple[tuple[str, bool], ...]:
    """openpi trains everything, but of a language stack with adapters only these."""
    return lora.RULES if lora.has_adapters(architecture) else ()


def frozen_rows(architecture: Architecture, leaves: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """openpi trains leaves whole."""
    del architecture, leaves
    return {}


def augment(architecture: Architecture, key: jax.Array, inputs: Mapping[str, Leaf]) -> dict[str, Leaf]:
    """The inputs with openpi's other views of the same images."""
    size = architecture.vision.image_size
    images = {key.removeprefix("image/"): model_image(x, size) for key, x in inputs.items() if key.startswith("image/")}
    return {**inputs, **{f"image/{camera}": image for camera, image in augment_images(key, images).items()}}


def forward(
    model: Pi0 | Pi0Fast, params: Tree, inputs: Mapping[str, Leaf], *, gates: Gates = Gates(), capture: Capture = False
) -> tuple[Array, dict[str, TowerStates]]:
    """The velocity (of π0-FAST, the logits), and the towers' states if captured."""
    variables, observation = {"params": params}, Observation.of(inputs)
    if isinstance(model, Pi0Fast):
        return model.apply(variables, observation, gates=gates, capture=capture)
    time = inputs["time"]
    x_t = noisy_actions(inputs["actions"], inputs["noise"], time)
    return model.apply(variables, observation, x_t, time, gates=gates, capture=capture)


def losses(model: Pi0 | Pi0Fast, params: Tree, inputs: Mapping[str, Leaf], *, gates: Gates = Gates()) -> Loss:
    """openpi's loss of each observation; every observation counts alike."""
    return loss_of(model.architecture, forward(model, params, inputs, gates=gates)[0], inputs)


def loss_of(architecture: Architecture, output: Array, inputs: Mapping[str, Leaf]) -> Loss:
    """openpi's loss of a velocity, or of logits."""
    if architecture.kind == "pi0_fast":
        return _alike(cross_entropy(output, Observation.of(inputs)))
    return distance(architecture, output, velocity_at(*(inputs[key] for key in ("actions", "noise", "time"))), inputs)


def distance(architecture: Architecture, output: Array, other: AnyArray, inputs: Mapping[str, Leaf]) -> Loss:
    """The mean square between two velocities; between two logits the divergence at the tokens that the loss counts."""
    if architecture.kind == "pi0_fast":
        return _alike(divergence(output, other, Observation.of(inputs)))
    return _alike(squared_error(output, other).mean(axis=-1))


def _alike(each: Float[Array, "b *k"]) -> Loss:
    return Loss(each, jnp.ones(each.shape[:1]))


def error_weights(architecture: Architecture, inputs: Mapping[str, Leaf]) -> Float[Array, "b horizon adim"] | None:
    """The loss of π0 and π0.5 is the mean over the actions of a chunk and their dimensions, padding included."""
    if architecture.kind == "pi0_fast":
        return None
    _, horizon, dim = shape = inputs["actions"].shape
    return jnp.full(shape, 1.0 / (horizon * dim))


def sample(
    model: Pi0 | Pi0Fast,
    params: Tree,
    inputs: Mapping[str, Leaf],
    *,
    noise: Leaf | None,
    num_steps: int,
    gates: Gates = Gates(),
) -> Float[Array, "b horizon adim"] | Int[Array, "b steps"]:
    """Actions by Euler steps from noise; of π0-FAST the likeliest tokens, one a step."""
    observation = Observation.of(inputs)
    if isinstance(model, Pi0Fast):
        return sample_tokens(model, params, observation, max_decoding_steps=num_steps, gates=gates)
    assert noise is not None, "a π0 without noise has nothing to start from"
    return sample_actions(model, params, observation, noise=noise, num_steps=num_steps, gates=gates)


def num_steps(architecture: Architecture) -> int:
    """openpi's Euler steps, or its largest number of tokens."""
    return 256 if architecture.kind == "pi0_fast" else 10


def why_no_actions(architecture: Architecture) -> str | None:
    """π0-FAST samples tokens."""
    if architecture.kind != "pi0_fast":
        return None
    return (
        "π0-FAST answers with tokens, which only a robot's tokenizer makes actions; serve it with --robot, or take a "
        "π0 or π0.5."
    )


__all__ = [
    "CAMERAS",
    "CONFIGURATIONS",
    "FAST_CAMERAS",
    "PI0",
    "PI05",
    "PI0_FAST",
    "ROBOTS",
    "UNRECORDED_CONFIGURATIONS",
    "UNRECORDED_ROBOTS",
    "Architecture",
    "GemmaSizes",
    "Observation",
    "Pi0",
    "Pi0Fast",
    "compute_loss",
    "draw_noise_and_time",
    "layout",
    "sample_actions",
    "sample_tokens",
    "torch_config",
    "why_no_torch",
    "zero_tensors",
]
