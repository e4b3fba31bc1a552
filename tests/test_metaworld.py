"""The real simulator: the same start in every run, pictures that do not touch the physics, experts that succeed."""

import dataclasses
import importlib.util
import json

import numpy as np
import pytest

from clp_jax.data.lerobot_writer import png_of
from clp_jax.data.recording import open_recording
from clp_jax.errors import InputError
from clp_jax.evaluation.metaworld import Expert, MetaWorld
from clp_jax.evaluation.rendering import Renderer, import_mujoco
from clp_jax.models.pi0.robots import METAWORLD
from scripts import make_metaworld_dataset as recorder

if importlib.util.find_spec("metaworld") is None:  # not imported: MuJoCo chooses how to draw when it is
    pytest.skip("needs metaworld", allow_module_level=True)
try:
    import_mujoco()
except InputError as error:
    pytest.skip(f"needs metaworld and a library to draw: {error}", allow_module_level=True)

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Constant.s. may be too high:UserWarning")]
# The mean difference of a pixel of coarse and fine meshes, in levels of 255: some edges of the arm move by a pixel.
MESH_TOLERANCE = 4


@pytest.fixture(scope="module")
def drawer():
    environment = MetaWorld("drawer-open")
    yield environment
    environment.close()


def run(environment, episode, steps):
    environment.reset(episode)
    expert, states = Expert(environment), []
    for _ in range(steps):
        environment.step(expert.action())
        states.append(environment.state())
    return np.stack(states), environment.picture()


def test_an_episode_does_not_depend_on_what_was_run_before(drawer):
    first = run(drawer, 3, 20)
    run(drawer, 4, 7)
    for environment in (drawer, MetaWorld("drawer-open")):
        again = run(environment, 3, 20)
        assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    others = run(drawer, 4, 20), run(MetaWorld("drawer-open", seed=1), 3, 20)
    assert not any(np.array_equal(first[1], picture) for _, picture in others)


def test_pictures_do_not_touch_the_physics(drawer):
    """Nor does one renderer another: freed in the wrong context, they would."""
    model = drawer._env.model
    faces, counts = model.mesh_face.copy(), model.mesh_facenum.copy()
    drawer.reset(0)
    before = drawer.picture()
    full = Renderer(model, 64, fast=False)
    full._scene.flags[:] = drawer._renderer._scene.flags  # neither shadows nor sky
    shown = full(drawer._env.data, drawer._camera)
    other = Renderer(model, 96)
    del full
    assert other(drawer._env.data, drawer._camera).shape == (96, 96, 3)
    other.close()
    assert np.array_equal(drawer.picture(), before)
    assert np.array_equal(model.mesh_face, faces) and np.array_equal(model.mesh_facenum, counts)
    difference = np.abs(shown.astype(int) - before).mean()
    assert 0 < difference < MESH_TOLERANCE


def test_a_policy_sees_neither_objects_nor_markers(drawer):
    drawer.reset(0)
    request = drawer.request()
    assert request["observation.state"].shape == (4,) and request["prompt"] == "open the drawer"
    marker = (request["observation.image"].astype(int) @ [-1, 1, -1]).max()
    with_marker = MetaWorld("push")
    with_marker.reset(0)
    assert (with_marker.picture().astype(int) @ [-1, 1, -1]).max() > 100 > marker


@pytest.mark.parametrize("task", ["drawer-open", "button-press"])
def test_experts_succeed(task):
    environment = MetaWorld(task, seed=5)
    for episode in range(2):
        environment.reset(episode)
        expert = Expert(environment)
        assert any(environment.step(expert.action()) for _ in range(150))
    environment.close()


def test_what_cannot_be_is_refused(drawer):
    with pytest.raises(InputError, match="no task drawer-dance; it has assembly"):
        MetaWorld("drawer-dance")
    with pytest.raises(InputError, match="MetaWorld ends after 500"):
        MetaWorld("reach", max_steps=501)
    with pytest.raises(InputError, match="have 4 dimensions"):
        drawer.step(np.zeros(7))


def test_a_recording_goes_on_where_it_was_killed(tmp_path):
    """What an earlier run left is used, but only with its flags."""
    config = recorder.MakeMetaworldDataset(
        tasks=("button-press",), out=str(tmp_path / "set"), episodes=2, processes=1, image_size=16
    )
    parts = tmp_path / ".set.episodes"
    recorder._open_parts(parts, config)
    file = recorder._part(parts, "button-press", 1)
    file.parent.mkdir()
    earlier = {"image": [np.full((16, 16, 3), 7, np.uint8)] * 3, "state": [np.ones(4)] * 3, "action": [np.ones(4)] * 3}
    file.write_bytes(recorder._packed(earlier))
    with pytest.raises(InputError, match="begun with other flags"):
        recorder.run(dataclasses.replace(config, noise=0.1))
    recorder.run(config)
    assert not parts.exists()
    found = open_recording(tmp_path / "set", METAWORLD)
    lengths = [episode.length for episode in found.data.meta.episodes]
    assert lengths[1] == 3 and (found.actions[-3:] == 1).all()
    assert png_of(found.data.image("observation.image", lengths[0])) == png_of(earlier["image"][0])
    moved = np.diff(found.state[: lengths[0], :3], axis=0)
    assert lengths[0] > 20 and np.abs(moved).max() > 0
    assert np.abs(found.actions).max() <= 1
    assert json.loads((tmp_path / "set/recorded_with.json").read_text())["noise"] == 0.3
