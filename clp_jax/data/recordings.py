"""One or several LeRobot data sets of one robot, which share their statistics."""

import dataclasses
import hashlib
import math
import os
from collections.abc import Iterator, Sequence

import numpy as np

from clp_jax.data.recording import Recording, open_recording
from clp_jax.errors import InputError
from clp_jax.processing import norm_stats
from clp_jax.processing.norm_stats import NormStats
from clp_jax.processing.robots import Robot, to_model_units

Sources = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


@dataclasses.dataclass(frozen=True)
class Recordings:
    """What a robot recorded, as wide in every column of each data set.

    Attributes:
      each: at least one.
      weights: how often each is drawn, in proportion; if none, every row as often as another.
    """

    each: tuple[Recording, ...]
    weights: tuple[float, ...] = ()

    @property
    def robot(self) -> Robot:
        """With the dimensions of its columns."""
        return self.each[0].robot

    @property
    def asset_id(self) -> str:
        """The hub id or the folder's name, with "+" between several."""
        return "+".join(dict.fromkeys(recording.asset_id for recording in self.each))

    @property
    def notes(self) -> tuple[str, ...]:
        """What is odd about the data sets together."""
        return (*self._rates(), *self._repetitions())

    def _rates(self) -> Iterator[str]:
        rates = {recording.data.meta.fps: recording.source for recording in self.each}
        if len(rates) > 1:
            said = ", ".join(f"{source} {fps:g}" for fps, source in rates.items())
            yield f"the data sets have different numbers of rows a second ({said}): chunks do not last equally long."

    def _repetitions(self) -> Iterator[str]:
        """Episodes that are there twice, as where one set was merged into another that is given, too."""
        seen: dict[bytes, str] = {}
        again: list[tuple[str, str]] = []
        for recording in self.each:
            for episode, end in zip(recording.data.meta.episodes, recording.data.ends.tolist(), strict=True):
                rows = slice(end - episode.length, end)
                content = recording.state[rows].tobytes() + recording.actions[rows].tobytes()
                name = f"{episode.index} of {recording.source}"
                first = seen.setdefault(hashlib.sha256(content).digest(), name)
                again += [(name, first)] if first != name else []
        if again:
            yield (
                f"{len(again)} episodes have all states and actions of another, first episode {again[0][0]} those of "
                f"episode {again[0][1]}: what they show counts twice, and may be both trained on and held out."
            )

    def norm_stats(self, horizon: int) -> dict[str, NormStats]:
        """Statistics of all rows, each as often as it is drawn; no image is read."""
        starts = np.cumsum([0, *(len(recording.data) for recording in self.each)])
        ends = [recording.data.ends + start for recording, start in zip(self.each, starts, strict=False)]
        vectors = [np.concatenate([getattr(r, name) for r in self.each]) for name in ("state", "actions")]
        state, actions = to_model_units(self.robot, *vectors)
        assert actions is not None
        rows = [np.full(len(r.data), weight / len(r.data)) for r, weight in zip(self.each, self.weights, strict=False)]
        counts = np.concatenate(rows) if self.weights else None
        return norm_stats.of_robot(state, actions, np.concatenate(ends), horizon, self.robot.delta, counts)


def open_recordings(
    source: Sources,
    robot: Robot,
    *,
    weights: Sequence[float] = (),
    episodes: Sequence[str] = (),
    pictures: bool = True,
    tolerance: float | None = None,
) -> Recordings:
    """Open data sets of one robot; see `open_recording`.

    Args:
      source: local folder or hub id, or several.
      robot: which column means what.
      weights: how often each is drawn; none for a single one.
      episodes: for each which to keep or leave out; if none, all stay.
      pictures: whether the cameras will be read.
      tolerance: seconds by which the time between two rows may differ from one period.

    Raises:
      InputError: as `open_recording` and `checked_sources`, or a column is wider in one than in another.
    """
    each = tuple(
        open_recording(one, robot, episodes=text, pictures=pictures, tolerance=tolerance)
        for one, text in checked_sources(source, weights, episodes)
    )
    for other in each[1:]:
        for key, width in each[0].robot.widths.items():
            if other.robot.widths[key] != width:
                raise InputError(
                    f"{key} has {other.robot.widths[key]} dimensions in {other.source} and {width} in "
                    f"{each[0].source}; data sets of one run are of one robot."
                )
    return Recordings(each, tuple(weights))


def checked_sources(source: Sources, weights: Sequence[float], episodes: Sequence[str]) -> list[tuple[str, str | None]]:
    """Each source with its choice of episodes.

    Raises:
      InputError: sources that cannot be read together, or not one weight or choice for each.
    """
    sources = [str(one) for one in ([source] if isinstance(source, str | os.PathLike) else source)]
    if not sources or len({one.endswith(".npz") for one in sources}) > 1:
        raise InputError(f"--data takes LeRobot data sets or .npz files, not {' and '.join(sources) or 'nothing'}.")
    for flag, values, example in (("--weights", weights, "2 1"), ("--episodes", episodes, "0:100 : (all)")):
        if values and len(values) != len(sources):
            raise InputError(
                f"{flag} has {len(values)} values for {len(sources)} data sets; give one for each, such as {example}."
            )
    if weights and (len(sources) == 1 or not all(0 < weight < math.inf for weight in weights)):
        raise InputError("--weights are numbers above 0, one for each of several data sets.")
    chosen = list(zip(sources, [*episodes] or [None] * len(sources), strict=True))
    if len(set(chosen)) < len(chosen):
        raise InputError(f"--data names the same twice: {' '.join(sources)}; choose other --episodes of it.")
    return chosen
