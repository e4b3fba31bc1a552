"""SmolVLA of lerobot, at any size. Functions are those of `models.family.Family`."""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Float

from clp_jax.aliases import AnyArray, Array, Leaf, Tree
from clp_jax.errors import InputError
from clp_jax.models.family import Lengths, Loss, Times
from clp_jax.models.layers.flow import fixed_noise, noisy_actions, per_draw, spread, velocity_at
from clp_jax.models.layers.lerobot import STATE
from clp_jax.models.layers.scan import Rows
from clp_jax.models.layers.torch_rules import Layout
from clp_jax.models.smolvla import lerobot
from clp_jax.models.smolvla.architecture import EMPTY_CAMERA, SMOLVLA, Architecture, LlamaSizes, TrainingSettings
from clp_jax.models.smolvla.configuration import read_architecture
from clp_jax.models.smolvla.layout import STACKS, config_with_depths, layout
from clp_jax.models.smolvla.measured import of_tensors, of_tree
from clp_jax.models.smolvla.model import SmolVLA, sample_actions
from clp_jax.models.smolvla.processing import Processing
from clp_jax.models.smolvla.side_files import side_files
from clp_jax.models.smolvla.tokenizer import VlmTokenizer
from clp_jax.models.smolvla.tokenizer import load_tokenizer as load_vlm_tokenizer
from clp_jax.models.smolvla.training import (
    frozen_patterns,
    frozen_rows,
    learning_rate,
    trainable,
    training_defaults,
)
from clp_jax.models.towers import Capture, Gates, Projection, TowerStates
from clp_jax.processing import policy_files
from clp_jax.processing.conventions import Configuration
from clp_jax.processing.norm_stats import NormStats
from clp_jax.processing.robots import Robot

KINDS = ("smolvla",)

RELEASED = {"smolvla": SMOLVLA}

WRITES = (
    Projection("vlm", "attention", "vlm/(even|odd)/o_proj"),
    Projection("vlm", "mlp", "vlm/(even|odd)/down_proj"),
    Projection("action", "attention", "action/(even|odd)/o_proj"),
    Projection("action", "mlp", "action/(even|odd)/down_proj"),
)

OF_LOSSES = frozenset({"actions"})

TIMES = Times(0.0, 1.0, noise=1.0)

ROBOTS: dict[str, Robot] = {}

UNRECORDED_ROBOTS = ROBOTS

CONFIGURATIONS: dict[str, Configuration] = {}

UNRECORDED_CONFIGURATIONS: dict[str, str] = {}

MAX_SAMPLES = 2048

LORA = None

LEROBOT = lerobot

TARGETS = ("lerobot", "stablehlo")

TITLES = {"smolvla": "SmolVLA"}

LICENCES = """The weights derive from SmolVLM2 and SmolVLA of Hugging Face, which are under Apache-2.0; say that the
files were changed."""


def recognises(tree: Tree) -> bool:
    """Whether a parameter tree has the names of our SmolVLA."""
    return {"vlm", "action", "connector", "action_time_mlp_in"} <= tree.keys()


def architecture_of(
    tree: Tree,
    folder: epath.Path | None = None,
    *,
    dtype: str = "bfloat16",
    vlm_config: str | os.PathLike[str] | None = None,
) -> Architecture:
    """Read the architecture from the shapes of a parameter tree and from the configurations of policy and VLM.

    Args:
      tree: parameters (arrays or ``jax.ShapeDtypeStruct``).
      folder: with lerobot's ``config.json`` of the policy.
      dtype: of activations, "bfloat16" or "float32".
      vlm_config: ``config.json`` of the vision-language model or its folder. If None it is looked for where the
        policy's ``vlm_model_name`` points in or beside the folder, then in its folder ``vlm``, then among the published
        models.

    Raises:
      InputError: the tree is no SmolVLA, or a file is missing, contradicts it, or says what is not implemented.
    """
    return read_architecture(of_tree(tree), folder, dtype=dtype, vlm_config=vlm_config)


