"""What the tests of serving share: a loaded model without a checkpoint, and requests of any robot."""

import functools
import random

import jax
import msgpack
import numpy as np
import toys
from etils import epath
from recordings import GOLDEN

from clp_jax.checkpoint import CheckpointSpec
from clp_jax.loading import LoadedModel
from clp_jax.models import Architecture, abstract_params
from clp_jax.models.pi0.processing import Processing
from clp_jax.processing.norm_stats import NormStats
from clp_jax.processing.robots import Robot
from clp_jax.processing.tokenizer import load_tokenizer
from clp_jax.serving import wire
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
    return RobotRequests(Processing(robot, architecture, stats, tokenizer, horizon, length, False), architecture)


def rows(count: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Model-ready requests for the toy."""
    arrays = toys.data(toys.architecture(), count, seed=seed).arrays
    arrays = {key: value for key, value in arrays.items() if key not in ("actions", "noise", "time", "episode_index")}
    return [{key: np.asarray(value[i]) for key, value in arrays.items()} for i in range(count)]


def broken(rng: random.Random) -> bytes | str:
    """A message that is no request: cut short, bombs, arrays that lie about themselves, what NumPy would unpickle."""
    valid = wire.pack(rows(1)[0])
    array = {b"__ndarray__": True, b"data": bytes(24), b"dtype": "<f4", b"shape": [6]}
    bad_dtype = rng.choice(["O", "|V8", "<U3", "<c8", "<M8[s]", "<f16", "<f4,<f4", "x" * 999, "<i3", None])
    bad_shape = rng.choice([[2**31], [2**62, 2**62], [-1], [6.0], [1] * 9, [0, 2**40], [True] * 3, None, [[6]], [5]])
    header = rng.choice([b"\xdd", b"\xdf", b"\xc6", b"\xdb", b"\xc9"])
    return rng.choice(
        [
            valid[: rng.randrange(len(valid))],
            valid + bytes(rng.randrange(1, 20)),
            rng.randbytes(rng.randrange(300)),
            valid.decode("latin-1"),
            header + b"\xff\xff\xff\xff" + rng.randbytes(9),
            b"\x91" * rng.choice([9, 9_000, 60_000]),
            b"\x81\xa1a" * rng.choice([9, 9_000]) + b"\xc0",
            msgpack.packb([{}] * 2_000),
            msgpack.packb({"state": msgpack.ExtType(rng.randrange(128), b"x")}),
            msgpack.packb(msgpack.Timestamp(1)),
            msgpack.packb(rows(1)[0] | {"state": array | {b"dtype": bad_dtype}}, default=wire._plain),
            msgpack.packb(rows(1)[0] | {"state": array | {b"shape": bad_shape}}, default=wire._plain),
            wire.pack(rows(1)[0] | {"state": np.full(6, rng.choice([np.nan, np.inf]), np.float32)}),
            wire.pack({key: value for key, value in rows(1)[0].items() if key != "image_mask/base_0_rgb"}),
        ]
    )


def frames(rng: random.Random) -> dict[str, bytes]:
    """Bytes that no websocket client may send after its handshake."""
    return {
        "not masked": b"\x82\x03abc",
        "compressed": b"\xc2\x83" + bytes(4) + b"abc",
        "reserved opcode": b"\x83\x80" + bytes(4),
        "continues nothing": b"\x80\x81" + bytes(5),
        "2 ** 62 bytes long": b"\x82\xff" + (2**62).to_bytes(8, "big") + bytes(4),
        "no UTF-8": b"\x81\x82" + bytes(4) + b"\xff\xfe",
        "half a close": b"\x88\x81" + bytes(5),
        "noise": b"\xff" + rng.randbytes(999),
    }
