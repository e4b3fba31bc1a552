"""The arithmetic between a robot's numbers and a model's, forth and back, for single observations in NumPy.

Each function does what openpi's transform of the same purpose does (transforms.py, policies/aloha_policy.py and
openpi_client/image_tools.py at commit 15a9616), bit by bit where the recordings reach. Nothing changes its arguments.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Shaped, UInt8

from clp_jax.errors import InputError
from clp_jax.processing.norm_stats import NormStats

_EPSILON = 1e-6


def normalise(x: Float[np.ndarray, "*n d"], stats: NormStats, *, quantiles: bool) -> Float[np.ndarray, "*n d"]:
    """Zero mean and unit deviation, or with ``quantiles`` the 1 % and 99 % quantiles at -1 and 1.

    Args:
      x: at most as many dimensions as the statistics have.
      stats: of the unpadded vector.
      quantiles: π0.5 and π0-FAST use them, π0 does not.
    """
    d = x.shape[-1]
    if not quantiles:
        return (x - stats.mean[:d]) / (stats.std[:d] + _EPSILON)
    q01, q99 = _quantiles(stats)
    return (x - q01[:d]) / (q99[:d] - q01[:d] + _EPSILON) * 2.0 - 1.0


def unnormalise(x: Float[np.ndarray, "*n d"], stats: NormStats, *, quantiles: bool) -> Float[np.ndarray, "*n d"]:
    """The inverse of `normalise`; dimensions beyond the statistics, which are padding, pass through.

    >>> stats = NormStats(np.array([1.0]), np.array([2.0]))
    >>> unnormalise(normalise(np.array([5.0]), stats, quantiles=False), stats, quantiles=False).tolist()
    [5.0]
    """
    d = min(x.shape[-1], len(stats.mean))
    known, padding = x[..., :d], x[..., d:]
    if not quantiles:
        known = known * (stats.std[:d] + _EPSILON) + stats.mean[:d]
    else:
        q01, q99 = _quantiles(stats)
        known = (known + 1.0) / 2.0 * (q99[:d] - q01[:d] + _EPSILON) + q01[:d]
    return np.concatenate([known, padding], axis=-1)


def to_delta(
    actions: Float[np.ndarray, "h adim"], state: Float[np.ndarray, " d"], mask: Sequence[bool]
) -> Float[np.ndarray, "h adim"]:
    """Actions relative to the state where the mask says so; dimensions beyond the mask stay absolute.

    >>> to_delta(np.array([[3.0, 3.0]]), np.array([1.0, 1.0]), [True, False]).tolist()
    [[2.0, 3.0]]
    """
    return actions - _offset(actions, state, mask)


def to_absolute(
    actions: Float[np.ndarray, "h adim"], state: Float[np.ndarray, " d"], mask: Sequence[bool]
) -> Float[np.ndarray, "h adim"]:
    """The inverse of `to_delta`."""
    return actions + _offset(actions, state, mask)


def pad(x: Float[np.ndarray, "*n d"], dim: int) -> Float[np.ndarray, "*n e"]:
    """Zeros after the last dimension, up to the model's ``dim``.

    >>> pad(np.array([1.0]), 3).tolist()
    [1.0, 0.0, 0.0]
    """
    return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, max(0, dim - x.shape[-1]))])


def parse_image(image: Shaped[np.ndarray, "_ _ _"]) -> UInt8[np.ndarray, "h w 3"]:
    """An image as uint8 with channels last, from float in [0, 1] or channels first."""
    if np.issubdtype(image.dtype, np.floating):
        image = (255 * image).astype(np.uint8)
    return np.transpose(image, (1, 2, 0)) if image.shape[0] == 3 else image


def resize_with_pad(image: UInt8[np.ndarray, "_ _ 3"], size: int) -> UInt8[np.ndarray, "size size 3"]:
    """Bilinear resize without distortion into a square, padded with black; the resampling is Pillow's.

    Raises:
      InputError: the image is so long that nothing of its other side would be left.
    """
    from PIL import Image

    height, width = image.shape[:2]
    if (height, width) == (size, size):
        return image
    ratio = max(width / size, height / size)
    new_height, new_width = int(height / ratio), int(width / ratio)
    if min(new_height, new_width) < 1:
        raise InputError(f"an image of {height} x {width} pixels leaves no row or column in a square of {size}.")
    resized = Image.fromarray(image).resize((new_width, new_height), resample=Image.Resampling.BILINEAR)
    top, left = (size - new_height) // 2, (size - new_width) // 2
    square = np.zeros((size, size, 3), np.uint8)
    square[top : top + new_height, left : left + new_width] = np.asarray(resized)
    return square


def aloha_state_to_pi(state: Float[np.ndarray, "*n 14"]) -> Float[np.ndarray, "*n 14"]:
    """ALOHA's joints and grippers in the units of π0's training data: signs flipped, grippers as angles."""
    state = _FLIP * state
    state[..., _GRIPPERS] = _gripper_to_angle(state[..., _GRIPPERS])
    return state


def aloha_actions_to_pi(actions: Float[np.ndarray, "*n 14"]) -> Float[np.ndarray, "*n 14"]:
    """The inverse of `aloha_actions_from_pi`."""
    actions = _FLIP * actions
    actions[..., _GRIPPERS] = actions[..., _GRIPPERS] * (_JOINT_OPEN - _JOINT_CLOSED) + _JOINT_CLOSED - _ANGLE_CLOSED
    return actions


def aloha_actions_from_pi(actions: Float[np.ndarray, "*n 14"]) -> Float[np.ndarray, "*n 14"]:
    """Actions of the model as ALOHA's joints and grippers."""
    actions = _FLIP * actions
    actions[..., _GRIPPERS] = (actions[..., _GRIPPERS] + _ANGLE_CLOSED - _JOINT_CLOSED) / (_JOINT_OPEN - _JOINT_CLOSED)
    return actions


_FLIP = np.array([1, -1, -1, 1, 1, 1, 1, 1, -1, -1, 1, 1, 1, 1])
_GRIPPERS = [6, 13]
# Interbotix' ViperX: finger positions in metres, the linkage in metres, and joint angles in radians.
_POSITION_CLOSED, _POSITION_OPEN = 0.01844, 0.05800
_ARM, _HORN = 0.036, 0.022
_ANGLE_CLOSED, _ANGLE_OPEN = 0.5476, 1.6296
_JOINT_CLOSED, _JOINT_OPEN = -0.6213, 1.4910


def _gripper_to_angle(value: np.ndarray) -> np.ndarray:
    """The share that a gripper is open by position, as the share by angle."""
    position = value * (_POSITION_OPEN - _POSITION_CLOSED) + _POSITION_CLOSED
    sine = (_HORN**2 + position**2 - _ARM**2) / (2 * _HORN * position)
    return (np.arcsin(np.clip(sine, -1.0, 1.0)) - _ANGLE_CLOSED) / (_ANGLE_OPEN - _ANGLE_CLOSED)


def _quantiles(stats: NormStats) -> tuple[np.ndarray, np.ndarray]:
    assert stats.q01 is not None
    assert stats.q99 is not None, "open_dataset and Chain refuse statistics without quantiles where they are needed"
    return stats.q01, stats.q99


def _offset(actions: np.ndarray, state: np.ndarray, mask: Sequence[bool]) -> np.ndarray:
    dims = len(mask)
    offset = np.zeros(actions.shape[-1], state.dtype)
    offset[:dims] = np.where(mask, state[:dims], 0)
    return offset
