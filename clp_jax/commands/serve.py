"""``clp serve``: answer openpi's clients over a websocket."""

import asyncio
import dataclasses
import functools
import hashlib
import json
import logging
import signal
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from etils import epath
from rich.console import Console
from rich.markup import escape

from clp_jax.checkpoint import Spec, fingerprint, read_spec
from clp_jax.checkpoint.beside import digest_of, digests_beside
from clp_jax.commands.conventions import choose_conventions, told_by
from clp_jax.commands.data_flags import ObservationFlags, load_tokenizer, stats_of_checkpoint
from clp_jax.commands.depths_flags import depths_of, trained_cut
from clp_jax.commands.model_flags import ModelFlags
from clp_jax.commands.processing_flags import ProcessingFlags
from clp_jax.commands.unused import refuse_unused
from clp_jax.cuts import WHOLE, Cut, cut_of
from clp_jax.errors import InputError
from clp_jax.loading import check_finite, load_model, read_architecture
from clp_jax.models import Architecture, Lengths, family_of
from clp_jax.models.family import Processing
from clp_jax.plan import PrunePlan
from clp_jax.processing import norm_stats
from clp_jax.processing.conventions import Conventions
from clp_jax.processing.norm_stats import NormStats
from clp_jax.processing.robots import Robot
from clp_jax.progress import progress
from clp_jax.provenance import cuts_of
from clp_jax.serving.depths import DEPTH, TIME
from clp_jax.serving.policy import Policy, check_sizes
from clp_jax.serving.requests import ModelRequests, Requests, RobotRequests
from clp_jax.serving.server import ServerSettings, check_free, run_server


@dataclasses.dataclass(frozen=True, kw_only=True)
class Serve(ObservationFlags, ProcessingFlags, ModelFlags):
    """Serve a checkpoint with openpi's protocol, so that openpi-client works unchanged.

    Without a robot, requests are model-ready and so are the answers. SIGTERM and Ctrl-C end it.
    http://HOST:PORT/healthz answers once everything is compiled.
    """

    checkpoint: str
    """openpi checkpoint: step folder or its params, local or gs://."""
    host: str = "127.0.0.1"
    """Address to listen on; there is no authentication, so 0.0.0.0 is for networks you trust."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    max_batch: int = 8
    """Requests computed together at most; 1, 2, 4, ... up to it are compiled before the port opens."""
    queue: int = 64
    """Requests that may wait; one more is answered "busy"."""
    max_message_mb: float = 16.0
    """Size of the largest request in MB."""
    num_steps: int | None = None
    """Integration steps from noise to actions, or tokens at most; the model's own number if absent, in openpi 10 and
    256."""
    seed: int = 0
    """Random seed of the noise."""
    dtype: str | None = None
    """Activations: float32 or bfloat16; if absent bfloat16, on CPUs float32."""
    params_dtype: Literal["keep", "bfloat16"] = "keep"
    """Parameters: as stored, or bfloat16, as openpi serves them."""
    fsdp_devices: int = 1
    """Split large parameters over this many devices."""
    depths: tuple[str, ...] = ()
    """Depths to serve of a step of clp finetune --depths, e.g. 18 12 9, or llm=8,dit=12 llm=6,dit=8. A request gets the
    first, or the one that it names as keep_layers, or the deepest that keeps its latency_ms."""

    # These two read differently where there is no data set.
    prompt: str | None = None
    """Instruction where a request has none."""
    norm_stats: str | None = None
    """A norm_stats.json; else the checkpoint's."""


def run(config: Serve) -> None:
    """Run the command."""
    logging.basicConfig(level=logging.WARNING)
    settings = ServerSettings(config.host, config.port, config.queue, int(config.max_message_mb * 2**20))
    check_free(settings)
    console, spec = Console(), read_spec(config.checkpoint)
    policy = make_policy(config, spec)
    with progress("compiling", total=len(policy.buckets), unit="batch sizes") as advance:
        policy.compile(advance=advance)
    asyncio.run(_serve(policy, settings, functools.partial(_introduce, console, policy, config.host)))
    console.print("stopped")


