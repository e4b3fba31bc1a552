"""Requests to a server: hostile ones, and what becomes of another client's beside them."""

import dataclasses
import functools
import random
from pathlib import Path
from typing import Any

import numpy as np
import toys
from attack import mutations
from attack.running import Silent, Target
from served import broken, loaded, robot_requests, rows

from clp_jax.models import Lengths
from clp_jax.models.pi0.robots import LIBERO
from clp_jax.processing.norm_stats import NormStats
from clp_jax.serving import wire
from clp_jax.serving.policy import Policy
from clp_jax.serving.requests import ModelRequests

_NOT_MEANT = (None, True, -1, 2**63, 1e300, "text", b"bytes", [], {}, [[1], [1, 2]], "a" * 9999, [None])
_NUMBERS = (3e38, -3e38, 1e300, np.nan, np.inf, 1e-40, 0.0, 65504.0)
_DTYPES = ("?", "i1", "u1", "<u2", "<i8", "<f2", "<f8", ">f4")


def messages(folder: Path) -> Target:
    """Requests in the model's form and in a robot's, computed together with another client's, whose answer stays."""
    folder.mkdir()
    policies = served_policies()
    others = [policy.prepare(sound_request(policy)) for policy in policies]
    alone = [policy.outcomes([other])[0]["actions"] for policy, other in zip(policies, others, strict=True)]
    for number, policy in enumerate(policies):
        (folder / f"{number}.msgpack").write_bytes(wire.pack(sound_request(policy)))

    def use(source: Path, out: Path) -> None:
        for file, policy, other, expected in zip(sorted(source.iterdir()), policies, others, alone, strict=True):
            prepared = policy.prepare(wire.unpack(file.read_bytes()))
            answer, outcome = policy.outcomes([other, prepared])
            if isinstance(answer, Exception) or not np.allclose(answer["actions"], expected, atol=1e-5):
                raise Silent("the answer to another client is not what it is alone")
            if isinstance(outcome, Exception):
                raise outcome
            wire.pack(outcome)

    return Target(folder, use, damage=_damage)


def _damage(rng: random.Random, folder: Path) -> str:
    """Replaces a request by a hostile one."""
    file = rng.choice(sorted(folder.iterdir()))
    way = rng.random()
    if way < 0.2:
        message = broken(rng)
        file.write_bytes(message.encode() if isinstance(message, str) else message)
        return f"{file.stem}: broken"
    if way < 0.3:
        return mutations.flip(rng, file)
    request = dict(wire.unpack(file.read_bytes()))
    key = rng.choice(sorted(request))
    how = rng.choice(["other", "fill", "dtype", "shape", "drop", "extra", "noise"])
    if how == "drop":
        del request[key]
    elif how == "extra":
        request[rng.choice(["extra", "observation/state", "state", "noise"])] = [1]
    elif how == "noise":
        noise = np.full((toys.HORIZON, 6), rng.choice(_NUMBERS))
        request["noise"] = _cast(noise, rng.choice([np.float32, np.float64]))
    elif how == "other" or not isinstance(request[key], np.ndarray):
        request[key] = rng.choice(_NOT_MEANT)
    else:
        request[key] = _array(rng, request[key], how)
    file.write_bytes(wire.pack(request))
    return f"{file.stem}, {key}: {how}"


def _array(rng: random.Random, value: np.ndarray, how: str) -> np.ndarray:
    if how == "fill":
        return _cast(np.full(value.shape, rng.choice(_NUMBERS)), rng.choice([value.dtype, np.float64, np.float32]))
    if how == "dtype":
        return _cast(value, rng.choice(_DTYPES))
    thin, flat = np.zeros((3, 1, 9999), value.dtype), value.reshape(-1)
    return rng.choice([value[..., None], flat, flat[:0], thin, value.T])


def _cast(array: np.ndarray, dtype: Any) -> np.ndarray:
    with np.errstate(all="ignore"):
        return array.astype(dtype)


@functools.cache
def served_policies() -> tuple[Policy, ...]:
    """One for requests in the model's form, and one for LIBERO's."""
    architecture = dataclasses.replace(toys.architecture(), vocab_size=512)  # of the tokenizer of the tests
    model = loaded(architecture, toys.params(architecture))
    stats = NormStats(np.zeros(6), np.ones(6), -np.ones(6), np.ones(6))
    statistics = {"state": stats, "actions": stats}
    small = dataclasses.replace(LIBERO, action_dim=architecture.action_dim)
    robot = robot_requests(architecture, small, statistics, horizon=toys.HORIZON, length=toys.PROMPT)
    ready = ModelRequests(architecture, Lengths(toys.HORIZON, toys.PROMPT))
    return tuple(
        Policy(model, requests, action_horizon=toys.HORIZON, max_batch=2, num_steps=2) for requests in (ready, robot)
    )


def sound_request(policy: Policy) -> dict[str, Any]:
    """What a client of this policy may send."""
    if isinstance(policy.requests, ModelRequests):
        return rows(1)[0]
    image = np.zeros((8, 6, 3), np.uint8)
    state = np.linspace(-1, 1, 6)
    return {"observation/image": image, "observation/wrist_image": image, "observation/state": state, "prompt": "go"}
