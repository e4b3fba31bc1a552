"""What the tests of serving share: a loaded model without a checkpoint, and requests of any robot."""

import functools

import jax
import numpy as np
import toys
from etils import epath
from recordings import GOLDEN

from clp_jax.checkpoint import CheckpointSpec
from clp_jax.data.chain import Chain
from clp_jax.data.norm_stats import NormStats
from clp_jax.data.robots import Robot
from clp_jax.data.tokenizer import load_tokenizer
from clp_jax.loading import LoadedModel
from clp_jax.models import Architecture, abstract_params
from clp_jax.serving.requests import RobotRequests
from clp_jax.trees import flatten, unflatten


@functools.cache
def params(architecture: Architecture) -> dict:
    """Random parameters without running an initialiser, which would be half of the time of these tests."""
    rng = np.random.default_rng(0)
    flat = flatten(abstract_params(architecture))
    return unflatten({path: 0.3 * rng.standard_normal(leaf.shape, np.float32) for path, leaf in flat.items()})


def loaded(architecture: Architecture, params: dict, *, devices: int = 1, record: dict | None = None) -> LoadedModel:
    """On so many devices; one as a server with one GPU has it."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]).reshape(devices, 1), ("batch", "fsdp"))
    return LoadedModel(CheckpointSpec(epath.Path("nowhere"), {}, False, None, record), architecture, params, mesh)


def robot_requests(
    architecture: Architecture, robot: Robot, stats: dict[str, NormStats], *, horizon: int = 10, length: int = 48
) -> RobotRequests:
    """Without the state in the prompt."""
    tokenizer = load_tokenizer(GOLDEN / "tokenizer/tiny_spm.model")
    return RobotRequests(Chain(robot, architecture, stats, tokenizer, horizon, length, False))


def rows(count: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Model-ready requests for the toy."""
    arrays = toys.data(toys.architecture(), count, seed=seed).arrays
    arrays = {key: value for key, value in arrays.items() if key not in ("actions", "noise", "time", "episode_index")}
    return [{key: np.asarray(value[i]) for key, value in arrays.items()} for i in range(count)]
