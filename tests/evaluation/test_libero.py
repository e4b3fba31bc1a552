"""The real LIBERO: a script that sees everything solves a task, doing nothing does not; what is sent is openpi's.

It lives in an environment of its own (``make test-libero``), so nothing here imports JAX.
"""

import functools
import importlib.util

import numpy as np
import pytest
from scripted_libero import Picking

from clp_jax.errors import InputError
from clp_jax.evaluation.libero import STARTS, STEPS, Libero, suite
from clp_jax.evaluation.parallel import run_episodes
from clp_jax.evaluation.rendering import import_mujoco
from clp_jax.evaluation.rollouts import Asking
from clp_jax.evaluation.suite import Asked

if importlib.util.find_spec("libero") is None:  # not imported: robosuite chooses how to draw when it is
    pytest.skip("needs libero", allow_module_level=True)
try:
    import_mujoco()
except InputError as error:
    pytest.skip(f"needs libero and a library to draw: {error}", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # robosuite's and LIBERO's
# Mean levels of 255 by which pictures of the can and the boxes differ with coarse meshes.
FAST_TOLERANCE = 4


@pytest.fixture(scope="module")
def soup():
    environment = Picking("0", suite="libero_object")
    yield environment
    environment.close()


@pytest.mark.parametrize(("task", "seed", "number"), [("0", 0, 0), ("3", 7, 4)])
def test_a_script_succeeds(task, seed, number):
    make = functools.partial(Picking, suite="libero_object", seed=seed, fast=True)

    def answer(requests):
        return [request["state"][None] for request in requests]

    (episode,) = run_episodes(make, [(task, number)], answer, Asking(replan=1), processes=1, max_batch=1)
    assert episode.success and episode.steps < STEPS["libero_object"] / 2


def test_doing_nothing_does_not_succeed(soup):
    soup.reset(0)
    assert not any(soup.step(np.array([0.0] * 6 + [-1.0])) for _ in range(5))


def test_what_is_sent_is_what_openpis_client_sends(soup):
    soup.reset(0)
    sent = Libero.request(soup)
    assert sent["prompt"] == "pick up the alphabet soup and place it in the basket"
    assert sent["observation/state"].shape == (8,)
    pictures = [sent["observation/image"], sent["observation/wrist_image"]]
    assert all(picture.shape == (224, 224, 3) and picture.dtype == np.uint8 for picture in pictures)
    fast = Libero("0", suite="libero_object", fast=True)
    fast.reset(0)
    again = fast.request()
    assert np.array_equal(again["observation/state"], sent["observation/state"])
    difference = np.abs(again["observation/image"].astype(int) - pictures[0]).mean()
    assert 0 < difference < FAST_TOLERANCE
    fast.close()


@pytest.mark.parametrize(
    ("name", "instruction"),
    [
        ("libero_10_task", "put both the cream cheese and the tomato sauce in the basket"),
        ("libero_10_swap", "put both the alphabet soup and the tomato sauce in the basket"),
    ],
)
def test_libero_pro_says_what_is_to_be_done(name, instruction):
    assert suite(Asked(part=name)).starts == STARTS
    environment = Libero("0", suite=name)
    assert environment.instruction == instruction and len(environment._starts) == STARTS
