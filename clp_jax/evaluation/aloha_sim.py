"""gym-aloha with the conventions of openpi's client (examples/aloha_sim at commit 15a9616).

The camera above the table, 640 x 480, resized to 224 with black bars and channels first; as state both arms' joints
and grippers; no instruction, for the server has one; ten actions before the policy is asked again. Starts are openpi's:
of a seed the same sequence. The simulator draws three cameras at every step, a third of a second; here one is drawn
when the policy is asked.
"""

import functools
import importlib
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from clp_jax.errors import InputError
from clp_jax.evaluation.gymnasium_env import GymnasiumEnvironment
from clp_jax.evaluation.rendering import Renderer, draws_fast, import_mujoco, named_camera
from clp_jax.evaluation.suite import Asked, Suite

TASKS = {"transfer-cube": "transfer_cube", "insertion": "insertion"}
"""Names of tasks, and the simulator's."""
MAX_STEPS = 300
FPS = 50
_HEIGHT = 480
_SENT_SIZE = 224
_REPLAN = 10
_MEMORY = 2**29
_UNDRAWN = np.zeros((1, 1, 3), np.uint8)


def suite(asked: Asked) -> Suite:
    """The tasks of simulated ALOHA, by default the cube, as for openpi's published policy.

    Raises:
      InputError: no such task.
    """
    tasks = tuple(dict.fromkeys(asked.tasks)) or ("transfer-cube",)
    unknown = [task for task in tasks if task not in TASKS]
    if unknown:
        raise InputError(f"simulated ALOHA has no task {', '.join(unknown)}; it has {', '.join(TASKS)}.")
    make = functools.partial(
        AlohaSim,
        seed=asked.seed,
        max_steps=asked.max_steps or MAX_STEPS,
        height=asked.image_size or _HEIGHT,
        fast=asked.fast,
    )
    needs = dict.fromkeys(("mujoco", "gym_aloha"), 'pip install "clp-jax[aloha-sim]"')
    return Suite("aloha-sim", tasks, make, replan=_REPLAN, memory=_MEMORY, robot="aloha-sim", needs=needs)


class AlohaSim(GymnasiumEnvironment):
    """One task.

    Args:
      task: one of `TASKS`.
      seed: of the starts.
      max_steps: actions of an episode.
      height: pixels of a rendered picture's height, three quarters of its width.
      fast: draw without shadows, which are large in this scene, and with coarse meshes.

    Raises:
      InputError: gym-aloha or its renderer is missing.
    """

    def __init__(
        self, task: str, *, seed: int = 0, max_steps: int = MAX_STEPS, height: int = _HEIGHT, fast: bool = False
    ):
        import_mujoco()  # before dm_control does, so that it draws in memory
        try:
            module, control = (importlib.import_module(name) for name in ("gym_aloha.env", "dm_control.rl.control"))
        except ImportError as error:
            raise InputError(f'gym-aloha is not installed ({error}); pip install "clp-jax[aloha-sim]".') from error
        env = module.AlohaEnv(TASKS[task], obs_type="pixels_agent_pos")
        env._env.task.get_observation = lambda physics: {
            "qpos": env._env.task.get_qpos(physics),
            "images": {"top": _UNDRAWN},
        }
        super().__init__(env, task, seed=seed, max_steps=max_steps)
        self.fps, self.draws_fast = FPS, draws_fast(fast=fast)
        self._broken: type[Exception] = control.PhysicsError
        self._physics = env._env.physics
        model = self._physics.model.ptr
        self._renderer = Renderer(model, (height, height * 4 // 3), fast=fast)
        self._camera = named_camera(model, "top")

    def start_seed(self, episode: int) -> int:
        """The seed with which openpi's client resets in its place; the task does not matter."""
        rng = np.random.default_rng(self._seed)
        return [int(rng.integers(2**32 - 1)) for _ in range(episode + 1)][-1]

    def step(self, action: Float[np.ndarray, " d"]) -> bool:
        """Do an action; whether the task is solved. An action under which the simulation breaks ends the episode.

        Raises:
          InputError: it has not fourteen dimensions.
        """
        try:
            return super().step(action)
        except self._broken:
            self.over = True
            return False

    def picture(self) -> UInt8[np.ndarray, "h w 3"]:
        """What the camera above the table sees."""
        return self._renderer(self._physics.data.ptr, self._camera)

    def request(self) -> dict[str, Any]:
        """What a policy is asked, by the keys of openpi's client."""
        picture = with_bars(self.picture(), _SENT_SIZE)
        return {"state": self._seen["agent_pos"], "images": {"cam_high": np.moveaxis(picture, 2, 0)}}

    def close(self) -> None:
        """Free the renderer."""
        self._renderer.close()


def with_bars(picture: UInt8[np.ndarray, "h w 3"], size: int) -> UInt8[np.ndarray, "size size 3"]:
    """A picture at its own proportions in the middle of a black square; rounded as openpi's client rounds.

    >>> with_bars(np.full((480, 640, 3), 9, np.uint8), 224)[:, 0, 0].nonzero()[0].tolist() == list(range(28, 196))
    True
    """
    from PIL import Image

    height, width = picture.shape[:2]
    ratio = max(height, width) / size
    inner = Image.fromarray(picture).resize((int(width / ratio), int(height / ratio)), Image.Resampling.BILINEAR)
    square = Image.new("RGB", (size, size))
    square.paste(inner, ((size - inner.width) // 2, (size - inner.height) // 2))
    return np.asarray(square)
