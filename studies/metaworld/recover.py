"""Fine-tuning of a checkpoint on the new tasks, and what it came to."""

import json
import shutil
from pathlib import Path
from typing import Any

from clp_jax.commands.finetune import Finetune
from clp_jax.commands.finetune import run as finetune
from clp_jax.training.logs import LOG_FILE
from studies.metaworld import base, protocol


def recover(work: Path, checkpoint: Path, name: str, *, regime: str, seed: int, steps: int | None = None) -> Path:
    """Fine-tune a checkpoint; what is finished is not done again.

    Args:
      work: the study's folder.
      checkpoint: of the arm.
      name: of the arm; the run is ``work/runs/<regime>/<name>/<seed>``.
      regime: a key of `protocol.REGIMES`.
      seed: of data order, noise and times.
      steps: instead of the regime's.

    Returns:
      The step folder with the fine-tuned parameters.
    """
    steps = steps or protocol.REGIMES[regime].steps
    run = run_folder(work, name, regime, seed)
    step = run / str(steps - 1)
    if (run / "curve.json").exists():
        return step
    stats = base.finished(work) / "assets" / "metaworld" / "norm_stats.json"
    finetune(
        Finetune(
            checkpoint=str(checkpoint),
            data=(str(work / "data" / regime),),
            holdout_data=str(work / "data" / "test"),
            out=str(run),
            steps=steps,
            robot="metaworld",
            norm_stats=str(stats),  # the base's: its weights know these numbers, and a model from nothing gets the same
            asset_id="metaworld",
            action_horizon=protocol.HORIZON,
            max_token_len=protocol.PROMPT_TOKENS,
            batch_size=protocol.BATCH,
            action_samples=protocol.DRAWS,
            peak_lr=protocol.RECOVERY_LR,
            warmup_steps=steps // 10,
            decay_steps=steps,
            decay_lr=protocol.RECOVERY_LR / 10,
            ema_decay=None,  # an average over 100 steps of 150 would still hold the pruned weights
            augment=False,
            log_every=10,
            evaluate_every=protocol.EVALUATE_EVERY,
            evaluate_observations=protocol.TEST_OBSERVATIONS,
            save_every=steps,
            workers=2,
            seed=seed,
            overwrite=run.exists(),
        )
    )
    shutil.rmtree(step / "train_state")  # three times the model, and nobody goes on from here
    (run / "curve.json").write_text(json.dumps(_curve(run), indent=1))
    return step


def run_folder(work: Path, name: str, regime: str, seed: int) -> Path:
    """Where a run is."""
    return work / "runs" / regime / name / str(seed)


def _curve(run: Path) -> dict[str, Any]:
    """Held-out loss by step, and the median time of a step between two log entries without an evaluation."""
    lines = [json.loads(line) for line in (run / LOG_FILE).read_text().splitlines()]
    rates = sorted(line["samples_per_second"] for line in lines if "samples_per_second" in line)
    return {
        "held_out_loss": {line["step"]: line["held_out_loss"] for line in lines if "held_out_loss" in line},
        "loss": {line["step"]: line["loss"] for line in lines if "loss" in line},
        "seconds_per_step": protocol.BATCH / rates[len(rates) // 2],
    }
