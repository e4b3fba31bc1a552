"""``clp serve`` of lerobot's policy folder answers what lerobot answers."""

import numpy as np
import pytest
from smolvla_recordings import CAMERAS, GOLDEN, recording

from clp_jax.checkpoint import read_spec
from clp_jax.commands.serve import Serve, make_policy
from clp_jax.errors import InputError

TASK = "pick up the red cube and put it into the drawer"
ANSWER_TOLERANCE = 1e-4
"""Of ten steps of float32, in units that the statistics make larger."""


@pytest.fixture(scope="module")
def policy():
    pytest.importorskip("tokenizers")
    config = Serve(checkpoint=str(GOLDEN / "ckpt"), dtype="float32", max_batch=1)
    return make_policy(config, read_spec(config.checkpoint))


def request(**changes) -> dict:
    with np.load(GOLDEN / "images_u8.npz") as archive:
        images = {f"observation/images/{camera}": archive[camera][0] for camera in CAMERAS}
    return {"observation/state": recording()["raw_state"][0], "prompt": TASK, **images, **changes}


@pytest.mark.slow
def test_answers_are_lerobots(policy):
    found = policy.infer(request(), noise=recording()["sample_noise"][0])["actions"]
    np.testing.assert_allclose(found, recording()["actions_unnormalised"][0], rtol=0, atol=ANSWER_TOLERANCE)


def test_statistics_without_a_name_are_not_those_of_a_name_that_is_asked_for():
    config = Serve(checkpoint=str(GOLDEN / "ckpt"), asset_id="x")
    with pytest.raises(InputError, match="has no norm stats named x"):
        make_policy(config, read_spec(config.checkpoint))


def test_an_image_of_another_size_is_refused_by_name(policy):
    with pytest.raises(InputError, match=r"images/top is 64 x 48 .* 120 x 160"):
        policy.prepare(request(**{"observation/images/top": np.zeros((64, 48, 3), np.uint8)}))
