"""The conventions of openpi's training configurations by their names (training/config.py at commit 15a9616).

A robot alone does not decide: openpi's configurations of one robot differ in horizon, relative actions and prompt.
The first configuration of a robot and a kind is the one that its name alone stands for.
"""

import dataclasses

from clp_jax.models.pi0.robots import ALOHA, ALOHA_SIM, DROID, LIBERO
from clp_jax.processing.conventions import Configuration, Conventions
from clp_jax.processing.robots import Robot, mask

_TOKENS = {"pi0": 48, "pi05": 200, "pi0_fast": 250}
"""openpi's prompts where a configuration says nothing else."""


def _of(
    kind: str,
    robot: Robot,
    asset_id: str,
    *,
    horizon: int = 50,
    tokens: int | None = None,
    state_in_prompt: bool | None = None,
    prompt: str | None = None,
    trained_from: str = "lerobot",
) -> Configuration:
    if prompt is not None:
        robot = dataclasses.replace(robot, prompt=prompt, prompt_from_task=False)
    spelled = kind != "pi0" if state_in_prompt is None else state_in_prompt
    conventions = Conventions(robot, horizon, tokens or _TOKENS[kind], spelled, asset_id)
    return Configuration(kind, conventions, trained_from)


_LIBERO_EXTRA_DELTA = dataclasses.replace(LIBERO, delta=mask(6, -1))
"""LIBERO's own differences, made relative to the state once more: older checkpoints of π0 learnt them so."""
_DROID_FAST = dataclasses.replace(
    DROID, images={"base_0_rgb": "exterior_image_1_left", "wrist_0_rgb": "wrist_image_left"}
)
_DROID_POSITIONS, _DROID_FAST_POSITIONS = (
    dataclasses.replace(robot, delta=mask(7, -1)) for robot in (DROID, _DROID_FAST)
)
"""DROID with absolute joint positions as actions, not velocities."""
_LIBERO_SET, _SIM_SET = "physical-intelligence/libero", "lerobot/aloha_sim_transfer_cube_human"
_TUPPERWARE = "open the tupperware and put the food on the plate"

_BY_NAME = {
    "pi0_aloha": _of("pi0", ALOHA, "trossen"),
    "pi05_aloha": _of("pi05", ALOHA, "trossen"),
    "pi0_aloha_towel": _of("pi0", ALOHA, "trossen", prompt="fold the towel"),
    "pi0_aloha_tupperware": _of("pi0", ALOHA, "trossen", prompt=_TUPPERWARE),
    "pi0_aloha_pen_uncap": _of("pi0", ALOHA, "trossen", prompt="uncap the pen"),
    "pi05_aloha_pen_uncap": _of("pi05", ALOHA, "trossen", prompt="uncap the pen"),
    "pi0_aloha_sim": _of("pi0", ALOHA_SIM, _SIM_SET),
    "pi0_droid": _of("pi0", DROID, "droid", horizon=10),
    "pi0_fast_droid": _of("pi0_fast", _DROID_FAST, "droid", horizon=10),
    "pi05_droid": _of("pi05", DROID, "droid", horizon=15),
    "pi05_droid_finetune": _of("pi05", DROID, "droid", horizon=16),
    "pi0_libero": _of("pi0", _LIBERO_EXTRA_DELTA, _LIBERO_SET),
    "pi0_libero_low_mem_finetune": _of("pi0", _LIBERO_EXTRA_DELTA, _LIBERO_SET),
    "pi0_fast_libero": _of("pi0_fast", _LIBERO_EXTRA_DELTA, _LIBERO_SET, horizon=10, tokens=180),
    "pi0_fast_libero_low_mem_finetune": _of("pi0_fast", _LIBERO_EXTRA_DELTA, _LIBERO_SET, horizon=10, tokens=180),
    "pi05_libero": _of("pi05", LIBERO, _LIBERO_SET, horizon=10, state_in_prompt=False),
    "pi05_full_droid_finetune": _of("pi05", _DROID_POSITIONS, "droid", horizon=16, trained_from="rlds"),
    "pi0_fast_full_droid_finetune": _of(
        "pi0_fast", _DROID_FAST_POSITIONS, "droid", horizon=16, tokens=180, trained_from="rlds"
    ),
    "pi05_droid_jointpos_polaris": _of("pi05", _DROID_POSITIONS, "droid", horizon=15, trained_from="rlds"),
    "pi0_fast_droid_jointpos_polaris": _of(
        "pi0_fast", _DROID_FAST_POSITIONS, "droid", horizon=10, tokens=180, trained_from="rlds"
    ),
    "pi0_droid_jointpos_polaris": _of("pi0", _DROID_POSITIONS, "droid", horizon=10, tokens=100, trained_from="rlds"),
    "pi0_droid_jointpos_100k_polaris": _of(
        "pi0", _DROID_POSITIONS, "droid", horizon=10, tokens=100, trained_from="rlds"
    ),
}

_CHECKPOINT = "it is a checkpoint and no configuration: name the configuration of your robot, or give --robot"
_MADE_UP = "it trains on made-up observations of no robot"
_TOKENIZER = "its tokenizer of actions is not here"
_UNBUILT = "openpi itself cannot build it since its DroidInputs takes no action_dim"

UNRECORDED_CONFIGURATIONS = {
    **dict.fromkeys(("pi0_base", "pi05_base", "pi0_fast_base"), _CHECKPOINT),
    **dict.fromkeys(("debug", "debug_restore", "debug_pi05"), _MADE_UP),
    **dict.fromkeys(("paligemma_binning_droid", "paligemma_binning_droid_jointpos", "paligemma_vq_droid"), _TOKENIZER),
    **dict.fromkeys(("paligemma_fast_droid", "paligemma_fast_specialist_droid", "paligemma_diffusion_droid"), _UNBUILT),
}
"""Names of openpi's that have no record, and why."""

CONFIGURATIONS = {
    name: dataclasses.replace(found, conventions=dataclasses.replace(found.conventions, config=name))
    for name, found in _BY_NAME.items()
}
