"""GR00T-N1.5 with NVIDIA's weights, at any size. Functions are those of `models.family.Family`."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Bool, Float

from clp_jax.aliases import AnyArray, Array, Leaf, Tree
from clp_jax.errors import InputError
from clp_jax.models.family import Lengths, Loss, Times
from clp_jax.models.groot import lerobot, lora, nvidia
from clp_jax.models.groot.architecture import (
    GROOT_N15,
    Architecture,
    AttentionSizes,
    DitSizes,
    Padding,
    QwenSizes,
)
from clp_jax.models.groot.augmentation import augment_images
from clp_jax.models.groot.configuration import architecture_of
from clp_jax.models.groot.data_configs import CONFIGURATIONS
from clp_jax.models.groot.dropout import SEED
from clp_jax.models.groot.layout import (
    LEROBOT_PREFIX,
    STACKS,
    config_with_depths,
    embedding_name,
    layout,
    prefix_of,
    recognises,
)
from clp_jax.models.groot.metadata import FILE as METADATA
from clp_jax.models.groot.metadata import known_robot as known_parts
from clp_jax.models.groot.metadata import read_metadata, statistics_for
from clp_jax.models.groot.metadata import statistics_of as own_statistics
from clp_jax.models.groot.model import Groot, model_image, sample_actions
from clp_jax.models.groot.model import cameras as _cameras
from clp_jax.models.groot.processing import Processing
from clp_jax.models.groot.side_files import side_files
from clp_jax.models.groot.tokenizer import EagleTokenizer
from clp_jax.models.groot.tokenizer import load_tokenizer as load_eagle_tokenizer
from clp_jax.models.groot.training import FROZEN, training_defaults
from clp_jax.models.layers.flow import fixed_noise, per_draw, spread
from clp_jax.models.layers.scan import Rows
from clp_jax.models.layers.torch_rules import Layout
from clp_jax.models.towers import Capture, Gates, Projection, TowerStates
from clp_jax.processing.modality import names_parts
from clp_jax.processing.norm_stats import NormStats
from clp_jax.processing.robots import Robot

KINDS = ("groot_n15",)

RELEASED = {"gr00t-n1.5": GROOT_N15}

UNRECORDED_CONFIGURATIONS: dict[str, str] = {}

WRITES = (
    Projection("llm", "attention", "backbone/llm/layers/attn/o/kernel"),
    Projection("llm", "mlp", "backbone/llm/layers/mlp/down/kernel"),
    Projection("vl", "attention", "action_head/vl_self_attention/blocks/attn/out/kernel"),
    Projection("vl", "mlp", "action_head/vl_self_attention/blocks/ff/down/kernel"),
    Projection("dit", "attention", "action_head/dit/(cross|self)/attn/out/kernel"),
    Projection("dit", "mlp", "action_head/dit/(cross|self)/ff/down/kernel"),
)

OF_LOSSES = frozenset({"actions", "action_mask"})

TIMES = Times(-0.0011, 1.0, noise=0.0)
"""t = (s - x) / s is a little below 0 where Beta's x is above s."""

ROBOTS: dict[str, Robot] = {}

UNRECORDED_ROBOTS = ROBOTS

MAX_SAMPLES = 960  # its blocks are small for the width of their states

LORA = lora

NVIDIA = nvidia

TARGETS = ("groot", "stablehlo")

TITLES = {"groot_n15": "GR00T-N1.5"}

LICENCES = """The weights derive from NVIDIA's GR00T-N1.5: they are under NVIDIA's licence for that model (see the card
of nvidia/GR00T-N1.5-3B), pruned, fine-tuned or converted, and contain weights of Qwen3 (Apache-2.0) and SigLIP 2
(Apache-2.0)."""

_PROMPT_TOKENS = 64
_TOKENS_AROUND_AN_IMAGE = 8
_TEXT_OF_AN_EXAMPLE = 4


architecture_of_tensors = architecture_of
"""The architecture from the tensors of a file in place of a tree: names tell which it is."""


def build(architecture: Architecture, rows: Rows = None) -> Groot:
    """The model of an architecture, without parameters; ``rows`` is how a batch is split over devices."""
    return Groot(architecture, rows)


def init_params(architecture: Architecture, rng: jax.Array) -> dict:
    """Freshly initialised parameters, float32."""
    one = {key: jnp.zeros((1, *leaf.shape), leaf.dtype) for key, leaf in inputs(architecture, Lengths(1, 2)).items()}
    return build(architecture).init(rng, one, one["actions"], jnp.zeros(1, jnp.float32))["params"]


