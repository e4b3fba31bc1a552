"""What a policy folder that lerobot 0.4 trained says of its robot, beside the weights."""

from etils import epath

from clp_jax.errors import InputError
from clp_jax.processing import policy_files
from clp_jax.processing.norm_stats import NormStats

_STEP = "groot_pack_inputs_v3"
"""The step of its preprocessor that normalises, and knows the embodiment."""


def embodiment_of(folder: epath.Path | None) -> str | None:
    """The tag of the robot that the policy was trained for; None in another folder."""
    steps = [] if folder is None else policy_files.read_steps(folder, policy_files.PREPROCESSOR)
    tags = [step["config"].get("embodiment_tag") for step in steps if step.get("registry_name") == _STEP]
    return tags[0] if tags and isinstance(tags[0], str) else None


def statistics_of(folder: epath.Path) -> dict[str, NormStats] | None:
    """Statistics of ``state`` and ``actions``; None in another folder.

    Raises:
      InputError: the file that holds them is missing or broken, or the policy was trained without normalisation.
    """
    for step in policy_files.read_steps(folder, policy_files.PREPROCESSOR):
        if step.get("registry_name") == _STEP and step["config"].get("normalize_min_max") is False:
            raise InputError(
                f"{folder}/{policy_files.PREPROCESSOR}: the policy was trained on numbers as they are; write a robot "
                'file with an empty state_modes and action_modes, [""], and statistics with clp norm-stats.'
            )
    return policy_files.norm_stats_of(folder, _STEP)
