"""Rotations as vectors, in the representations that Isaac-GR00T's data sets and configurations name.

Quaternions begin with the real part. Euler angles turn about the axes of the moving frame in the order of the letters:
roll about x, pitch about y, yaw about z. The six dimensions are the first two rows of the matrix.
"""

import itertools
from typing import Any

import numpy as np
from jaxtyping import Float

from clp_jax.errors import InputError

_EULER = {f"euler_angles_{''.join(order)}": "".join(order) for order in itertools.permutations("rpy")}
_AXES = str.maketrans("rpy", "XYZ")

WIDTHS = {"quaternion": 4, "axis_angle": 3, "rotation_6d": 6, **dict.fromkeys(_EULER, 3)}
"""Dimensions of a rotation in each representation."""


def converted(x: Float[np.ndarray, "*n d"], source: str, target: str) -> Float[np.ndarray, "*n e"]:
    """The same rotations in another representation, in float32.

    Args:
      x: rotations; quaternions and six dimensions of any length.
      source: their representation, of `WIDTHS`.
      target: that of the result.

    Raises:
      InputError: a quaternion of zeros, which is no rotation.

    >>> converted(np.array([1.0, 0.0, 0.0, 0.0]), "quaternion", "rotation_6d").tolist()
    [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    """
    rotations = _rotations(x.reshape(-1, x.shape[-1]).astype(np.float64), source)
    return _vectors(rotations, target).reshape(*x.shape[:-1], -1).astype(np.float32)


def _rotations(x: Float[np.ndarray, "n d"], source: str) -> Any:
    from scipy.spatial.transform import Rotation  # a fifth of the time that a command takes to start

    if source == "quaternion":
        if not x.any(axis=-1).all():
            raise InputError("a quaternion of zeros is no rotation; repair or leave out its episode.")
        return Rotation.from_quat(np.roll(x, -1, axis=-1))
    if source == "axis_angle":
        return Rotation.from_rotvec(x)
    if source == "rotation_6d":
        first, second = _unit(x[:, :3]), x[:, 3:]
        second = _unit(second - (first * second).sum(axis=-1, keepdims=True) * first)
        return Rotation.from_matrix(np.stack([first, second, np.cross(first, second)], axis=-2))
    return Rotation.from_euler(_EULER[source].translate(_AXES), x)


def _vectors(rotations: Any, target: str) -> Float[np.ndarray, "n d"]:
    if target == "quaternion":
        return np.roll(rotations.as_quat(canonical=True), 1, axis=-1)
    if target == "axis_angle":
        return rotations.as_rotvec()
    if target == "rotation_6d":
        return rotations.as_matrix()[:, :2].reshape(-1, 6)
    return rotations.as_euler(_EULER[target].translate(_AXES))


def _unit(x: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)