def make_policy(config: Serve, spec: Spec) -> Policy:
    """The checkpoint behind the requests that the flags describe.

    Raises:
      InputError: a checkpoint, statistics, tokenizer or flags that cannot be used.
    """
    if config.norm_stats is not None:
        refuse_unused(config, ("asset_id",), "--norm-stats already says which statistics are used")
    architecture = read_architecture(spec, **config.model_settings())
    chosen = choose_conventions(told_by(config), architecture, spec.plan_record)
    steps = family_of(architecture).num_steps(architecture) if config.num_steps is None else config.num_steps
    sizes = {"action_horizon": chosen.conventions.action_horizon, "max_batch": config.max_batch, "num_steps": steps}
    check_sizes(**sizes)
    requests, conventions = _requests(config, spec, architecture, chosen.conventions)
    cuts = _cuts(config, spec, architecture)
    model = load_model(spec, dtype=config.dtype, fsdp_devices=config.fsdp_devices, **config.model_settings())
    check_finite(model.params)
    if config.params_dtype != "keep":
        cast = jax.jit(lambda tree: jax.tree.map(lambda x: x.astype(jnp.dtype(config.params_dtype)), tree))
        model = dataclasses.replace(model, params=cast(model.params))
    policy = Policy(model, requests, **sizes, seed=config.seed, cuts=cuts)
    policy.metadata["checkpoint"] = fingerprint(spec)
    policy.metadata["files"] = _identity_of_files(config, spec)
    policy.metadata["conventions"] = str(dataclasses.replace(chosen, conventions=conventions))
    return policy


def _identity_of_files(config: Serve, spec: Spec) -> str:
    """Of what is read beside the arrays, and of the statistics that a flag names; 64 hexadecimal digits."""
    digests = digests_beside(spec)
    if config.norm_stats is not None:
        digests["--norm-stats"] = digest_of(norm_stats.place(config.norm_stats))
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def _cuts(config: Serve, spec: Spec, architecture: Architecture) -> tuple[Cut, ...]:
    """What is served of the model; the whole one without ``--depths``.

    Raises:
      InputError: a depth that was not trained, or the same twice.
    """
    if not config.depths:
        return (WHOLE,)
    known = cuts_of(spec.plan_record)
    if not known:
        raise InputError("--depths: this checkpoint was not trained at several depths; clp finetune --depths does it.")
    known.insert(0, PrunePlan.of(architecture.kind, architecture.depths, coupled=architecture.coupled))
    otherwise = "cut this one with clp prune and serve it alone"
    depths = depths_of(config.depths)
    cuts = tuple(
        cut_of(trained_cut(known, depth, architecture, flag="depths", otherwise=otherwise)) for depth in depths
    )
    if len(set(cuts)) < len(cuts):
        raise InputError(f"--depths {' '.join(config.depths)} names a depth twice.")
    return cuts


def _requests(
    config: Serve, spec: Spec, architecture: Architecture, chosen: Conventions
) -> tuple[Requests, Conventions]:
    """How requests are read, and the conventions with what the checkpoint and the kind of model add."""
    lengths = Lengths(chosen.action_horizon, chosen.max_token_len)
    if chosen.robot is None:
        refuse_unused(
            config,
            ("prompt", "tokenizer", "fast_tokenizer", "norm_stats", "asset_id", "state_in_prompt", "long_prompts"),
            "nothing in model-ready requests depends on {it}",
            instead="say which robot with --openpi-config, --data-config or --robot",
        )
        return ModelRequests(architecture, lengths), chosen
    family = family_of(architecture)
    tokenizer = load_tokenizer(config, architecture, spec.assets)
    robot = family.known_robot(architecture, chosen.robot, spec.folder)
    statistics, asset_id = _statistics(config, spec.assets, architecture, chosen.asset_id, robot)
    processing = family.processing(
        architecture, robot, statistics, tokenizer, lengths, state_in_prompt=chosen.state_in_prompt
    )
    _check_drives(processing, architecture)
    if config.norm_stats is not None:
        _check_spread(config.norm_stats, processing, architecture)
    used = dataclasses.replace(chosen, robot=robot, state_in_prompt=processing.state_in_prompt, asset_id=asset_id)
    return RobotRequests(processing, architecture, long_prompts=config.long_prompts), used


