"""A LeRobot data set seen as a robot: its columns by meaning, and observations for a model."""

import dataclasses
import os
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from clp_jax.data.identity import fingerprint_of_pictures, fingerprint_of_rows
from clp_jax.data.lerobot import LeRobotData
from clp_jax.data.lerobot_meta import described, find_folder, read_meta
from clp_jax.data.loader import Read
from clp_jax.data.proof import Proof, prove
from clp_jax.data.training_data import Video
from clp_jax.errors import InputError
from clp_jax.models.family import Processing, over_long
from clp_jax.processing.columns import join
from clp_jax.processing.robots import Robot


@dataclasses.dataclass(frozen=True)
class Recording:
    """What a robot recorded.

    Attributes:
      source: where it was opened.
      data: the rows.
      robot: with the dimensions of this data set's columns and actions.
      asset_id: the hub id, or the folder's name.
      state: of each row, in the robot's units [n, d].
      actions: of each row, in the robot's units [n, adim].
      proof: that the rows and pictures are whole; its notes are for the user to see.
    """

    source: str
    data: LeRobotData
    robot: Robot
    asset_id: str
    state: Float[np.ndarray, "n d"]
    actions: Float[np.ndarray, "n adim"]
    proof: Proof

    @property
    def episodes(self) -> Int[np.ndarray, " n"]:
        """The episode of each row."""
        return self.data.episodes

    def reader(self, processing: Processing) -> Read:
        """What reads rows as a model's inputs, with ``action_is_pad``; for use by several threads.

        Args:
          processing: between the robot and the model.

        Raises:
          InputError: a row has no task and the robot has no prompt, or a camera has pictures of several sizes that the
            model does not make alike.
        """
        self._check_fits(processing)
        self._check_sizes(processing)
        numbers, texts = self._prompts()

        def observation(row: int) -> dict[str, np.ndarray]:
            chunk, is_pad = self.data.chunk(row, processing.action_horizon)
            images = {camera: self.data.image(key, row) for camera, key in self.robot.images.items()}
            inputs = processing.inputs(
                state=self.state[row], images=images, prompt=texts[numbers[row]], actions=self.actions[chunk]
            )
            return inputs | {"action_is_pad": is_pad}

        def read(rows: np.ndarray) -> dict[str, np.ndarray]:
            observations = [observation(int(row)) for row in rows]
            return {key: np.stack([values[key] for values in observations]) for key in observations[0]}

        return read

    def over_long(self, processing: Processing) -> tuple[str, ...]:
        """A phrase for each prompt of which the model would not read the end."""
        texts = dict.fromkeys(self._prompts()[1].values())
        found = (over_long(processing, text, self.state.shape[1]) for text in texts)
        return tuple(phrase for phrase in found if phrase is not None)

    def fingerprint(self) -> str:
        """An identity of the rows: numbers, episodes and texts of tasks, whatever files they are in."""
        return fingerprint_of_rows(self.data, (self.state, self.actions), self.robot.task)

    def video_fingerprint(self) -> str:
        """An identity of the videos and pictures that the robot's cameras read."""
        return fingerprint_of_pictures(self.proof.pictures)

    def videos(self) -> dict[str, Video]:
        """Per camera of the model the smallest size of its pictures, and how many a second."""
        keys = self.robot.images.items()
        return {camera: Video(*min(self.proof.sizes[key]), self.data.meta.fps) for camera, key in keys}

    def _prompts(self) -> tuple[Int[np.ndarray, " n"], dict[int, str]]:
        """The task number of each row, and the prompt of each task that occurs."""
        numbers = self.data.numbers(self.robot.task)[0][:, 0].astype(np.int64)
        tasks = self.data.meta.tasks if self.robot.prompt_from_task else {}
        texts = {int(n): tasks.get(int(n)) or self.robot.prompt for n in np.unique(numbers)}
        nameless = [number for number, text in texts.items() if text is None]
        if nameless:
            raise InputError(f"the data set has no text for task {nameless[0]}; give --prompt.")
        return numbers, {number: text or "" for number, text in texts.items()}

    def _check_sizes(self, processing: Processing) -> None:
        """Pictures of one batch must be of one size in the end: some models resize them themselves."""
        for camera, key in self.robot.images.items():
            sizes = sorted(self.proof.sizes[key])
            if camera not in processing.cameras or len(sizes) < 2:
                continue
            made = set()
            for size in sizes:
                images = {name: np.zeros((*size, 3), np.uint8) for name in self.robot.images}
                made.add(processing.inputs(state=self.state[0], images=images, prompt="")[f"image/{camera}"].shape)
            if len(made) > 1:
                raise InputError(
                    f"{key} of {self.source} has pictures of {' and '.join(f'{h}x{w}' for h, w in sizes)} (height x "
                    "width), and this model reads one size; make them alike, or leave out episodes with --episodes."
                )

    def _check_fits(self, processing: Processing) -> None:
        processing.check_dims(self.state.shape[1], self.actions.shape[1])
        for name, column in (("state", self.state), ("actions", self.actions)):
            dims = column.shape[1]
            if dims and (known := len(processing.norm_stats[name].mean)) < dims:
                raise InputError(f"the norm stats know {known} dimensions of {name}, the robot has {dims}.")


