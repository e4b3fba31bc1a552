"""Fine-tuning of a checkpoint on the new tasks, and what it came to."""

import json
import shutil
from pathlib import Path
from typing import Any

from clp_jax.commands.finetune import Finetune
from clp_jax.commands.finetune import run as finetune
from clp_jax.training.logs import LOG_FILE
from studies.metaworld import protocol


def recover(
    run: Path,
    checkpoint: Path,
    *,
    data: Path,
    held_out: Path,
    stats: str,
    steps: int,
    rate: float,
    seed: int,
    teacher: Path | None = None,
    evaluate_every: int = protocol.EVALUATE_EVERY,
) -> Path:
    """Fine-tune a checkpoint; what is finished is not done again.

    Args:
      run: folder of the run.
      checkpoint: of the arm.
      data: demonstrations to train on.
      held_out: demonstrations of the held-out loss.
      stats: file of the statistics that normalise.
      steps: of the run.
      rate: peak learning rate.
      seed: of data order, noise and times.
      teacher: a fine-tuned model whose output is half of the target.
      evaluate_every: steps between two held-out losses.

    Returns:
      The step folder with the fine-tuned parameters.
    """
    step = run / str(steps - 1)
    if (run / "curve.json").exists():
        return step
    finetune(
        Finetune(
            checkpoint=str(checkpoint),
            data=(str(data),),
            holdout_data=str(held_out),
            out=str(run),
            steps=steps,
            robot="metaworld",
            norm_stats=stats,
            asset_id="metaworld",
            action_horizon=protocol.HORIZON,
            max_token_len=protocol.PROMPT_TOKENS,
            batch_size=protocol.BATCH,
            action_samples=protocol.DRAWS,
            peak_lr=rate,
            warmup_steps=steps // 10,
            decay_steps=steps,
            decay_lr=rate / 10,
            ema_decay=None,  # an average over 100 steps of 150 would still hold the pruned weights
            augment=False,
            teacher=None if teacher is None else str(teacher),
            log_every=10,
            evaluate_every=evaluate_every,
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


def _curve(run: Path) -> dict[str, Any]:
    """Held-out loss by step, and the median time of a step between two log entries without an evaluation."""
    lines = [json.loads(line) for line in (run / LOG_FILE).read_text().splitlines()]
    rates = sorted(line["samples_per_second"] for line in lines if "samples_per_second" in line)
    return {
        "held_out_loss": {line["step"]: line["held_out_loss"] for line in lines if "held_out_loss" in line},
        "loss": {line["step"]: line["loss"] for line in lines if "loss" in line},
        "seconds_per_step": protocol.BATCH / rates[len(rates) // 2],
    }