def architecture_of_tensors(
    tensors: Mapping[str, Any],
    folder: epath.Path | None,
    *,
    dtype: str = "bfloat16",
    vlm_config: str | os.PathLike[str] | None = None,
) -> Architecture:
    """`architecture_of` from the tensors of a lerobot file, by name, in place of a tree."""
    return read_architecture(of_tensors(tensors), folder, dtype=dtype, vlm_config=vlm_config)


def build(architecture: Architecture, rows: Rows = None) -> SmolVLA:
    """The model of an architecture, without parameters; ``rows`` is how a batch is split over devices."""
    return SmolVLA(architecture, rows)


def init_params(architecture: Architecture, rng: jax.Array) -> dict:
    """Freshly initialised parameters, float32."""
    shapes = inputs(architecture, Lengths(1, 2))
    one = {key: jnp.zeros((1, *leaf.shape), leaf.dtype) for key, leaf in shapes.items()}
    return build(architecture).init(rng, one, one["actions"], jnp.ones(1, jnp.float32))["params"]


def lengths(architecture: Architecture, cameras: int | None = None) -> Lengths:
    """Chunk and longest prompt of the checkpoint."""
    del cameras
    return Lengths(architecture.chunk_size, architecture.tokenizer_max_length)


def camera_names(architecture: Architecture) -> tuple[str, ...]:
    """lerobot's keys of the cameras that a robot has, in the order in which the model reads them."""
    empty = {EMPTY_CAMERA.format(i=i) for i in range(architecture.empty_cameras)}
    return tuple(camera for camera in architecture.cameras if camera not in empty)


def robot_cameras(architecture: Architecture) -> tuple[str, ...]:
    """The model's own names are the only ones."""
    return camera_names(architecture)


