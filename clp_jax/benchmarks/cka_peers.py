"""All-pairs CKA against other packages: time, and error from float64, side by side in one process.

Peers are PyPI's `pytorch-cka` (imported as `cka`) and `ckatorch`, and two NumPy loops. They are optional: one that is
not installed is reported as such. Rounds are interleaved, so that a busy machine disturbs all alike; compare the ratios
of one run, not seconds of different runs.
"""

import dataclasses
import functools
import importlib.metadata
import itertools
import os
import platform
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from rich.table import Table

from clp_jax import cka
from clp_jax.benchmarks.peers import optional

SGEMM_SIZE = 2048
"""Side of the square float32 product whose rate defines the floor."""

OURS, FLOOR = "clp_jax", "floor"


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to get the CKA matrix of float32 states [l, n, d].

    Attributes:
      name: package and function.
      detail: dtype and estimator.
      put: turns the states into the package's own array, which is not timed.
      call: computes what is timed: all pairs of layers, or only ``pairs``.
      debiased: which estimator it computes.
      pairs: pairs of layers timed per round, where all of them would take minutes; times are scaled to all pairs.
    """

    name: str
    detail: str
    put: Callable[[np.ndarray], Any]
    call: Callable[[Any], np.ndarray]
    debiased: bool
    pairs: tuple[tuple[int, int], ...] | None = None


def run(
    layers: int = 18, samples: int = 2048, width: int = 512, *, repeats: int = 5, offset: float = 10.0, seed: int = 0
) -> dict[str, Any]:
    """Measure every installed candidate on the states of a random residual stream.

    Args:
      layers: states compared.
      samples: rows n.
      width: features d.
      repeats: timed rounds after one warm-up.
      offset: mean over spread of the second set of states, on which only the error is measured.
      seed: of the states.

    Returns:
      A tree of numbers and strings: ``shape``, ``machine``, ``floor`` (seconds of the symmetric products alone at the
      rate of a large float32 product), ``rows`` per candidate (``median_s``, ``min_s``, ``error``, ``error_offset``,
      ``status``) and ``ratios`` of medians: of the fastest peer's and of the floor's time to ours.
    """
    states = residual_stream(layers, samples, width, offset=0.0, seed=seed)
    shifted = residual_stream(layers, samples, width, offset=offset, seed=seed)
    candidates, missing = _candidates(layers)
    calls: dict[str, Callable[[], Any]] = {c.name: functools.partial(c.call, c.put(states)) for c in candidates}
    square = jnp.asarray(np.random.default_rng(seed).standard_normal((SGEMM_SIZE, SGEMM_SIZE)), jnp.float32)
    product = jax.jit(lambda x: jnp.matmul(x, x, precision=jax.lax.Precision.HIGHEST))
    calls[FLOOR] = lambda: product(square).block_until_ready()
    times = _interleaved(calls, repeats)
    scale = layers * samples**2 * width / (2 * SGEMM_SIZE**3)
    floor = {"median_s": scale * times[FLOOR]["median_s"], "min_s": scale * times[FLOOR]["min_s"]}
    floor["gflop_per_s"] = 2e-9 * SGEMM_SIZE**3 / times[FLOOR]["min_s"]
    exact, exact_shifted = (
        {b: _numpy_cka(x, np.float64, debiased=b) for b in (False, True)} for x in (states, shifted)
    )
    rows = []
    for c in candidates:
        factor = 1.0 if c.pairs is None else layers * (layers + 1) / 2 / len(c.pairs)
        row = {"name": c.name, "detail": c.detail, "status": "measured" if c.pairs is None else f"scaled x{factor:.0f}"}
        row |= {key: factor * value for key, value in times[c.name].items()}
        row |= {"error": _error(c, states, exact), "error_offset": _error(c, shifted, exact_shifted)}
        rows.append(row)
    rows += [{"name": name, "detail": "", "status": "not installed"} for name in missing]
    ours = next(row for row in rows if row["name"] == OURS)
    peers = [row for row in rows if row["name"] != OURS and "median_s" in row]
    fastest = min(peers, key=lambda row: row["median_s"])
    return {
        "shape": {"layers": layers, "samples": samples, "width": width, "offset": offset, "repeats": repeats},
        "machine": _machine(),
        "floor": floor,
        "rows": rows,
        "ratios": {
            "fastest_peer": fastest["name"],
            "times_faster": {row["name"]: row["median_s"] / ours["median_s"] for row in peers},
            "of_floor": floor["median_s"] / ours["median_s"],
        },
    }


def table(result: dict[str, Any]) -> Table:
    """The result of `run` to print."""
    shape, ratios, floor = result["shape"], result["ratios"], result["floor"]
    view = Table(
        title="CKA of all pairs: {layers} layers, {samples} samples, width {width}".format(**shape),
        caption=f"floor {floor['median_s']:.3f} s at {floor['gflop_per_s']:.0f} GFLOP/s (float32 product); "
        f"clp_jax reaches {ratios['of_floor']:.2f} of it. Errors: largest entry against float64, centred states "
        f"and states with a mean of {shape['offset']:g} times the spread.",
    )
    for name in ("package", "what", "median s", "min s", "clp_jax is faster", "error", "error, mean", "status"):
        view.add_column(name, justify="left" if name in ("package", "what", "status") else "right")
    for row in result["rows"]:
        if "median_s" not in row:
            view.add_row(row["name"], row["detail"], "", "", "", "", "", row["status"])
            continue
        faster = ratios["times_faster"].get(row["name"])
        cells = [f"{row['median_s']:.3f}", f"{row['min_s']:.3f}", "" if faster is None else f"{faster:.1f} x"]
        cells += [f"{row['error']:.1e}", f"{row['error_offset']:.1e}"]
        view.add_row(row["name"], row["detail"], *cells, row["status"])
    return view


def residual_stream(layers: int, n: int, d: int, *, offset: float, seed: int) -> Float[np.ndarray, "l n d"]:
    """States in which every layer adds 0.3 of a standard deviation to the one before it, around a mean per channel."""
    rng = np.random.default_rng(seed)
    steps = rng.standard_normal((layers, n, d)) * np.array([1.0] + [0.3] * (layers - 1))[:, None, None]
    return (np.cumsum(steps, axis=0) + offset * rng.standard_normal((1, 1, d))).astype(np.float32)


def _candidates(layers: int) -> tuple[list[Candidate], list[str]]:
    """What can be measured here, and the names of the peers that are not installed."""
    compare = jax.jit(lambda x, valid: cka.cka(cka.hsic(cka.gram_sums(x, valid).raw, debiased=True)))

    def ours(states: jax.Array) -> np.ndarray:
        return np.asarray(compare(states, jnp.ones(states.shape[1], bool)))

    found = [
        Candidate(OURS, "float32, debiased", jnp.asarray, ours, debiased=True),
        Candidate(
            "numpy float64", "Grams, loop over pairs", np.asarray, lambda x: _numpy_cka(x, np.float64), debiased=True
        ),
        Candidate(
            "numpy float32", "Grams, loop over pairs", np.asarray, lambda x: _numpy_cka(x, np.float32), debiased=True
        ),
    ]
    torch, pytorch_cka, ckatorch = (optional(name) for name in ("torch", "cka", "ckatorch.core"))
    missing = [
        name for name, module in (("pytorch-cka", pytorch_cka), ("ckatorch", ckatorch)) if not (torch and module)
    ]
    if torch and pytorch_cka:

        def from_features(features: Any) -> np.ndarray:
            return pytorch_cka.cka_from_features(features, features).numpy()

        found.append(Candidate("pytorch-cka", "float32, debiased", torch.from_numpy, from_features, debiased=True))
    if torch and ckatorch:
        pairs = ((0, layers // 2),)

        def of_pairs(x: Any) -> np.ndarray:
            return np.array([ckatorch.cka_base(x[i], x[j]).item() for i, j in pairs])

        detail = "float64, biased, per pair"
        found.append(Candidate("ckatorch", detail, torch.from_numpy, of_pairs, debiased=False, pairs=pairs))
    return found, missing


def _numpy_cka(states: np.ndarray, dtype: Any, *, debiased: bool = True) -> np.ndarray:
    """CKA the direct way: all Gram matrices in memory, then a loop over pairs of layers."""
    x = states.astype(dtype)
    x -= x.mean(axis=1, keepdims=True)
    grams = [features @ features.T for features in x]
    layers, n = states.shape[:2]
    if debiased:
        for gram in grams:
            np.fill_diagonal(gram, 0)
    rows, totals = [gram.sum(axis=0) for gram in grams], [gram.sum() for gram in grams]
    hsic = np.zeros((layers, layers))
    for i, j in itertools.combinations_with_replacement(range(layers), 2):
        hsic[i, j] = hsic[j, i] = np.vdot(grams[i], grams[j])
        if debiased:
            correction = totals[i] * totals[j] / ((n - 1) * (n - 2)) - 2 / (n - 2) * (rows[i] @ rows[j])
            hsic[i, j] = hsic[j, i] = hsic[i, j] + correction
    norm = np.sqrt(np.diagonal(hsic))
    return hsic / np.outer(norm, norm)


def _interleaved(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, dict[str, float]]:
    """Median and least seconds of each call, one of each per round, after a round of warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if round_:
                seconds[name].append(time.perf_counter() - start)
    return {name: {"median_s": float(np.median(s)), "min_s": min(s)} for name, s in seconds.items()}


def _error(candidate: Candidate, states: np.ndarray, exact: dict[bool, np.ndarray]) -> float:
    wanted = exact[candidate.debiased]
    if candidate.pairs is not None:
        wanted = np.array([wanted[i, j] for i, j in candidate.pairs])
    return float(np.abs(candidate.call(candidate.put(states)) - wanted).max())


def _machine() -> dict[str, Any]:
    packages = ("jax", "jaxlib", "numpy", "torch", "pytorch-cka", "ckatorch")
    return {
        "device": jax.devices()[0].device_kind,
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "versions": {name: _version(name) for name in packages},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