def _check_drives(processing: Processing, architecture: Architecture) -> None:
    """Raise where no answer could be given to any request of this robot."""
    actions, known = processing.action_dim, len(processing.norm_stats["actions"].mean)
    if actions > known:
        raise InputError(f"the actions of {processing.robot.name} have {actions} dimensions, the statistics {known}.")
    if architecture.action_dim is not None and actions > architecture.action_dim:
        raise InputError(
            f"the actions of {processing.robot.name} have {actions} dimensions, the model at most "
            f"{architecture.action_dim}."
        )


def _check_spread(source: str, processing: Processing, architecture: Architecture) -> None:
    """Raise where a file that the user gave has no spread in a dimension that the robot uses."""
    statistics = processing.norm_stats
    dims = {name: len(entry.mean) for name, entry in statistics.items()}
    # Statistics as long as the model's actions may be padded: then they do not tell the robot's dimensions.
    dims = {name: processing.action_dim if known == architecture.action_dim else known for name, known in dims.items()}
    norm_stats.check_spread(statistics, dims, source=source, by=processing.normalised_by)


def _statistics(
    config: Serve, assets: epath.Path | None, architecture: Architecture, asset_id: str | None, robot: Robot
) -> tuple[Mapping[str, NormStats], str | None]:
    """The statistics, and their name in the checkpoint if they are its own."""
    if config.norm_stats is not None:
        return norm_stats.load(config.norm_stats), None
    stats, name = (None, None) if assets is None else stats_of_checkpoint(assets, asset_id, architecture, robot)
    if stats is None or (config.asset_id is not None and name is None):
        named = "" if asset_id is None else f" named {asset_id}"
        raise InputError(f"the checkpoint has no norm stats{named}; give a norm_stats.json with --norm-stats.")
    return stats, name


async def _serve(policy: Policy, settings: ServerSettings, on_ready: Any) -> None:
    """Until SIGTERM or SIGINT; a second one ends the process at once."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    ends = (signal.SIGTERM, signal.SIGINT)

    def end() -> None:
        stop.set()
        for number in ends:
            loop.remove_signal_handler(number)

    before = {number: signal.getsignal(number) for number in ends}
    for number in ends:
        loop.add_signal_handler(number, end)
    try:
        await run_server(policy, settings, stop, on_ready)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _introduce(console: Console, policy: Policy, host: str, port: int) -> None:
    told = policy.metadata
    depth = ", ".join(f"{name} {blocks}" for name, blocks in told["depth"].items())
    console.print(f"{told['model']} ({depth}) on {jax.device_count()} {jax.devices()[0].device_kind}")
    console.print(f"requests ({escape(str(told['robot']))}): {escape(', '.join(told['keys']))}", soft_wrap=True)
    if "conventions" in told:
        console.print(f"conventions {told['conventions']}", soft_wrap=True, highlight=False, markup=False)
    if TIME in told:
        times = ", ".join(f"{name} {time:.1f} ms" for name, time in told[TIME].items())
        console.print(f"{DEPTH}: {times} for one observation, the first where a request asks for none", soft_wrap=True)
    console.print(f"answers: {told['action_horizon']} actions of {told['action_dim']} dimensions")
    console.print(f"ready: ws://{host}:{port}", soft_wrap=True)