def lengths(architecture: Architecture, cameras: int | None = None) -> Lengths:
    """The checkpoint's chunk, and a prompt that holds the images and an instruction of some forty words.

    Upstream pads a batch to its longest prompt and has no fixed length.
    """
    count = len(architecture.cameras) if cameras is None else cameras
    images = count * (architecture.vision.num_tokens + _TOKENS_AROUND_AN_IMAGE)
    return Lengths(architecture.horizon, images + _PROMPT_TOKENS)


def camera_names(architecture: Architecture) -> None:
    """Any cameras: the prompt names as many images as there are, sorted by the names of their cameras."""
    del architecture


def robot_cameras(architecture: Architecture) -> None:
    """Any, too."""
    del architecture


def inputs(
    architecture: Architecture, lengths: Lengths, cameras: Sequence[str] | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """What the model reads of one observation, without a batch axis.

    A camera has no mask: its image is in the prompt or it is not. ``context_mask`` is False for tokens of the prompt
    that the action head does not read; upstream has it read all of a batch, padding included.

    Args:
      architecture: of the model.
      lengths: chunk and prompt.
      cameras: those that are there; those of the architecture if None.

    Raises:
      InputError: the chunk is longer than the model has places for.
    """
    _check_horizon(architecture, lengths)
    size = architecture.vision.image_size
    actions = lengths.horizon, architecture.action_dim
    shapes: dict[str, Any] = {
        f"image/{camera}": ((size, size, 3), jnp.uint8)
        for camera in (architecture.cameras if cameras is None else cameras)
    }
    shapes |= {
        "state": ((architecture.state_dim,), jnp.float32),
        "embodiment_id": ((), jnp.int32),
        "tokenized_prompt": ((lengths.prompt,), jnp.int32),
        "tokenized_prompt_mask": ((lengths.prompt,), jnp.bool_),
        "context_mask": ((lengths.prompt,), jnp.bool_),
        "actions": (actions, jnp.float32),
        "action_mask": (actions, jnp.bool_),
    }
    return {key: jax.ShapeDtypeStruct(*entry) for key, entry in shapes.items()}


def _check_horizon(architecture: Architecture, lengths: Lengths) -> None:
    if lengths.horizon > architecture.max_seq_len:
        raise InputError(
            f"this GR00T-N1.5 has places for chunks of {architecture.max_seq_len} actions, not of {lengths.horizon}; "
            "give a smaller --action-horizon."
        )


def as_example(architecture: Architecture, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Random arrays with prompts of the model's form: padded on the left, the places of the images before the text."""
    count = len(_cameras(arrays)) * architecture.vision.num_tokens
    tokens, mask = arrays["tokenized_prompt"].copy(), arrays["tokenized_prompt_mask"][:, ::-1].copy()
    places = slice(-count - _TEXT_OF_AN_EXAMPLE, -_TEXT_OF_AN_EXAMPLE)
    tokens[tokens == architecture.image_token] = 0
    tokens[:, places], mask[:, places.start :] = architecture.image_token, True
    return complete(architecture, {**arrays, "tokenized_prompt": tokens, "tokenized_prompt_mask": mask})


def stored_layout(leaves: Mapping[str, Any], names: Iterable[str]) -> Layout:
    """The tensors of NVIDIA's or lerobot's files for every leaf."""
    names = list(names)
    return layout(leaves, prefix_of(names), embedding=embedding_name(names))


def frozen_rules(architecture: Architecture) -> tuple[tuple[str, bool], ...]:
    """What Isaac-GR00T does not train without further flags: the language model and the image encoder.

    Of a model with adapters they alone are trained.
    """
    return lora.RULES if lora.has_adapters(architecture) else FROZEN


def frozen_rows(architecture: Architecture, leaves: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Isaac-GR00T trains leaves whole."""
    del architecture, leaves
    return {}


def any_size(architecture: Architecture) -> frozenset[str]:
    """The model reads every array."""
    del architecture
    return frozenset()


def complete(architecture: Architecture, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays; where no mask says which, the action head reads all tokens, and the loss counts all actions.

    Raises:
      InputError: prompts do not have one place for every token of every image, or a robot is none of the model's.
    """
    if "tokenized_prompt" in arrays:
        expected = len(_cameras(arrays)) * architecture.vision.num_tokens
        places = (np.asarray(arrays["tokenized_prompt"]) == architecture.image_token).sum(axis=-1)
        if (places != expected).any():
            found = int(places[places != expected][0])
            raise InputError(
                f"a prompt has {found} image tokens (id {architecture.image_token}) and the "
                f"images have {expected}; tokenized_prompt must hold {architecture.vision.num_tokens} for each image."
            )
    robots = np.asarray(arrays.get("embodiment_id", ()))
    if ((robots < 0) | (robots >= architecture.embodiments)).any():
        raise InputError(f"embodiment_id must be from 0 to {architecture.embodiments - 1}; it holds {robots.tolist()}.")
    masks = {"context_mask": "tokenized_prompt", "action_mask": "actions"}
    made = {mask: np.ones(np.shape(arrays[of]), bool) for mask, of in masks.items() if of in arrays}
    return {**made, **arrays}


def without_unseen(architecture: Architecture, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All cameras are in the prompt, so all are seen."""
    del architecture
    return dict(arrays)


def draw(
    architecture: Architecture, rng: jax.Array, batch: Mapping[str, Leaf], samples: int = 1
) -> tuple[dict[str, Leaf], jax.Array]:
    """The batch with normal noise, upstream's times, t = (s - x) / s with x ~ Beta(alpha, 1), and seeds of dropout."""
    noise_rng, time_rng, dropout_rng, augmentation = jax.random.split(rng, 4)
    b, *chunk = batch["actions"].shape
    drawn = (b,) if samples == 1 else (b, samples)
    # The distribution function of Beta(alpha, 1) is x^alpha.
    time = _time_at(architecture, jax.random.uniform(time_rng, drawn))
    seeds = {SEED: jax.random.bits(dropout_rng, (b,))} if architecture.dropout else {}
    return {**batch, **seeds, "noise": jax.random.normal(noise_rng, (*drawn, *chunk)), "time": time}, augmentation


def fixed_draw(architecture: Architecture, batch: Mapping[str, AnyArray]) -> dict[str, np.ndarray]:
    """The same noise and times for the same shape, so that runs compare; times are quantiles of upstream's."""
    shape = batch["actions"].shape
    return {"noise": fixed_noise(shape), "time": np.asarray(_time_at(architecture, spread(shape[0])), np.float32)}


def own_robot(architecture: Architecture) -> None:
    """NVIDIA's checkpoint names embodiments, not the columns of a data set."""
    del architecture


def load_tokenizer(architecture: Architecture, path: str | None, assets: epath.Path | None) -> EagleTokenizer:
    """Eagle's tokenizer: the file or folder given, else the checkpoint's."""
    del architecture
    return load_eagle_tokenizer(path, assets)


def processing(
    architecture: Architecture,
    robot: Robot,
    norm_stats: Mapping[str, NormStats],
    tokenizer: EagleTokenizer,
    lengths: Lengths,
    *,
    state_in_prompt: bool | None = None,
) -> Processing:
    """What stands between a robot and the model."""
    if state_in_prompt:
        raise InputError("a GR00T-N1.5 encodes the state and has no words for it; leave out --state-in-prompt.")
    _check_horizon(architecture, lengths)
    return Processing(robot, architecture, norm_stats, tokenizer, lengths.horizon, lengths.prompt)


def norm_stats_of(
    folder: epath.Path, architecture: Architecture | None = None, robot: Robot | None = None
) -> dict[str, NormStats] | None:
    """The statistics of the robot's embodiment, or of the only one; None if the checkpoint has none of it.

    Raises:
      InputError: it has those of several, and nothing says which robot it is.
    """
    tags = list(read_metadata(folder))
    tag = None if architecture is None else architecture.embodiment
    if tag is None and len(tags) > 1:
        raise InputError(f"{METADATA} has statistics of {', '.join(tags)}; choose one with --embodiment.")
    if not tags:
        return lerobot.statistics_of(folder)
    return statistics_for(folder, tag or tags[0], robot)


def known_robot(architecture: Architecture, robot: Robot, folder: epath.Path | None) -> Robot:
    """The robot with widths and rotations of the parts that it names, where the checkpoint knows its embodiment."""
    entry = read_metadata(folder).get(architecture.embodiment or "")
    if entry is None or not names_parts(robot.images, robot.columns):
        return robot
    return known_parts(robot, entry, f"{folder}/{METADATA}, {architecture.embodiment}")


def augment(architecture: Architecture, key: jax.Array, inputs: Mapping[str, Leaf]) -> dict[str, Leaf]:
    """The inputs with Isaac-GR00T's other views of the same images; lerobot changes none."""
    size = architecture.vision.image_size
    images = {key.removeprefix("image/"): model_image(x, size) for key, x in inputs.items() if key.startswith("image/")}
    return {**inputs, **{f"image/{camera}": image for camera, image in augment_images(key, images).items()}}


def forward(
    model: Groot, params: Tree, inputs: Mapping[str, Leaf], *, gates: Gates = Gates(), capture: Capture = False
) -> tuple[Float[Array, "b *k horizon adim"], dict[str, TowerStates]]:
    """The velocity, and the towers' states if captured."""
    t = jnp.asarray(inputs["time"])[..., None, None]
    x_t = (1 - t) * inputs["noise"] + t * per_draw(inputs["actions"], inputs["time"])
    return model.apply({"params": params}, inputs, x_t, inputs["time"], gates=gates, capture=capture)


def losses(model: Groot, params: Tree, inputs: Mapping[str, Leaf], *, gates: Gates = Gates()) -> Loss:
    """Mean square error over the counted dimensions of an observation, which weighs as many as it has."""
    return loss_of(model.architecture, forward(model, params, inputs, gates=gates)[0], inputs)


def loss_of(architecture: Architecture, output: Array, inputs: Mapping[str, Leaf]) -> Loss:
    """NVIDIA's loss of a velocity."""
    return distance(architecture, output, per_draw(inputs["actions"], inputs["time"]) - inputs["noise"], inputs)


def distance(architecture: Architecture, output: Array, other: AnyArray, inputs: Mapping[str, Leaf]) -> Loss:
    """The mean square between two velocities over the counted dimensions."""
    del architecture
    counted = _counted(inputs).astype(jnp.float32)
    weight = counted.sum(axis=(1, 2))
    error = jnp.square(output.astype(jnp.float32) - other) * per_draw(counted, inputs["time"])
    total = error.sum(axis=(-2, -1))
    # An observation without a counted dimension has loss and weight 0.
    return Loss(total / jnp.maximum(weight, 1.0).reshape(-1, *(1 for _ in total.shape[1:])), weight)


def error_weights(architecture: Architecture, inputs: Mapping[str, Leaf]) -> Float[Array, "b horizon adim"]:
    """The loss of an observation is the mean over its counted dimensions."""
    del architecture
    counted = _counted(inputs).astype(jnp.float32)
    return counted / jnp.maximum(counted.sum(axis=(1, 2), keepdims=True), 1.0)


def sample(
    model: Groot, params: Tree, inputs: Mapping[str, Leaf], *, noise: Leaf, num_steps: int, gates: Gates = Gates()
) -> Float[Array, "b horizon adim"]:
    """Actions by Euler steps from noise; padding dimensions are denoised like any other."""
    return sample_actions(model, params, inputs, noise=noise, num_steps=num_steps, gates=gates)


def num_steps(architecture: Architecture) -> int:
    """The checkpoint's Euler steps."""
    return architecture.num_inference_timesteps


def why_no_actions(architecture: Architecture) -> str | None:
    """It can always sample."""
    del architecture
    return None


def _counted(inputs: Mapping[str, Leaf]) -> Bool[Array, "b horizon adim"]:
    mask = inputs.get("action_mask")
    return jnp.ones(inputs["actions"].shape, bool) if mask is None else jnp.asarray(mask).astype(bool)


def _time_at(architecture: Architecture, quantile: AnyArray) -> AnyArray:
    return (architecture.noise_s - quantile ** (1.0 / architecture.noise_alpha)) / architecture.noise_s


__all__ = [
    "CONFIGURATIONS",
    "GROOT_N15",
    "KINDS",
    "LEROBOT_PREFIX",
    "RELEASED",
    "STACKS",
    "Architecture",
    "AttentionSizes",
    "DitSizes",
    "Groot",
    "Padding",
    "QwenSizes",
    "architecture_of",
    "augment",
    "build",
    "camera_names",
    "complete",
    "config_with_depths",
    "draw",
    "embedding_name",
    "error_weights",
    "fixed_draw",
    "forward",
    "init_params",
    "inputs",
    "known_robot",
    "layout",
    "lengths",
    "losses",
    "num_steps",
    "own_statistics",
    "prefix_of",
    "recognises",
    "robot_cameras",
    "sample",
    "sample_actions",
    "side_files",
    "training_defaults",
    "without_unseen",
    "why_no_actions",
]
