"""Requests through the model, alone or in batches, and back as the robot's actions."""

import concurrent.futures
import dataclasses
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, UInt32

from clp_jax.aliases import AnyArray, Array, Leaf
from clp_jax.cuts import WHOLE, Cut
from clp_jax.errors import InputError
from clp_jax.loading import LoadedModel
from clp_jax.models import Architecture, Gates, Lengths, build, family_of
from clp_jax.serving.depths import ANY, DEPTH, TIME, Wish, models_of, pick, wish_of
from clp_jax.serving.requests import Requests, chunk, flat
from clp_jax.sharding import batch_sharding, parameter_shardings, replicated

_TURNS = 5


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A request that is ready for the model.

    Attributes:
      inputs: of the model, without a batch axis.
      state: of the robot, in its units.
      number: of the request; the key of its noise.
      noise: instead of the key's, [horizon, adim]; None where the model draws none.
      wish: which depth it asks for.
    """

    inputs: Mapping[str, np.ndarray]
    state: Float[np.ndarray, " d"]
    number: int
    noise: Float[np.ndarray, "horizon adim"] | None = None
    wish: Wish = ANY


class Policy:
    """A loaded model that answers requests.

    A request's noise comes from its number alone, ``fold_in(key(seed), number)``, or from the request: the answer does
    not depend on what it was batched with, beyond the rounding of another batch size. A model whose actions are tokens
    needs no noise: it writes the likeliest ones.

    Args:
      model: on its devices; batches that their number divides are split over them.
      requests: how requests are read and answers written.
      action_horizon: actions of a chunk.
      max_batch: the largest batch.
      num_steps: Euler steps from noise to actions, or tokens at most.
      seed: of the noise.
      cuts: that are served instead of the whole model alone, the first where a request asks for none.

    Raises:
      InputError: sizes below one.
    """

    def __init__(
        self,
        model: LoadedModel,
        requests: Requests,
        *,
        action_horizon: int,
        max_batch: int = 8,
        num_steps: int = 10,
        seed: int = 0,
        cuts: Sequence[Cut] = (WHOLE,),
    ):
        check_sizes(action_horizon=action_horizon, max_batch=max_batch, num_steps=num_steps)
        self.requests = requests
        self.buckets = buckets(max_batch)
        self._architecture, self._mesh, self._horizon = model.architecture, model.mesh, action_horizon
        dim = model.architecture.action_dim
        self._noise_shape = None if dim is None else (action_horizon, dim)
        self._numbers = itertools.count()
        self._num_steps, self._seed = num_steps, seed
        self._models = models_of(model, cuts)
        self._programs: dict[tuple[str, int], Any] = {}
        self._milliseconds: dict[int, dict[str, float]] = {}
        self.metadata = self._metadata(model.spec.plan_record)

    def compile(self, *buckets: int, advance: Callable[[int], None] | None = None) -> None:
        """Compile the programs of batch sizes, side by side; `infer` and `infer_batch` do so when they need one.

        Where several depths are served, each is timed as well: requests choose by it.

        Args:
          *buckets: batch sizes; none for all of the policy's.
          advance: is told of every batch size that is ready.
        """
        new = [size for size in buckets or self.buckets if size not in self._milliseconds]
        if not new:
            return
        with concurrent.futures.ThreadPoolExecutor() as pool:
            compiling = {
                (name, size): pool.submit(self._lowered(name, size).compile) for size in new for name in self._models
            }
            for size in new:
                self._programs |= {(name, size): compiling[name, size].result() for name in self._models}
                if advance is not None:
                    advance(1)
        several = len(self._models) > 1
        for size in new:
            self._milliseconds[size] = self._timed(size) if several else dict.fromkeys(self._models, 0.0)
        if several:
            self.metadata[TIME] = self._milliseconds[min(self._milliseconds)]

    def _lowered(self, name: str, bucket: int) -> jax.stages.Lowered:
        """The program of one depth and batch size, before the compiler."""
        model = self._models[name]
        params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), model.params)
        traced = trace_sampling(
            model.architecture, params, self._abstract(bucket), self._mesh, num_steps=self._num_steps, seed=self._seed
        )
        return traced.lower()

    def _abstract(self, bucket: int) -> dict[str, Any]:
        lengths = Lengths(self._horizon, self.requests.prompt_length)
        return abstract_rows(self._architecture, bucket, lengths, cameras=self.requests.cameras)

    def _timed(self, bucket: int) -> dict[str, float]:
        """Milliseconds of a batch by depth, its way to the device and back included."""
        batch = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), self._abstract(bucket))
        times: dict[str, list[float]] = {name: [] for name in self._models}
        for _ in range(_TURNS):  # a busy machine disturbs all alike
            for name, seconds in times.items():
                start = time.perf_counter()
                self._sampled(name, bucket, batch)
                seconds.append(time.perf_counter() - start)
        return {name: 1e3 * statistics.median(seconds) for name, seconds in times.items()}

    def _sampled(self, name: str, bucket: int, batch: Mapping[str, Any]) -> np.ndarray:
        return np.asarray(self._programs[name, bucket](self._models[name].params, batch))

    def prepare(self, request: Any) -> Prepared:
        """Check a request and bring it into the model's form; runs on the host alone.

        Args:
          request: a map as openpi's clients send it (see `requests`), perhaps with ``noise`` [horizon, adim] float,
            and where several depths are served with what `depths` reads.

        Raises:
          InputError: one line that says what is wrong with it.
        """
        values = flat(request)
        noise = self._noise_in(values)
        wish = wish_of(values, tuple(self._models) if len(self._models) > 1 else (), self.requests.keys)
        inputs, state = self.requests.inputs(values)
        return Prepared(inputs, state, next(self._numbers), noise, wish)

    def infer(
        self, observation: Mapping[str, Any], *, noise: Float[np.ndarray, "horizon adim"] | None = None
    ) -> dict[str, Any]:
        """The answer to one observation.

        Args:
          observation: a request.
          noise: instead of the policy's own.

        Returns:
          As `infer_batch`.
        """
        request = observation if noise is None else {**observation, "noise": noise}
        return self.infer_batch([self.prepare(request)])[0]

    def infer_batch(self, prepared: Sequence[Prepared]) -> list[dict[str, Any]]:
        """The answers to at most ``max_batch`` requests, computed together.

        Returns:
          Per request ``actions`` [horizon, rdim] in the robot's units, ``state``, and ``policy_timing`` with
          ``infer_ms``, which ends when the actions are on the host. (openpi's ends when the device has been asked.)
          ``state`` is a list: openpi-client's ActionChunkBroker cuts every array along the horizon. With a ``note``
          the answer is not what the model was asked for, and says what it is. Where several depths are served,
          ``keep_layers`` says which one answered; the requests of each are computed together, the smallest first.

        Raises:
          InputError: a request's own noise makes an action that is not finite.
          FloatingPointError: an action is NaN or infinite; no robot should see it.
        """
        found = self.outcomes(prepared)
        for outcome in found:
            if isinstance(outcome, Exception):
                raise outcome
        return [outcome for outcome in found if not isinstance(outcome, Exception)]

    def outcomes(self, prepared: Sequence[Prepared]) -> list[dict[str, Any] | Exception]:
        """As `infer_batch`, but what is wrong with one request stands in its own place and spoils no other's answer."""
        start = time.perf_counter()
        found: dict[int, dict[str, Any] | Exception] = {}
        for name, places in self._by_depth(prepared).items():
            entries = [prepared[place] for place in places]
            bucket = self._bucket(len(entries))
            # The rows that fill a batch up are copies of its first.
            rows = [*entries, *[entries[0]] * (bucket - len(entries))]
            batch = jax.tree.map(lambda *xs: np.stack(xs), *map(self._row, rows))
            actions = self._sampled(name, bucket, batch)
            timing = {"infer_ms": 1e3 * (time.perf_counter() - start), "batch_size": len(entries)}
            which = {DEPTH: name} if len(self._models) > 1 else {}
            for place, row, entry in zip(places, actions, entries, strict=False):
                found[place] = self._outcome(row, entry, {"policy_timing": dict(timing), **which})
        return [found[place] for place in range(len(prepared))]

    def _bucket(self, count: int) -> int:
        """The size of the batch for so many requests, compiled."""
        bucket = next(size for size in self.buckets if size >= count)
        self.compile(bucket)
        return bucket

    def _by_depth(self, prepared: Sequence[Prepared]) -> dict[str, list[int]]:
        """The places of the requests that each depth answers, the fastest depth first.

        Times are those of a batch of all of them: who is alone at a depth waits for those at smaller ones.
        """
        times = self._milliseconds[self._bucket(len(prepared))]
        blocks = {name: sum(model.architecture.depths.values()) for name, model in self._models.items()}
        chosen = [pick(entry.wish, times, blocks) for entry in prepared]
        return {
            name: [place for place, choice in enumerate(chosen) if choice == name]
            for name in sorted(set(chosen), key=times.__getitem__)
        }

    def _outcome(self, row: np.ndarray, entry: Prepared, told: Mapping[str, Any]) -> dict[str, Any] | Exception:
        """One request's answer, or why it has none."""
        if np.isfinite(row).all():
            actions = self.requests.actions(row, entry.state)
            if np.isfinite(actions).all():
                note = self.requests.note(row)
                answer = {"actions": actions, "state": entry.state.tolist(), **told}
                return answer if note is None else answer | {"note": note}
        if entry.noise is not None:
            return InputError("the noise of the request makes actions that are not finite; send normal noise.")
        return FloatingPointError("the model's actions hold NaN or infinite values.")

    def _noise_in(self, values: Mapping[str, Any]) -> Float[np.ndarray, "horizon adim"] | None:
        if any(key.startswith("noise/") for key in values):
            raise InputError("noise is a map; send an array.")
        if "noise" not in values:
            return None
        if self._noise_shape is None:
            raise InputError(f"a {self._architecture.kind} draws no noise; leave noise out of the request.")
        return chunk(values, "noise", *self._noise_shape)

    def _row(self, entry: Prepared) -> dict[str, Any]:
        row: dict[str, Any] = {"inputs": dict(entry.inputs), "number": np.uint32(entry.number)}
        if self._noise_shape is None:
            return row
        noise = np.zeros(self._noise_shape, np.float32) if entry.noise is None else entry.noise
        return row | {"noise": noise, "given": np.asarray(entry.noise is not None)}

    def _metadata(self, record: Mapping[str, Any] | None) -> dict[str, Any]:
        """What a client is told when it connects; `compile` adds the milliseconds of several depths.

        ``depth`` is that of the model that answers who asks for none.
        """
        several = {DEPTH: list(self._models)} if len(self._models) > 1 else {}
        return {
            "model": self._architecture.kind,
            "depth": next(iter(self._models.values())).architecture.depths,
            "plan": None if record is None else record.get("plan"),
            "action_horizon": self._horizon,
            "action_dim": self.requests.action_dim,
            "noise_shape": self._noise_shape and list(self._noise_shape),
            "robot": self.requests.name,
            "keys": list(self.requests.keys),
            "num_steps": self._num_steps,
            "max_batch": self.buckets[-1],
            **several,
        }


def check_sizes(**sizes: int) -> None:
    """Raise an `InputError` if a flag is below one."""
    for name, value in sizes.items():
        if value < 1:
            raise InputError(f"--{name.replace('_', '-')} is {value}; give at least 1.")


def buckets(largest: int) -> tuple[int, ...]:
    """The batch sizes that are compiled: powers of two, and the largest.

    >>> buckets(6)
    (1, 2, 4, 6)
    """
    powers = itertools.takewhile(lambda size: size < largest, (2**i for i in itertools.count()))
    return (*powers, largest)


def abstract_rows(
    architecture: Architecture,
    bucket: int,
    lengths: Lengths,
    *,
    cameras: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Shapes and dtypes of a batch of requests; all of the model's cameras if none are named."""
    family = family_of(architecture)
    described = family.inputs(architecture, lengths, cameras)
    inputs = {key: leaf for key, leaf in described.items() if key not in family.OF_LOSSES}
    entries: dict[str, Any] = {"inputs": inputs, "number": jax.ShapeDtypeStruct((), np.uint32)}
    if "actions" in described:
        entries |= {"noise": described["actions"], "given": jax.ShapeDtypeStruct((), np.bool_)}
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((bucket, *leaf.shape), leaf.dtype), entries)


def trace_sampling(
    architecture: Architecture,
    params: Leaf,
    batch: Mapping[str, Any],
    mesh: jax.sharding.Mesh,
    *,
    num_steps: int = 10,
    seed: int = 0,
) -> jax.stages.Traced:
    """The program of one batch size, from parameters and a batch to actions, or tokens, on every device.

    Args:
      architecture: of the model.
      params: shapes and dtypes of the parameters.
      batch: from `abstract_rows`; split over the devices if their number divides it, else the same on all.
      mesh: the devices.
      num_steps: Euler steps from noise to actions, or tokens at most.
      seed: of the noise.
    """
    split = batch["number"].shape[0] % mesh.size == 0
    module = build(architecture, batch_sharding(mesh) if split else None)
    shardings = parameter_shardings(params, mesh), batch_sharding(mesh) if split else replicated(mesh)
    function = functools.partial(_sample, family_of(architecture), module, num_steps, seed)
    return jax.jit(function, in_shardings=shardings, out_shardings=replicated(mesh)).trace(params, batch)


def noise_of(seed: int, numbers: UInt32[AnyArray, " b"], shape: tuple[int, int]) -> Float[Array, "b horizon adim"]:
    """The noise of the requests with these numbers."""
    key = jax.random.key(seed)
    return jax.vmap(lambda number: jax.random.normal(jax.random.fold_in(key, number), shape))(jnp.asarray(numbers))


def _sample(family: Any, module: Any, num_steps: int, seed: int, params: Leaf, batch: Mapping[str, Any]) -> Array:
    noise = _noise(seed, batch) if "noise" in batch else None
    return family.sample(module, params, batch["inputs"], noise=noise, num_steps=num_steps, gates=Gates())


def _noise(seed: int, batch: Mapping[str, Any]) -> Float[Array, "b horizon adim"]:
    """Of the requests that bring some theirs, of the others that of their numbers."""
    given: Bool[Array, " b"] = batch["given"]
    drawn = noise_of(seed, batch["number"], batch["noise"].shape[1:])
    return jnp.where(given[:, None, None], batch["noise"], drawn)
