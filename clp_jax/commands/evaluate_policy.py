"""The policy that ``clp evaluate`` asks: a checkpoint in this process, or whatever answers behind a server."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from clp_jax.commands.model_flags import ModelFlags
from clp_jax.commands.processing_flags import ProcessingFlags
from clp_jax.evaluation.rollouts import Answering
from clp_jax.progress import progress

SHARED = tuple(field.name for flags in (ProcessingFlags, ModelFlags) for field in dataclasses.fields(flags))
"""Flags that ``clp serve`` has too."""
_NO_IDENTITY = ("keys", "max_batch", "latency_ms")
"""What a policy tells that may change without it being another one."""


def open_policy(config: Any, robot: str | None, processes: int) -> Answering:
    """The policy that the flags name.

    Args:
      config: flags of ``clp evaluate``.
      robot: whose keys the simulator's requests have; None where they have their own.
      processes: requests at a time.

    Raises:
      InputError: no such checkpoint or server, or one that cannot be asked.
    """
    if config.server is not None:
        from clp_jax.evaluation.remote import RemotePolicy

        return RemotePolicy(config.server, processes)
    return _local(config, robot, processes)


def check_there(config: Any) -> None:
    """Raise an `InputError` unless there is something behind the flags, which is not asked for hours.

    Args:
      config: flags of ``clp evaluate``.
    """
    if config.server is not None:
        open_policy(config, None, 1).close()
    else:
        from clp_jax.checkpoint import read_spec

        read_spec(config.checkpoint)


def reports(checkpoint: str) -> dict[str, bool]:
    """Paths of the pages about a checkpoint, with whether they are still there."""
    from clp_jax.checkpoint import read_spec
    from clp_jax.history import reports_of

    return reports_of(read_spec(checkpoint))


def identity(policy: Answering) -> dict[str, Any]:
    """What must stay the same of a policy for an evaluation to go on, by name; little of openpi's servers."""
    return {f"policy.{name}": value for name, value in policy.metadata.items() if name not in _NO_IDENTITY}


def _local(config: Any, robot: str | None, processes: int) -> Answering:
    from clp_jax.checkpoint import read_spec
    from clp_jax.commands.serve import Serve, make_policy
    from clp_jax.evaluation.local import LocalPolicy
    from clp_jax.loading import read_architecture
    from clp_jax.models import family_of
    from clp_jax.provenance import conventions_of

    spec = read_spec(config.checkpoint)
    suite = family_of(read_architecture(spec, **config.model_settings())).ROBOTS.get(robot)
    recorded = conventions_of(spec.plan_record)
    chosen, keys = config.robot, {}
    if chosen is None and suite is not None:
        if config.openpi_config is not None or (recorded is not None and recorded.robot is not None):
            # What the simulator calls the values whose meaning the conventions know.
            keys = {
                "image": tuple(f"{camera}={_sent(suite.client, key)}" for camera, key in suite.images.items()),
                "state_key": tuple(_sent(suite.client, key) for key in suite.state),
            }
        else:
            chosen = robot
    serve = Serve(
        checkpoint=config.checkpoint,
        openpi_config=config.openpi_config,
        robot=chosen,
        **keys,
        max_batch=processes,
        num_steps=config.num_steps,
        dtype=config.dtype,
        params_dtype=config.params_dtype,
        **{name: getattr(config, name) for name in SHARED} | {"prompt": None},
    )
    policy = make_policy(serve, spec)
    with progress("compiling", total=len(policy.buckets), unit="batch sizes") as advance:
        policy.compile(advance=advance)
    return LocalPolicy(policy)


def _sent(client: Mapping[str, str], key: str) -> str:
    return client.get(key, key)
