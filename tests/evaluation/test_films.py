"""Films: whole as a video, a few of their pictures kept, at the robot's pace."""

import io

import av
import numpy as np
import pytest
import simulated

from clp_jax.evaluation.films import Camera
from clp_jax.evaluation.rollouts import Asking, play

KEPT_AT_MOST = 65


def shot(count, *, fps=None, size=(12, 16)):
    """A film of so many pictures, all drawn into one array, whose level is their number."""
    camera, picture = Camera(fps), np.zeros((*size, 3), np.uint8)
    for number in range(count):
        picture[:] = number
        camera.shoot(picture)
    return camera.film()


def played(film):
    with av.open(io.BytesIO(film.video)) as video:
        return [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)], video.streams.video[
            0
        ].average_rate


@pytest.mark.parametrize("count", [1, 2, 64, 65, 66, 250])
def test_the_video_has_all_pictures_and_few_are_kept(count):
    film = shot(count)
    frames, _ = played(film)
    assert len(frames) == count and frames[-1].mean() == pytest.approx(count - 1, abs=3)
    kept = [int(picture[0, 0, 0]) for picture in film.pictures]
    assert kept[0] == 0 and kept[-1] == count - 1 and min(count, KEPT_AT_MOST // 2) <= len(kept) <= KEPT_AT_MOST
    assert len(set(np.diff(kept[:-1]))) <= 1


def test_odd_sizes_lose_a_line():
    assert played(shot(2, size=(13, 17)))[0][0].shape == (12, 16, 3)


@pytest.mark.parametrize(
    ("draws_fast", "fps", "levels", "rate"),
    [(True, 20.0, range(8), 20), (False, 20.0, (0, 3, 6, 7), 20 / 3), (True, None, range(8), 10)],
)
def test_costly_pictures_are_those_of_requests_and_films_keep_the_robots_time(draws_fast, fps, levels, rate):
    environment = simulated.Counting("7", fps=fps, draws_fast=draws_fast)
    episode = play(environment, "7", 0, Asking(replan=3, filmed=1), lambda request: np.zeros((6, 4)))
    assert episode.film is not None
    assert [int(picture[0, 0, 0]) for picture in episode.film.pictures] == [10 * level for level in levels]
    assert float(played(episode.film)[1]) == pytest.approx(rate, rel=1e-3)
