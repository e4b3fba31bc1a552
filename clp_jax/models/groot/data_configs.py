"""The data configurations that Isaac-GR00T names (release n1.5, gr00t/experiment/data_config.py), as conventions.

Their robots name parts and videos as a data set's ``meta/modality.json`` does: that file, or a checkpoint's
``metadata.json``, says which columns they are, and which rotations. Their cameras are in the prompt in this order.
"""

from collections.abc import Mapping, Sequence

from clp_jax.processing.conventions import Configuration, Conventions
from clp_jax.processing.robots import Robot

_KIND = "groot_n15"
_HORIZON = 16
_TOKENS, _TOKENS_PER_IMAGE = 64, 264
"""Of a prompt of the released model; another model's are put in their place."""
_TASK, _TASK_OF_ACTION = "annotation.human.task_description", "annotation.human.action.task_description"


def _configuration(
    name: str, cameras: Sequence[str], state: Mapping[str, str], actions: Mapping[str, str], task: str
) -> Configuration:
    """A configuration with the modes of its parts, by the names of the parts."""
    robot = Robot(
        name,
        {f"view_{i}": f"video.{camera}" for i, camera in enumerate(cameras)},
        state=tuple(f"state.{part}" for part in state),
        actions=tuple(f"action.{part}" for part in actions),
        task=task,
        state_modes=tuple(state.values()),
        action_modes=tuple(actions.values()),
        processor="isaac",
    )
    tokens = _TOKENS + _TOKENS_PER_IMAGE * len(cameras)
    return Configuration(
        _KIND, Conventions(robot, _HORIZON, tokens, config=name), upstream="Isaac-GR00T", names_parts=True
    )


def _all(mode: str, *parts: str) -> dict[str, str]:
    return dict.fromkeys(parts, mode)


def _arms(state: Mapping[str, str], actions: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Two arms of a Panda, with what is at their ends."""
    seen = {"arm_eef_pos": "min_max", "arm_eef_quat": ">rotation_6d"} | dict(state)
    done = {"arm_eef_pos": "", "arm_eef_rot": ""} | dict(actions)
    both = [
        {f"{side}_{part}": mode for side in ("right", "left") for part, mode in one.items()} for one in (seen, done)
    ]
    return both[0], both[1]


_GR1 = ("left_arm", "right_arm", "left_hand", "right_hand")
_LEGS = ("left_leg", "right_leg", "waist")
_SO100 = _all("min_max", "single_arm", "gripper")
_AGIBOT = (
    *("left_arm_joint_position", "right_arm_joint_position", "left_effector_position", "right_effector_position"),
    *("head_position", "waist_position"),
)
_WRISTS = ("right_wrist_view", "left_wrist_view")

_GR1_BODY = _all("min_max", *_GR1, "waist", "neck")
_TWIST = ("x", "y", "z", "roll", "pitch", "yaw")
_DELTAS = _all("mean_std", *_TWIST) | _all("min_max", "gripper")

_NAMED = {
    "fourier_gr1_arms_waist": (
        ["ego_view"],
        _all("sin_cos", *_GR1, "waist"),
        _all("min_max", *_GR1, "waist"),
        "annotation.human.coarse_action",
    ),
    "fourier_gr1_arms_only": (["ego_view"], _all("sin_cos", *_GR1), _all("min_max", *_GR1), _TASK_OF_ACTION),
    "fourier_gr1_full_upper_body": (["front_view"], _GR1_BODY, _GR1_BODY, _TASK_OF_ACTION),
    "bimanual_panda_gripper": (
        [*_WRISTS, "front_view"],
        *_arms({"gripper_qpos": "min_max"}, {"gripper_close": "binary"}),
        _TASK_OF_ACTION,
    ),
    "bimanual_panda_hand": ([*_WRISTS, "ego_view"], *_arms({"hand": "min_max"}, {"hand": "min_max"}), _TASK_OF_ACTION),
    "single_panda_gripper": (
        ["left_view", "right_view", "wrist_view"],
        {
            "end_effector_position_relative": "min_max",
            "end_effector_rotation_relative": ">rotation_6d min_max",
            "gripper_qpos": "min_max",
            "base_position": "min_max",
            "base_rotation": ">rotation_6d min_max",
        },
        {
            "end_effector_position": "min_max",
            "end_effector_rotation": "min_max",
            "gripper_close": "binary",
            "base_motion": "min_max",
            "control_mode": "binary",
        },
        _TASK_OF_ACTION,
    ),
    "so100": (["webcam"], _SO100, _SO100, _TASK),
    "so100_dualcam": (["front", "wrist"], _SO100, _SO100, _TASK),
    "unitree_g1": (["rs_view"], _all("min_max", *_GR1), _all("min_max", *_GR1), _TASK),
    "unitree_g1_full_body": (["rs_view"], _all("min_max", *_LEGS, *_GR1), _all("min_max", *_GR1), _TASK),
    "oxe_droid": (
        ["exterior_image_1", "exterior_image_2", "wrist_image"],
        {"eef_position": "min_max", "eef_rotation": ">rotation_6d", "gripper_position": "min_max"},
        {"eef_position_delta": "", "eef_rotation_delta": ">axis_angle", "gripper_position": "binary"},
        "annotation.language.language_instruction",
    ),
    "agibot_genie1": (
        ["top_head", "hand_left", "hand_right"],
        _all("min_max", *_AGIBOT),
        _all("min_max", *_AGIBOT, "robot_velocity"),
        "annotation.language.action_text",
    ),
    "examples.Libero.custom_data_config:LiberoDataConfig": (
        ["image", "wrist_image"],
        _all("min_max", *_TWIST, "gripper"),
        _all("min_max", *_TWIST, "gripper"),
        _TASK_OF_ACTION,
    ),
    "examples.Libero.custom_data_config:LiberoDataConfigMeanStd": (
        ["image", "wrist_image"],
        _all("min_max", *_TWIST, "gripper"),
        _DELTAS,
        _TASK_OF_ACTION,
    ),
    "examples.SimplerEnv.custom_data_config:FractalDataConfig": (
        ["image"],
        _all("min_max", "x", "y", "z", "rx", "ry", "rz", "rw", "gripper"),
        _DELTAS,
        _TASK_OF_ACTION,
    ),
    "examples.SimplerEnv.custom_data_config:BridgeDataConfig": (
        ["image_0"],
        _all("min_max", *_TWIST, "pad", "gripper"),
        _all("min_max", *_TWIST, "gripper"),
        _TASK_OF_ACTION,
    ),
}
"""By name: cameras, parts of the state and of the actions with their modes, and where a row's instruction is."""

CONFIGURATIONS = {name: _configuration(name, *entry) for name, entry in _NAMED.items()}
