"""``clp demo``: from analysis to rollouts on the embedded example, a small π0 that was really trained."""

import dataclasses
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from etils import epath
from rich.console import Console
from rich.markup import escape

from clp_jax import example
from clp_jax.aliases import Array
from clp_jax.commands import analyse as analyse_command
from clp_jax.commands import evaluate as evaluate_command
from clp_jax.commands import finetune as finetune_command
from clp_jax.commands import prune as prune_command
from clp_jax.commands.unused import refuse_unused
from clp_jax.errors import InputError
from clp_jax.loading import LoadedModel, load_model
from clp_jax.models import Gates, build, family_of
from clp_jax.outputs import check_own, sign, writable
from clp_jax.plan import PrunePlan
from clp_jax.sensitivity import open_gates, plan_gates

_DATA_FLAGS = {
    "robot": example.ROBOT,
    "norm_stats": None,
    "action_horizon": example.HORIZON,
    "max_token_len": example.PROMPT_TOKENS,
}
_HEALED_BLOCKS = "0,1,2,3,4,5,6,7,8,11,15,17"
"""What ``--criterion healed`` chose for 12 blocks (docs/healing.md), which takes minutes."""
_HEALED_TASKS = ("drawer-open", "window-open", "door-lock", "button-press-topdown", "coffee-button")
_REPEATS = 5
_BY = "clp demo"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demo:
    """Analyse, prune, fine-tune and roll out the embedded example."""

    out: str = "clp-demo"
    """Folder for everything that is made; replaced if it exists."""
    keep_layers: int = 9
    """Blocks of 18 that stay."""
    steps: int = 40
    """Steps of fine-tuning."""
    episodes: int = 8
    """Rollouts of a task in MetaWorld, if it is installed."""
    rollouts: bool = True
    """Whether there are any."""
    heal: bool = False
    """Instead of that: cut a third of the blocks, heal what stays, and let both cuts do five of the base's tasks."""


def run(config: Demo) -> None:
    """Run the command."""
    if config.heal:
        refuse_unused(config, ("keep_layers", "steps"), "--heal has blocks of its own and trains nothing")
    if not config.rollouts:
        refuse_unused(config, ("episodes",), "--no-rollouts leaves out what it counts")
    _compile_fast()
    console, out = Console(), Path(config.out)
    _make_room(epath.Path(out))
    if config.heal:
        _heal(console, out, config.episodes if config.rollouts else 0)
        return
    analysis, pruned, run_folder = str(out / "analysis"), str(out / f"pruned-{config.keep_layers}"), out / "run"
    data = "--data DEMONSTRATIONS --robot metaworld"
    console.rule("clp demo: a π0 of 2 M parameters, trained on ten MetaWorld tasks, learns an eleventh at half depth")

    _say(console, f"clp analyse --checkpoint BASE {data} --keep-layers {config.keep_layers} --out {analysis}")
    analyse_command.run(
        analyse_command.Analyse(
            checkpoint=example.CHECKPOINT,
            data=(example.DEMONSTRATIONS,),
            out=analysis,
            keep_layers=(str(config.keep_layers),),
            max_observations=64,
            compare=tuple(name for name in analyse_command.Analyse.compare if name != "gateprobe"),
            **_DATA_FLAGS,
        )
    )
    _say(console, f"clp prune --checkpoint BASE --analysis {analysis} --out {pruned}")
    prune_command.run(prune_command.Prune(checkpoint=example.CHECKPOINT, analysis=analysis, out=pruned))
    compare(console, load_model(example.CHECKPOINT), load_model(pruned), PrunePlan.load(Path(analysis) / "plan.json"))

    _say(console, f"clp finetune --checkpoint {pruned} {data} --steps {config.steps} --out {run_folder}")
    finetune_command.run(_finetuning(pruned, str(run_folder), config.steps))
    if config.rollouts:
        _say(
            console,
            f"clp evaluate --suite metaworld --tasks {example.TASK} --checkpoint {run_folder}/{config.steps - 1}",
        )
        last = str(run_folder / str(config.steps - 1))
        _roll_out(console, last, out / "rollouts", tasks=(example.TASK,), episodes=config.episodes)