def open_recording(
    source: str | os.PathLike[str],
    robot: Robot,
    *,
    episodes: str | None = None,
    pictures: bool = True,
    tolerance: float | None = None,
) -> Recording:
    """Open a data set, find the robot's columns in it, and prove that it is whole.

    Args:
      source: local folder or hub id.
      robot: which column means what.
      episodes: which to keep or leave out, as `episodes.chosen` reads it; None keeps all.
      pictures: whether the cameras will be read; if not, nothing is asked about them.
      tolerance: seconds by which the time between two rows may differ from one period; see `proof.prove`.

    Raises:
      InputError: damaged data set, or the robot's keys do not fit; the message lists the data set's features.
    """
    folder = find_folder(source)
    cameras = tuple(dict.fromkeys(robot.images.values())) if pictures else ()
    data = LeRobotData(read_meta(folder, cameras, episodes=episodes), tolerance=tolerance)
    features = data.meta.features
    wanted = [*robot.columns, *robot.images.values()]
    listed = ", ".join(f"{key} ({described(feature)})" for key, feature in features.items())
    absent = [key for key in wanted if key not in features]
    if absent:
        raise InputError(
            f"{source} has no {', '.join(absent)}, which robot {robot.name!r} reads; it has {listed}. "
            "Give --image, --state-key and --action-key, or a robot file."
        )
    for camera, key in robot.images.items():
        if features[key].get("dtype") not in ("image", "video"):
            raise InputError(f"{key} of {source} is no image, but {camera} of robot {robot.name!r}; it has {listed}.")
    proof = prove(data, columns=robot.columns, cameras=cameras, task=robot.task, tolerance=tolerance)
    columns = dict(zip(robot.columns, data.numbers(*robot.columns), strict=True))
    for key, wanted in robot.widths.items():
        if key in columns and columns[key].shape[1] != wanted:
            raise InputError(
                f"{key} of {source} has {columns[key].shape[1]} dimensions, robot {robot.name!r} has {wanted}."
            )
    state, actions = (join(parts, columns) for parts in (robot.state, robot.actions))
    if robot.action_dim not in (None, actions.shape[1]):
        raise InputError(
            f"{', '.join(robot.actions)} of {source} has {actions.shape[1]} dimensions, robot {robot.name!r} "
            f"{robot.action_dim}."
        )
    if max(len(robot.delta), robot.units == "aloha" and 14) > min(state.shape[1], actions.shape[1]):
        raise InputError(
            f"state and actions of {source} have {state.shape[1]} and {actions.shape[1]} dimensions, fewer than robot "
            f"{robot.name!r} converts."
        )
    asset_id = str(source) if not Path(source).expanduser().is_dir() else folder.resolve().name
    widths = {key: column.shape[1] for key, column in columns.items()}
    measured = dataclasses.replace(robot, action_dim=actions.shape[1], widths=widths)
    return Recording(str(source), data, measured, asset_id, state, actions, proof)
