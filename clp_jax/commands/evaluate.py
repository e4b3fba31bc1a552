"""``clp evaluate``: let a policy act in a simulator. With ``--server`` nothing here imports JAX."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from clp_jax.commands.evaluate_output import show, show_comparison
from clp_jax.commands.evaluate_playing import play_all
from clp_jax.commands.evaluate_policy import SHARED, check_there
from clp_jax.commands.model_flags import ModelFlags
from clp_jax.commands.processing_flags import ProcessingFlags
from clp_jax.commands.results import print_json, standard_output_kept
from clp_jax.commands.unused import refuse_unused
from clp_jax.editable_json import write_json
from clp_jax.errors import InputError
from clp_jax.evaluation import aloha_sim, gymnasium_env, libero, metaworld, simpler
from clp_jax.evaluation.comparison import check_comparable, compare
from clp_jax.evaluation.pictures import save_page_of_two
from clp_jax.evaluation.saving import AGAINST, COMPARISON, FILMS, RESULTS, SETTINGS
from clp_jax.evaluation.suite import Asked, Suite
from clp_jax.files import read_json_object

_SUITES = {
    "metaworld": metaworld.suite,
    "libero": libero.suite,
    "aloha-sim": aloha_sim.suite,
    "simpler": simpler.suite,
}
_READ_BY = {
    "libero_suite": ("libero",),
    "image_size": tuple(_SUITES),
    "fast_rendering": ("libero", "aloha-sim"),
    "rotation": ("simpler",),
}
"""Simulators that a flag is for, where it is not for all."""
_ADDRESS = re.compile(r"wss?://.+|[\w.-]+:\d+")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate(ProcessingFlags, ModelFlags):
    """Let a checkpoint, or the policy behind a server, act in a simulator, and count successes.

    Episodes start the same in every run: objects and noise are decided by task, --seed and number of the episode. Each
    is saved when it ends; a killed run goes on with the same flags and --resume.
    """

    suite: Literal["metaworld", "libero", "aloha-sim", "simpler"] | None = None
    """Simulator (simpler: SimplerEnv's WidowX tasks); libero lives in an environment of its own, so its policy is a
    --server."""
    env: str | None = None
    """MODULE:FACTORY of any other Gymnasium environment instead; its observations are the requests, by its own keys."""
    out: str
    """Folder to create: episodes.jsonl, results.json, and per task a page of pictures."""
    checkpoint: str | None = None
    """openpi checkpoint to run in this process: step folder or its params."""
    server: str | None = None
    """HOST:PORT of clp serve or of openpi's server, instead of a checkpoint."""
    against: str | None = None
    """Second policy to compare with over the same episodes: an --out of clp evaluate, a checkpoint, or HOST:PORT."""
    tasks: tuple[str, ...] = ()
    """MetaWorld: names as drawer-open, or the word all. LIBERO: numbers within the suite; all if absent. ALOHA:
    transfer-cube, insertion; the cube if absent. SimplerEnv: carrot, spoon, stack, eggplant; all if absent. --env: what
    the factory is called with; nothing if absent."""
    libero_suite: str = "libero_spatial"
    """LIBERO: libero_spatial, libero_object, libero_goal, libero_10 or libero_90; LIBERO-PRO's as libero_goal_swap."""
    episodes: int = 20
    """Episodes a task."""
    seed: int = 1
    """Random seed of places and noise; give another one than that of the training data."""
    replan: int | None = None
    """Actions done before the policy is asked again; 5 if absent, 10 for ALOHA."""
    max_steps: int | None = None
    """Actions after which an episode has failed; 500 for MetaWorld, 300 for ALOHA, 60 for SimplerEnv (eggplant: 120),
    openpi's of the suite for LIBERO."""
    processes: int | None = None
    """Simulators at a time, who waits for the policy is answered together; if absent one a core and at least four, as
    far as memory goes."""
    image_size: int | None = None
    """Pixels of a picture's height: 64 for MetaWorld, as in training; 256 for LIBERO and 480 for ALOHA, sent as 224;
    SimplerEnv: as it is sent, 224."""
    fast_rendering: bool = False
    """LIBERO, ALOHA: without shadows and with coarse meshes, for CPUs; not what published policies saw."""
    rotation: simpler.Rotation = "euler"
    """SimplerEnv: what the policy's rotations are; axis-angle for policies made for the first SimplerEnv."""
    blank_images: bool = False
    """Send black pictures, to see whether the task needs them."""
    filmed: int = 4
    """Episodes a task on its page of pictures, and as videos: a picture of every action; of every request in LIBERO and
    ALOHA without --fast-rendering or MUJOCO_GL=egl."""
    resume: bool = False
    """Go on with the evaluation in --out; episodes and tasks may be more than before."""
    json: bool = False
    """Print JSON instead of tables: what results.json holds, and the comparison with --against."""
    overwrite: bool = False
    """Replace an existing output."""

    openpi_config: str | None = None
    """With a checkpoint: name of openpi's training configuration, where the checkpoint does not record how it was
    trained."""
    robot: str | None = None
    """With a checkpoint: a .json file instead of the suite's robot; a SmolVLA's is its own config.json's."""
    num_steps: int | None = None
    """With a checkpoint: Euler steps from noise to actions; the model's own number if absent (10 in openpi)."""
    dtype: str | None = None
    """With a checkpoint: activations, float32 or bfloat16; if absent bfloat16, on CPUs float32."""
    params_dtype: Literal["keep", "bfloat16"] = "keep"
    """With a checkpoint: parameters as stored, or bfloat16."""

    # These say something else where there is no data set.
    prompt: str | None = None
    """Instruction instead of every task's own: a wrong one tells whether the policy listens."""
    norm_stats: str | None = None
    """With a checkpoint: a norm_stats.json; else the checkpoint's."""
    asset_id: str | None = None
    """With a checkpoint: which of the statistics in its assets."""


def run(config: Evaluate) -> None:
    """Run the command."""
    check(config)
    with standard_output_kept(for_json=config.json):  # some simulators talk
        result = _run(config, Console())
    if config.json:
        print_json(result)


def _run(config: Evaluate, console: Console) -> dict[str, Any]:
    """Play, save and show; what is saved is returned, with the comparison if there is one."""
    suite = open_suite(config)
    suite.check_installed()
    suite.check_episodes(config.episodes)
    other = None if config.against is None else _other(config, suite)
    result = play_all(suite, config)
    show(result, console)
    if other is None:
        return result
    if isinstance(other, Evaluate):
        second, folder = play_all(suite, other), Path(other.out)
        show(second, console)
    else:
        second, folder = other, Path(str(config.against)).expanduser()
    found, out = compare(result, second), Path(config.out).expanduser()
    write_json(out / COMPARISON, found | {"against": config.against})
    for task in suite.tasks:
        save_page_of_two((out / FILMS, folder / FILMS), task, out / f"{task}-{AGAINST}.png")
    show_comparison(found, (config.checkpoint or str(config.server), str(config.against)), console)
    return result | {"comparison": found | {"against": config.against}}


def check(config: Evaluate) -> None:
    """Raise on flags that contradict each other.

    Raises:
      InputError: says which.
    """
    if (config.suite is None) == (config.env is None):
        raise InputError("give either --suite, or --env MODULE:FACTORY of another simulator.")
    if (config.checkpoint is None) == (config.server is None):
        raise InputError("give either --checkpoint, or --server HOST:PORT of a running clp serve.")
    if config.suite == "libero" and config.server is None:
        raise InputError("LIBERO needs an environment of its own: clp serve the checkpoint, and give --server here.")
    if config.server is not None:
        names = {*SHARED, "openpi_config", "robot", "num_steps", "dtype", "params_dtype"} - {"prompt"}
        refuse_unused(config, names, "nothing here changes a server", instead="give {it} to clp serve")
    _refuse_flags_of_other_simulators(config)


def _refuse_flags_of_other_simulators(config: Evaluate) -> None:
    names = [name for name, suites in _READ_BY.items() if config.suite not in suites]
    if config.suite is None:
        refuse_unused(config, names, "--env is made without {it}", instead="let the factory make what you want")
    refuse_unused(config, names, f"nothing in --suite {config.suite} depends on {{it}}")


def open_suite(config: Evaluate) -> Suite:
    """The simulator and the tasks that the flags name.

    Raises:
      InputError: there is no such task, or a flag is not for this simulator.
    """
    asked = Asked(
        tasks=config.tasks,
        seed=config.seed,
        max_steps=config.max_steps,
        image_size=config.image_size,
        fast=config.fast_rendering,
        part=config.libero_suite,
        rotation=config.rotation,
    )
    if config.env is not None:
        return gymnasium_env.suite(config.env, asked)
    assert config.suite is not None
    return _SUITES[config.suite](asked)


def _other(config: Evaluate, suite: Suite) -> "Evaluate | Mapping[str, Any]":
    """The evaluation of the second policy: its saved results, or flags to make them with."""
    assert config.against is not None
    folder = Path(config.against).expanduser()
    if (folder / RESULTS).exists():
        saved = read_json_object(folder / RESULTS)
        mine = {"suite": suite.name, "flags": dataclasses.asdict(config), "tasks": suite.tasks}
        check_comparable(mine, saved, config.against)
        return saved
    if (folder / SETTINGS).exists():
        raise InputError(f"--against {config.against} is an unfinished evaluation; go on with its --resume first.")
    place = {"server": config.against} if _ADDRESS.fullmatch(config.against) else {"checkpoint": config.against}
    out = str(Path(config.out) / AGAINST)
    other = dataclasses.replace(
        config, **{"server": None, "checkpoint": None} | place, out=out, against=None, overwrite=False
    )
    check(other)
    check_there(other)
    return other