def _heal(console: Console, out: Path, episodes: int) -> None:
    """Two cuts of the same blocks, one of them repaired; nothing is trained."""
    console.rule("clp demo --heal: the same π0 loses a third of its blocks and does its own tasks, without training")
    cut, healed = str(out / "cut"), str(out / "healed")
    kept = f"clp prune --checkpoint BASE --keep {_HEALED_BLOCKS}"
    _say(console, f"{kept} --out {cut}")
    prune_command.run(prune_command.Prune(checkpoint=example.CHECKPOINT, keep=(_HEALED_BLOCKS,), out=cut))
    _say(console, f"{kept} --heal --data OBSERVATIONS --out {healed}")
    prune_command.run(
        prune_command.Prune(
            checkpoint=example.CHECKPOINT,
            keep=(_HEALED_BLOCKS,),
            heal=True,
            data=(example.BASE_OBSERVATIONS,),
            groups_per_batch=8,
            out=healed,
        )
    )
    if episodes:
        for name, checkpoint in {"cut": cut, "healed": healed}.items():
            _say(console, f"clp evaluate --suite metaworld --checkpoint {checkpoint} --tasks {' '.join(_HEALED_TASKS)}")
            _roll_out(
                console,
                checkpoint,
                out / f"rollouts-{name}",
                tasks=_HEALED_TASKS,
                episodes=episodes,
                replan=example.HORIZON // 2,
                action_horizon=example.HORIZON,
                max_token_len=example.PROMPT_TOKENS,
            )


def _compile_fast() -> None:
    """Less optimisation by the compiler, which is half of the wait; programs as small as these run as fast."""
    flags, name = os.environ.get("XLA_FLAGS", ""), "--xla_backend_optimization_level"
    if name not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {name}=1".strip()


def _make_room(out: epath.Path) -> None:
    """An empty folder in the place of an earlier demo's."""
    with writable(out):
        if os.path.lexists(out):
            check_own(out, _BY, names=r"analysis|pruned-\d+|run|cut|healed|rollouts(-cut|-healed)?")
            out.rmtree()
        out.mkdir(parents=True)
        sign(out, _BY)


def _say(console: Console, command: str) -> None:
    console.print(f"\n[bold]$ {escape(command)}[/]", soft_wrap=True)


def _finetuning(checkpoint: str, out: str, steps: int) -> finetune_command.Finetune:
    return finetune_command.Finetune(
        checkpoint=checkpoint,
        data=(example.DEMONSTRATIONS,),
        out=out,
        steps=steps,
        batch_size=16,
        action_samples=2,
        peak_lr=1e-3,
        warmup_steps=max(1, steps // 10),
        decay_steps=steps,
        decay_lr=1e-4,
        ema_decay=None,
        augment=False,
        holdout_ratio=0.17,
        log_every=20,
        evaluate_every=20,
        save_every=steps,
        workers=2,
        **_DATA_FLAGS,
    )


def _roll_out(console: Console, checkpoint: str, out: Path, *, tasks: tuple[str, ...], **flags: int) -> None:
    """Rollouts where there is a simulator; else one line about what is missing."""
    try:
        evaluate_command.run(
            evaluate_command.Evaluate(
                suite="metaworld",
                checkpoint=checkpoint,
                out=str(out),
                tasks=tasks,
                image_size=example.IMAGE_SIZE,
                max_steps=200,
                processes=2,
                **flags,
            )
        )
    except InputError as error:
        console.print(f"[yellow]no rollouts:[/] {escape(str(error))}")
    else:
        console.print(f"Pictures of them: [bold]{escape(str(out))}/{tasks[0]}.png[/]")


def compare(console: Console, full: LoadedModel, pruned: LoadedModel, plan: PrunePlan) -> None:
    """Check the pruned checkpoint against the full model with gates, and time both."""
    some = example.observations(4)
    inputs, noise = some.arrays, some.arrays["noise"]

    def sampler(model: LoadedModel) -> Callable[[Gates], Array]:
        family, module = family_of(model.architecture), build(model.architecture)
        steps = family.num_steps(model.architecture)
        sample = jax.jit(
            lambda params, inputs, noise, gates: family.sample(
                module, params, inputs, noise=noise, num_steps=steps, gates=gates
            )
        )
        return lambda gates: jax.block_until_ready(sample(model.params, inputs, noise, gates))

    sample_full, sample_pruned = sampler(full), sampler(pruned)
    none_of_full, none_of_pruned = open_gates(full.architecture), open_gates(pruned.architecture)
    gated, cut = sample_full(plan_gates(full.architecture, plan)), sample_pruned(none_of_pruned)
    difference = float(np.abs(np.asarray(gated) - np.asarray(cut)).max())
    console.print(
        "Pruned checkpoint, loaded again, against the full model with those blocks switched off: "
        f"actions differ by {difference:.1e} at most"
    )
    times: dict[str, list[float]] = {"full": [], "pruned": []}
    for _ in range(_REPEATS):
        for name, sample, gates in (("full", sample_full, none_of_full), ("pruned", sample_pruned, none_of_pruned)):
            start = time.perf_counter()
            sample(gates)
            times[name].append(time.perf_counter() - start)
    full_ms, pruned_ms = (1e3 * statistics.median(times[name]) for name in ("full", "pruned"))
    console.print(
        f"Sampling 4 action chunks, median of {_REPEATS} on {jax.devices()[0].device_kind}: "
        f"{full_ms:.0f} ms -> {pruned_ms:.0f} ms ({pruned_ms / full_ms:.0%})"
    )
