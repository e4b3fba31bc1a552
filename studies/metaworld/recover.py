"""Fine-tuning of every arm on the new tasks, with equal data, steps and settings."""

import json
import shutil
from pathlib import Path

from clp_jax.commands.finetune import Finetune
from clp_jax.commands.finetune import run as finetune
from clp_jax.training.logs import LOG_FILE
from studies.metaworld import protocol


def recover(work: Path, checkpoint: Path, name: str, *, regime: str, seed: int, steps: int | None = None) -> Path:
    """Fine-tune a checkpoint; nothing is done again that is finished.

    Args:
      work: the study's folder.
      checkpoint: of the arm.
      name: of the run below ``work/runs``, e.g. ``scarce/9/clp/0``.
      regime: a key of `protocol.REGIMES`.
      seed: of data order, noise and times.
      steps: instead of the regime's.

    Returns:
      The step folder with the fine-tuned parameters.
    """
    steps = steps or protocol.REGIMES[regime].steps
    run = work / "runs" / name
    step = run / str(steps - 1)
    if (step / "clp.json").exists():
        return step
    finetune(
        Finetune(
            checkpoint=str(checkpoint),
            data=str(work / "data" / regime),
            out=str(run),
            steps=steps,
            robot="metaworld",
            # Of the base: its weights know these numbers. A model from scratch gets the same.
            norm_stats=str(work / "base" / "norm_stats.json"),
            asset_id="metaworld",
            tokenizer=str(work / "tokenizer.model"),
            action_horizon=protocol.HORIZON,
            max_token_len=protocol.PROMPT_TOKENS,
            batch_size=protocol.BATCH,
            action_samples=protocol.DRAWS,
            peak_lr=protocol.RECOVERY_LR,
            warmup_steps=steps // 10,
            decay_steps=steps,
            decay_lr=protocol.RECOVERY_LR / 10,
            ema_decay=None,  # an average over the last hundred steps of a hundred would still hold the pruned weights
            augment=False,
            holdout_ratio=0.0,
            log_every=10,
            evaluate_every=0,
            save_every=steps,
            workers=2,
            seed=seed,
            overwrite=run.exists(),
        )
    )
    shutil.rmtree(step / "train_state")  # three times the model, and nobody goes on from here
    return step


def seconds_per_step(run: Path) -> float:
    """Median over the log of a run, compilation excluded."""
    lines = [json.loads(line) for line in (run / LOG_FILE).read_text().splitlines()]
    rates = sorted(line["samples_per_second"] for line in lines[1:] if "samples_per_second" in line)
    return protocol.BATCH / rates[len(rates) // 2]
