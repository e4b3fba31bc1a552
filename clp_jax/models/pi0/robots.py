"""Robots that openpi knows, by the cameras of π0.

The mappings are openpi's: LIBERO (policies/libero_policy.py), ALOHA (aloha_policy.py) and DROID (droid_policy.py) at
commit 15a9616, with their data configurations. METAWORLD fits the sets that lerobot publishes.
"""

import dataclasses

from clp_jax.processing.robots import Robot, mask

LIBERO = Robot(
    "libero",
    {"base_0_rgb": "image", "left_wrist_0_rgb": "wrist_image"},
    state=("state",),
    actions=("actions",),
    action_dim=7,
)
"""openpi's LIBERO sets, whose actions are differences already. π0's configurations add a delta; see `conventions`."""

ALOHA = Robot(
    "aloha",
    {
        "base_0_rgb": "observation.images.cam_high",
        "left_wrist_0_rgb": "observation.images.cam_left_wrist",
        "right_wrist_0_rgb": "observation.images.cam_right_wrist",
    },
    delta=mask(6, -1, 6, -1),
    units="aloha",
    action_dim=14,
)
"""Real ALOHA."""

ALOHA_SIM = dataclasses.replace(
    ALOHA,
    name="aloha-sim",
    images={"base_0_rgb": "observation.images.top"},
    delta=(),
    prompt="Transfer cube",
    prompt_from_task=False,
    client={"observation.images.top": "images/cam_high"},
)
"""lerobot's simulated ALOHA sets: one camera, absolute actions and one prompt, whatever the sets' tasks say."""

DROID = Robot(
    "droid",
    {"base_0_rgb": "exterior_image_1_left", "left_wrist_0_rgb": "wrist_image_left"},
    state=("joint_position", "gripper_position"),
    actions=("actions",),
    action_dim=8,
    widths={"joint_position": 7, "gripper_position": 1},
)
"""Own data in DROID's form, with joint velocities as actions."""

METAWORLD = Robot("metaworld", {"base_0_rgb": "observation.image"}, action_dim=4)
"""lerobot's MetaWorld sets: one camera, position and gripper as state and action."""

ROBOTS = {robot.name: robot for robot in (LIBERO, ALOHA, ALOHA_SIM, DROID, METAWORLD)}

UNRECORDED_ROBOTS = ROBOTS | {"aloha-sim": dataclasses.replace(ALOHA_SIM, delta=ALOHA.delta, prompt_from_task=True)}
"""What the names meant to the runs of a clp_jax that did not record their conventions."""