def inputs(
    architecture: Architecture, lengths: Lengths, cameras: Sequence[str] | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """What the model reads of one observation, without a batch axis.

    Images may also be uint8 of any other size: the model resizes them. ``action_is_pad``, True for actions after the
    end of an episode, which no loss counts, may be missing.

    Args:
      architecture: of the model.
      lengths: chunk and prompt.
      cameras: those that are there; all that a robot has if None.
    """
    default = (architecture.vision.image_size,) * 2
    sizes = dict(zip(architecture.cameras, architecture.camera_sizes, strict=False))
    names = camera_names(architecture) if cameras is None else cameras
    shapes: dict[str, Any] = {f"image/{camera}": ((*sizes.get(camera, default), 3), jnp.uint8) for camera in names}
    shapes |= {f"image_mask/{camera}": ((), jnp.bool_) for camera in names}
    shapes |= {
        "state": ((architecture.state_dim,), jnp.float32),
        "tokenized_prompt": ((lengths.prompt,), jnp.int32),
        "tokenized_prompt_mask": ((lengths.prompt,), jnp.bool_),
        "actions": ((lengths.horizon, architecture.action_dim), jnp.float32),
    }
    return {key: jax.ShapeDtypeStruct(*entry) for key, entry in shapes.items()}


def as_example(architecture: Architecture, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Random arrays as they are: any tokens make a prompt."""
    del architecture
    return dict(arrays)


def stored_layout(leaves: Mapping[str, Any], names: Iterable[str]) -> Layout:
    """The tensors of lerobot's file for every leaf."""
    del names
    return layout(leaves)


def frozen_rules(architecture: Architecture) -> tuple[tuple[str, bool], ...]:
    """What lerobot does not train under the settings of the checkpoint."""
    return frozen_patterns(architecture)


def any_size(architecture: Architecture) -> frozenset[str]:
    """The model reads all of its inputs."""
    del architecture
    return frozenset()


def complete(architecture: Architecture, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """State, actions and noise with zeros up to the padded dimensions; cameras without a mask are valid."""
    completed = dict(arrays)
    padded = {"state": architecture.state_dim, "actions": architecture.action_dim, "noise": architecture.action_dim}
    for key, dim in padded.items():
        if key in arrays and arrays[key].shape[-1] < dim:
            widths = [(0, 0)] * (arrays[key].ndim - 1) + [(0, dim - arrays[key].shape[-1])]
            completed[key] = np.pad(arrays[key], widths)
    for key, image in arrays.items():
        mask = key.replace("image/", "image_mask/", 1)
        if key.startswith("image/") and mask not in arrays:
            completed[mask] = np.ones(image.shape[0], bool)
    return completed


def without_unseen(architecture: Architecture, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Drop cameras that are masked in every observation: nothing attends to their tokens, so nothing changes but time.

    One camera stays in any case. Where special tokens, which are never masked, surround every image, all stay.
    """
    if architecture.image_tokens is not None:
        return dict(arrays)
    cameras = [camera for camera in architecture.cameras if f"image/{camera}" in arrays]
    absent = [camera for camera in cameras if not arrays[f"image_mask/{camera}"].any()]
    if len(absent) == len(cameras):
        absent = absent[1:]
    dropped = {f"{prefix}/{camera}" for camera in absent for prefix in ("image", "image_mask")}
    return {key: array for key, array in arrays.items() if key not in dropped}


def own_robot(architecture: Architecture) -> Robot:
    """The robot of the policy's files: its cameras by their names, lerobot's keys of state and action.

    What the preprocessor renames has the key from which it does.
    """
    keys = dict(architecture.robot_keys)
    cameras = {camera: keys.get(camera, camera) for camera in camera_names(architecture)}
    state = (keys.get(STATE, STATE),)
    return Robot("of the checkpoint", cameras, state=state, action_dim=architecture.true_action_dim)


def load_tokenizer(architecture: Architecture, path: str | None, assets: epath.Path | None) -> VlmTokenizer:
    """The tokenizer of the vision-language model: the file or folder given, else the checkpoint's."""
    del architecture
    return load_vlm_tokenizer(path, assets)


def processing(
    architecture: Architecture,
    robot: Robot,
    norm_stats: Mapping[str, NormStats],
    tokenizer: VlmTokenizer,
    lengths: Lengths,
    *,
    state_in_prompt: bool | None = None,
) -> Processing:
    """What stands between a robot and the model."""
    if state_in_prompt:
        raise InputError("a SmolVLA projects the state and has no words for it; leave out --state-in-prompt.")
    return Processing(robot, architecture, norm_stats, tokenizer, lengths.horizon, lengths.prompt)


def draw(
    architecture: Architecture, rng: jax.Array, batch: Mapping[str, Leaf], samples: int = 1
) -> tuple[dict[str, Leaf], jax.Array]:
    """The batch with fresh noise over the padded dimensions and t ~ 0.999 Beta(1.5, 1) + 0.001, and a key.

    Several draws of an observation are stacked on an axis behind the batch.
    """
    noise_rng, time_rng, augmentation_rng = jax.random.split(rng, 3)
    b, horizon, _ = batch["actions"].shape
    leading = (b,) if samples == 1 else (b, samples)
    noise = jax.random.normal(noise_rng, (*leading, horizon, architecture.action_dim))
    time = jax.random.beta(time_rng, 1.5, 1.0, leading) * 0.999 + 0.001
    return {**batch, "noise": noise, "time": time}, augmentation_rng


def fixed_draw(architecture: Architecture, batch: Mapping[str, AnyArray]) -> dict[str, np.ndarray]:
    """The same noise and times for the same shape, so that runs compare.

    Times are quantiles of lerobot's t ~ 0.999 Beta(1.5, 1) + 0.001, whose distribution function is t^1.5.
    """
    b, horizon, _ = batch["actions"].shape
    time = (spread(b) ** (2.0 / 3.0) * 0.999 + 0.001).astype(np.float32)
    return {"noise": fixed_noise((b, horizon, architecture.action_dim)), "time": time}


def norm_stats_of(
    folder: epath.Path, architecture: Architecture | None = None, robot: Robot | None = None
) -> dict[str, NormStats] | None:
    """The statistics of the policy's processors."""
    del architecture, robot
    return policy_files.norm_stats_of(folder)


def known_robot(architecture: Architecture, robot: Robot, folder: epath.Path | None) -> Robot:
    """The robot as it is: the checkpoint's own is one that names columns."""
    del architecture, folder
    return robot


def own_statistics(folder: epath.Path) -> dict[str, dict[str, NormStats]]:
    """None beside those of the processors."""
    del folder
    return {}


def augment(architecture: Architecture, key: jax.Array, inputs: Mapping[str, Leaf]) -> dict[str, Leaf]:
    """The inputs as they are: lerobot's policy changes no image in training."""
    del architecture, key
    return dict(inputs)


def forward(
    model: SmolVLA, params: Tree, inputs: Mapping[str, Leaf], *, gates: Gates = Gates(), capture: Capture = False
) -> tuple[Array, dict[str, TowerStates]]:
    """The velocity, and the towers' states if captured."""
    time = inputs["time"]
    x_t = noisy_actions(inputs["actions"], inputs["noise"], time)
    return model.apply({"params": params}, inputs, x_t, time, gates=gates, capture=capture)


def losses(model: SmolVLA, params: Tree, inputs: Mapping[str, Leaf], *, gates: Gates = Gates()) -> Loss:
    """lerobot's loss of each observation: the mean square over the robot's dimensions and the steps of its episode.

    An observation counts as much as it has such steps, which makes the loss of a batch lerobot's.
    """
    return loss_of(model.architecture, forward(model, params, inputs, gates=gates)[0], inputs)


def loss_of(architecture: Architecture, output: Array, inputs: Mapping[str, Leaf]) -> Loss:
    """lerobot's loss of a velocity."""
    noise, time = jnp.asarray(inputs["noise"]), jnp.asarray(inputs["time"])
    return distance(architecture, output, velocity_at(inputs["actions"], noise, time), inputs)


def distance(architecture: Architecture, output: Array, other: AnyArray, inputs: Mapping[str, Leaf]) -> Loss:
    """The mean square between two velocities over what the loss counts."""
    weights = per_draw(error_weights(architecture, inputs), inputs["time"])
    each = jnp.sum(weights * jnp.square(output - other), axis=(-2, -1))
    return Loss(each, jnp.sum(_in_episode(inputs), axis=-1))


def error_weights(architecture: Architecture, inputs: Mapping[str, Leaf]) -> Float[Array, "b horizon adim"]:
    """Equal for the robot's dimensions of the actions within the episode, zero for padding; each sum is 1."""
    counted = jnp.arange(architecture.action_dim) < architecture.true_action_dim
    within = _in_episode(inputs)
    steps = jnp.maximum(jnp.sum(within, axis=-1), 1.0)
    return within[:, :, None] * counted / (steps[:, None, None] * architecture.true_action_dim)


def _in_episode(inputs: Mapping[str, Leaf]) -> Float[Array, "b horizon"]:
    """1 for actions of the episode, 0 for those that only fill its last chunks."""
    if "action_is_pad" not in inputs:
        return jnp.ones(inputs["actions"].shape[:2])
    return 1.0 - jnp.asarray(inputs["action_is_pad"]).astype(jnp.float32)


def sample(
    model: SmolVLA, params: Tree, inputs: Mapping[str, Leaf], *, noise: Leaf, num_steps: int, gates: Gates = Gates()
) -> Float[Array, "b horizon adim"]:
    """Actions by Euler steps from noise."""
    return sample_actions(model, params, inputs, noise=noise, num_steps=num_steps, gates=gates)


def num_steps(architecture: Architecture) -> int:
    """The checkpoint's Euler steps."""
    return architecture.num_steps


def why_no_actions(architecture: Architecture) -> str | None:
    """Every SmolVLA samples actions."""
    del architecture


__all__ = [
    "SMOLVLA",
    "STACKS",
    "Architecture",
    "LlamaSizes",
    "SmolVLA",
    "TrainingSettings",
    "architecture_of_tensors",
    "config_with_depths",
    "frozen_rows",
    "layout",
    "learning_rate",
    "sample_actions",
    "side_files",
    "trainable",
    "training_defaults",
]
