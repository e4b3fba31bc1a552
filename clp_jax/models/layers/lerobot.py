"""Names that every policy folder of lerobot 0.6 uses."""

from typing import Any

STATE, ACTION = "observation.state", "action"
"""Features of every policy."""

PREFIX = "model."
"""Of every tensor of a policy."""


def step(name: str, **config: Any) -> dict[str, Any]:
    """One step of a processor."""
    return {"registry_name": name, "config": config}
