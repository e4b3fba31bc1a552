"""Success in the simulator, with the code behind ``clp evaluate``."""

import json
from pathlib import Path
from typing import Any

from clp_jax.commands.evaluate import Evaluate
from clp_jax.commands.evaluate import run as evaluate
from clp_jax.evaluation.metaworld import INSTRUCTIONS
from studies.metaworld import protocol


def roll_out(
    checkpoint: Path,
    out: Path,
    tasks: tuple[str, ...] = protocol.NEW_TASKS,
    *,
    episodes: int = protocol.EPISODES,
    **flags: Any,
) -> dict[str, Any]:
    """``results.json`` of an evaluation, made if it is not there. Every checkpoint meets the same episodes."""
    if not (out / "results.json").exists():
        settings = {"max_steps": protocol.MAX_STEPS, "replan": protocol.REPLAN, "seed": protocol.EPISODE_SEED}
        evaluate(
            Evaluate(
                suite="metaworld",
                checkpoint=str(checkpoint),
                out=str(out),
                tasks=tasks,
                episodes=episodes,
                image_size=protocol.IMAGE_SIZE,
                filmed=2,
                resume=out.exists(),
                **settings | flags,
            )
        )
    return json.loads((out / "results.json").read_text())


def screen(work: Path, base: Path, *, episodes: int = 20) -> None:
    """Does the base need the picture, and does it listen? As it is, with a black picture, with another instruction."""
    folder, longer = work / "screen", 250
    roll_out(base, folder / "as-is", protocol.BASE_TASKS, episodes=episodes, max_steps=longer)
    roll_out(base, folder / "blank", protocol.BASE_TASKS, episodes=episodes, max_steps=longer, blank_images=True)
    for task, other in protocol.WRONG_TASK.items():
        roll_out(
            base,
            folder / "wrong" / task,
            (task,),
            episodes=episodes,
            max_steps=longer,
            prompt=INSTRUCTIONS[other],
        )
    roll_out(base, folder / "new-tasks", protocol.NEW_TASKS, episodes=episodes)
