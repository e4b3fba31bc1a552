"""The embedded example: a small π0 that knows ten MetaWorld tasks, and six demonstrations of an eleventh.

And observations of nine of the ten, for who does not want to train.

2 M parameters in bfloat16; ``studies/metaworld`` trained it and shows how.
"""

from pathlib import Path

from clp_jax.checkpoint import read_spec
from clp_jax.data import CalibrationData, open_dataset
from clp_jax.loading import read_architecture
from clp_jax.models import robots
from clp_jax.processing import norm_stats
from clp_jax.processing.tokenizer import load_tokenizer

FOLDER = Path(__file__).resolve().parent
CHECKPOINT, DEMONSTRATIONS = str(FOLDER / "checkpoint"), str(FOLDER / "demonstrations")
BASE_OBSERVATIONS = str(FOLDER / "base_tasks.npz")
ROBOT, TASK, IMAGE_SIZE = "metaworld", "faucet-open", 84
HORIZON, PROMPT_TOKENS = 8, 12


def observations(most: int, demonstrations: str = DEMONSTRATIONS) -> CalibrationData:
    """Observations of the demonstrations with fixed noise and times, normalised as in pre-training.

    Args:
      most: at most so many.
      demonstrations: another data set of the same robot.
    """
    spec = read_spec(CHECKPOINT)
    assert spec.assets is not None
    data = open_dataset(
        demonstrations,
        read_architecture(spec),
        robot=robots()[ROBOT],
        tokenizer=load_tokenizer(None, assets=spec.assets),
        norm_stats=norm_stats.load(spec.assets / ROBOT / norm_stats.FILE),
        action_horizon=HORIZON,
        max_token_len=PROMPT_TOKENS,
    )
    return data.calibration(most)
