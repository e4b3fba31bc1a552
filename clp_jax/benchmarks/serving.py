"""Latency and throughput of two served checkpoints, asked in turns by clients in another process."""

import concurrent.futures
import contextlib
import multiprocessing
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from clp_jax.benchmarks.small import random_observations
from clp_jax.benchmarks.websocket_load import closed_loop
from clp_jax.loading import LoadedModel, load_model
from clp_jax.models import family_of
from clp_jax.serving import wire
from clp_jax.serving.policy import Policy
from clp_jax.serving.requests import ModelRequests
from clp_jax.serving.server import ServerSettings, serving


def run(
    checkpoint: str,
    against: str,
    *,
    clients: tuple[int, ...] = (1, 4, 16),
    rounds: int = 5,
    seconds: float = 2.0,
    max_batch: int = 8,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Serve both and measure them in alternating rounds.

    Args:
      checkpoint: the smaller one.
      against: the one it was made from.
      clients: how many ask at the same time, each its next request when the last is answered.
      rounds: of each checkpoint and number of clients.
      seconds: of a round.
      max_batch: requests computed together at most.
      settings: of ``load_model``, what the checkpoints do not tell.

    Returns:
      Per checkpoint its depth and per number of clients p50 and p99 of the latency, answers per second, and how many
      there were; and the conditions.

    Raises:
      InputError: a checkpoint that cannot be read or served.
    """
    told = dict(settings or {})
    models = {"pruned": load_model(checkpoint, **told), "full": load_model(against, **told)}
    policies = {name: _policy(model, max_batch) for name, model in models.items()}
    requests = {name: wire.pack(_request(policy)) for name, policy in policies.items()}
    found: dict[tuple[str, int], list[tuple[list[float], float]]] = {}
    server = ServerSettings(port=0, queue=2 * max(clients))
    spawn = multiprocessing.get_context("spawn")  # a fork would inherit JAX's threads
    with contextlib.ExitStack() as stack:
        asking = stack.enter_context(concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn))
        ports = {name: stack.enter_context(serving(policy, server)) for name, policy in policies.items()}
        for measured in range(rounds + 1):
            for count in clients:
                for name, port in ports.items():
                    round_ = asking.submit(closed_loop, port, requests[name], count, seconds).result()
                    if measured:  # the first round warms up
                        found.setdefault((name, count), []).append(round_)
    return {
        "models": {
            name: {
                "depth": models[name].architecture.depths,
                "clients": {str(count): _summary(found[name, count]) for count in clients},
            }
            for name in models
        },
        "conditions": {
            "device": jax.devices()[0].device_kind,
            "devices": jax.device_count(),
            "jax": jax.__version__,
            "dtype": models["full"].architecture.dtype,
            "rounds": rounds,
            "seconds": seconds,
            "max_batch": max_batch,
            "action_horizon": policies["full"].metadata["action_horizon"],
            "prompt_length": policies["full"].requests.prompt_length,
            "request_bytes": len(requests["full"]),
        },
    }


def _policy(model: LoadedModel, max_batch: int) -> Policy:
    lengths = family_of(model.architecture).lengths(model.architecture)
    requests = ModelRequests(model.architecture, lengths)
    policy = Policy(model, requests, action_horizon=lengths.horizon, max_batch=max_batch)
    policy.compile()
    return policy


def _request(policy: Policy) -> dict[str, np.ndarray]:
    """A model-ready observation: all cameras, every token valid."""
    requests = policy.requests
    assert isinstance(requests, ModelRequests)
    observation = random_observations(requests.architecture, 1, requests.lengths).arrays
    request = {key: observation[key][0] for key in requests.keys}
    return request | {key: np.asarray(value) for key, value in request.items() if value.ndim == 0}


def _summary(rounds: list[tuple[list[float], float]]) -> dict[str, float]:
    latencies = np.array([latency for round_, _ in rounds for latency in round_])
    return {
        "p50_ms": 1e3 * float(np.quantile(latencies, 0.5)),
        "p99_ms": 1e3 * float(np.quantile(latencies, 0.99)),
        "requests_per_second": float(np.median([rate for _, rate in rounds])),
        "requests": len(latencies),
    }


def show(result: dict[str, Any], console: Console) -> None:
    """Print what `run` found."""
    conditions, models = result["conditions"], result["models"]
    table = Table(
        title=f"Serving on {conditions['devices']} {conditions['device']}, {conditions['dtype']}, "
        f"batches of at most {conditions['max_batch']}; full -> pruned"
    )
    for column in ("clients", "p50 latency", "p99 latency", "requests/s"):
        table.add_column(column, justify="right")
    for count in models["full"]["clients"]:
        full, pruned = (models[name]["clients"][count] for name in ("full", "pruned"))
        cells = [f"{full[key]:.0f} -> {pruned[key]:.0f} ms" for key in ("p50_ms", "p99_ms")]
        faster = pruned["requests_per_second"] / full["requests_per_second"]
        rates = f"{full['requests_per_second']:.1f} -> {pruned['requests_per_second']:.1f} ({faster:.2f} x)"
        table.add_row(count, *cells, rates)
    console.print(table)
