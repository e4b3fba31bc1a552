"""Closed loops: through the real policy and the real server, in processes of a simulator without physics."""

import dataclasses
import functools
import json
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
import simulated
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clp_jax.checkpoint import read_spec
from clp_jax.cli import main
from clp_jax.commands import evaluate as command
from clp_jax.commands import serve as serve_command
from clp_jax.commands.serve import Serve, make_policy
from clp_jax.errors import InputError
from clp_jax.evaluation import libero
from clp_jax.evaluation.films import Film
from clp_jax.evaluation.parallel import run_episodes
from clp_jax.evaluation.pictures import strip
from clp_jax.evaluation.remote import RemotePolicy
from clp_jax.evaluation.rendering import join_vertices
from clp_jax.evaluation.rollouts import Asking, Episode, checked_actions, play
from clp_jax.evaluation.statistics import wilson
from clp_jax.evaluation.suite import Suite
from clp_jax.evaluation.summary import summary
from clp_jax.serving.server import ServerSettings, serving

# Batches of other sizes sum in another order; the state is in the actions' units here.
BATCH_TOLERANCE = 1e-4
FLAGS = ("--suite", "metaworld", "--action-horizon", "6", "--num-steps", "2", "--processes", "2", "--filmed", "2")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return simulated.write_checkpoint(tmp_path_factory.mktemp("evaluated"))


@pytest.fixture(scope="module")
def policy(checkpoint):
    serve = Serve(
        checkpoint=str(checkpoint), robot="metaworld", action_horizon=simulated.HORIZON, num_steps=2, max_batch=1
    )
    return make_policy(serve, read_spec(str(checkpoint)))


def test_a_policy_with_other_statistics_is_another_one(checkpoint, tmp_path):
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    (file,) = (copy / "assets").rglob("norm_stats.json")

    def files(**flags) -> str:
        return serve_command._identity_of_files(Serve(checkpoint=str(copy), **flags), read_spec(str(copy)))

    assert files() == serve_command._identity_of_files(Serve(checkpoint="c"), read_spec(str(checkpoint)))
    before, given = files(), files(norm_stats=str(file.parent))
    file.write_text(file.read_text().replace("0.", "1.", 1))
    assert len({before, given, files(), files(norm_stats=str(file))}) == 4


def test_a_robot_that_the_model_cannot_drive_is_refused_before_anything_is_loaded(checkpoint):
    with pytest.raises(InputError, match=r"the actions of libero have 7 dimensions, the statistics 4\."):
        make_policy(Serve(checkpoint=str(checkpoint), robot="libero"), read_spec(str(checkpoint)))


@pytest.fixture
def counting(monkeypatch):
    """The command's simulator is the one that counts."""
    tasks = ("3", "7", "never")
    monkeypatch.setattr(
        command, "open_suite", lambda config: Suite("counting", tasks, simulated.Counting, robot="metaworld")
    )
    return tasks


@pytest.mark.parametrize(
    ("successes", "episodes", "low", "high"),
    # (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n) with z = 1.959964, in 30 digits
    [(0, 10, 0.0, 0.277533), (10, 10, 0.722467, 1.0), (45, 50, 0.786398, 0.956524), (1, 2, 0.094531, 0.905469)],
)
def test_wilson_is_the_published_interval(successes, episodes, low, high):
    rate, *limits = wilson(successes, episodes)
    assert rate == successes / episodes
    assert limits == pytest.approx([low, high], abs=1e-6)


@settings(deadline=None)  # the time of a single example says nothing on a busy machine
@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_solves_the_score_equation(counts):
    successes, episodes = counts
    rate, low, high = wilson(successes, episodes)
    assert 0 <= low <= rate <= high <= 1
    for limit in (low, high):  # |rate - p| = z sqrt(p (1 - p) / n) at both limits
        assert abs(rate - limit) == pytest.approx(1.959964 * math.sqrt(limit * (1 - limit) / episodes), abs=1e-6)
    mirrored = wilson(episodes - successes, episodes)
    assert mirrored == pytest.approx((1 - rate, 1 - high, 1 - low))


@pytest.mark.parametrize("counts", [(3, 2), (-1, 2), (0, 0)])
def test_impossible_counts_are_refused(counts):
    with pytest.raises(InputError, match="cannot be"):
        wilson(*counts)


def recorded(requests):
    """A policy that counts its requests and moves by their number of steps."""

    def ask(request):
        requests.append(request)
        return np.full((simulated.HORIZON, 4), request["observation.state"][0])

    return ask


def test_actions_are_done_until_success_and_asked_for_again():
    requests: list[dict] = []
    environment = simulated.Counting("7")
    episode = play(environment, "7", 1, Asking(replan=3, filmed=2), recorded(requests))
    assert (episode.success, episode.steps, episode.asked) == (True, 7, 3)
    assert [action[0] for action in environment.done] == [0, 0, 0, 3, 3, 3, 6]
    assert episode.film is not None
    assert [int(picture[0, 0, 0]) for picture in episode.film.pictures] == [1 + 10 * step for step in range(8)]
    assert {request["prompt"] for request in requests} == {"count"}


def test_an_episode_ends_at_its_limit():
    episode = play(simulated.Counting("never"), "never", 5, Asking(replan=5, filmed=2), recorded([]))
    assert (episode.success, episode.steps, episode.asked, episode.film) == (False, 12, 3, None)


def test_requests_are_changed_as_asked():
    requests: list[dict] = []
    asking = Asking(replan=6, seed=3, noise_shape=(6, 5), prompt="stop", blank_images=True)
    for number in (1, 1, 2):
        play(simulated.Counting("7"), "7", number, asking, recorded(requests))
    assert all(not request["observation.image"].any() and request["prompt"] == "stop" for request in requests)
    noises = [request["noise"] for request in requests]
    assert noises[0].shape == (6, 5)
    assert np.array_equal(noises[0], noises[2]) and np.array_equal(noises[1], noises[3])
    assert not np.array_equal(noises[0], noises[1]) and not np.array_equal(noises[0], noises[4])


def test_processes_change_nothing_but_the_order():
    jobs = [(task, number) for task in ("3", "7", "never") for number in range(3)]
    asking = Asking(replan=4, filmed=1)
    sizes = []

    def answer(requests):
        sizes.append(len(requests))
        return [np.full((4, 4), request["observation.state"].sum()) for request in requests]

    found = list(run_episodes(simulated.Counting, jobs, answer, asking, processes=3, max_batch=2))
    expected = [
        play(simulated.Counting(task), task, number, asking, lambda request: answer([request])[0])
        for task, number in jobs
    ]
    assert max(sizes) <= 2
    assert len(found) == len(jobs)
    for mine in expected:
        theirs = next(e for e in found if (e.task, e.number) == (mine.task, mine.number))
        assert dataclasses.replace(theirs, film=None) == dataclasses.replace(mine, film=None)
        assert (theirs.film is None) == (mine.film is None) == (mine.number > 0)
        if theirs.film and mine.film:
            assert np.array_equal(theirs.film.pictures, mine.film.pictures) and theirs.film.video == mine.film.video


@pytest.mark.parametrize(
    ("task", "error", "message"),
    [
        ("missing", InputError, "^the simulator is not installed; pip install"),
        (
            "crash",
            InputError,
            r"broke in crash, episode 0: ZeroDivisionError: physics \(simulated.py, line \d+\); --debug",
        ),
        ("lost", InputError, "broke in lost, episode 0: ConnectionResetError: its own server"),
        ("exit", ChildProcessError, "ended with exit code 9; if memory is short, take fewer --processes"),
    ],
)
def test_a_broken_simulator_is_told(task, error, message):
    with pytest.raises(error, match=message):
        list(run_episodes(simulated.Counting, [(task, 0)], lambda _: [], Asking(replan=1), processes=1, max_batch=1))


@pytest.mark.parametrize("actions", [np.zeros((2, 4)), np.full((3, 4), np.nan), np.zeros(4)])
def test_actions_that_no_robot_should_see_are_refused(actions):
    with pytest.raises(InputError, match="actions"):
        checked_actions(actions, 3)


@pytest.mark.slow
def test_a_checkpoint_acts(checkpoint, counting, tmp_path, capsys):
    out = tmp_path / "found"
    words = ["evaluate", *FLAGS, "--checkpoint", str(checkpoint), "--episodes", "3", "--out", str(out)]
    assert main(words) == 0
    found = json.loads((out / "results.json").read_text())
    rows = {task: (row["successes"], row["episodes"], row["steps"]) for task, row in found["tasks"].items()}
    assert rows == {"3": (3, 3, 9), "7": (3, 3, 21), "never": (0, 3, 36)}
    assert found["all"]["successes"] == 6 and found["all"]["rate"] == pytest.approx(2 / 3)
    assert found["latency"]["requests"] == 3 * (1 + 2 + 3)
    assert found["latency"]["p99_ms"] >= found["latency"]["p50_ms"] > 0
    for task in counting:
        with Image.open(out / f"{task}.png") as page:
            assert page.size == (8 * 128, 2 * 128)
    printed = capsys.readouterr().out
    assert "6/9" in printed and "conventions assumed" in printed
    assert main(words) == 2
    assert "is not empty; go on with --resume" in capsys.readouterr().err


@pytest.mark.slow
def test_a_server_and_its_checkpoint_act_alike(policy):
    """Noise comes from task, episode and step, so neither batches nor the network change what is done."""
    asking = Asking(replan=6, noise_shape=tuple(policy.metadata["noise_shape"]))
    jobs, done = [("7", 0), ("7", 1), ("never", 0)], {}

    def remembering(answer, name):
        def ask(requests):
            answers = answer(requests)
            for request, actions in zip(requests, answers, strict=True):
                done[name, request["noise"].tobytes()] = actions
            return answers

        return ask

    def alone(requests):
        return [policy.infer(request)["actions"] for request in requests]

    with serving(policy, ServerSettings(port=0)) as port:
        remote = RemotePolicy(f"127.0.0.1:{port}", 2)
        for name, answer in (("remote", remote), ("alone", alone)):
            episodes = run_episodes(
                simulated.Counting, jobs, remembering(answer, name), asking, processes=2, max_batch=2
            )
            assert sorted(e.steps for e in episodes) == [7, 7, 12]
        assert len(remote.latencies) == 6
        remote.close()
    keys = {key for name, key in done if name == "alone"}
    assert len(keys) == 6 and len(done) == 12
    for key in keys:
        assert np.max(np.abs(done["remote", key] - done["alone", key])) < BATCH_TOLERANCE


def test_a_server_that_refuses_is_told(policy):
    with serving(policy, ServerSettings(port=0)) as port:
        remote = RemotePolicy(f"127.0.0.1:{port}", 1)
        with pytest.raises(InputError, match=r"refuses: .*lacks image"):
            remote([{"prompt": "nothing to see"}])
        with pytest.raises(InputError, match="an observation cannot be sent: arrays of object"):
            remote([{"state": np.array([None])}])
        remote.close()
    with pytest.raises(InputError, match=r"no policy answers at .*start one with clp serve"):
        RemotePolicy(f"127.0.0.1:{port}", 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "give either --checkpoint, or --server"),
        (("--checkpoint", "a", "--server", "b:1"), "give either --checkpoint, or --server"),
        (("--checkpoint", "a", "--episodes", "0"), "--episodes is 0"),
        (("--server", "b:1", "--num-steps", "3"), "--num-steps: nothing here changes a server; give it to clp serve"),
        (
            ("--checkpoint", "a", "--libero-suite", "libero_10", "--fast-rendering", "--rotation", "axis-angle"),
            "--libero-suite, --fast-rendering and --rotation: nothing in --suite metaworld depends on them; leave them",
        ),
        (("--server", "b:1", "--suite", "libero", "--rotation", "axis-angle"), "nothing in --suite libero depends on"),
        (("--server", "b:1", "--suite", "simpler", "--fast-rendering"), "nothing in --suite simpler depends on it"),
        (("--checkpoint", "a"), "say which --tasks of MetaWorld"),
        (("--checkpoint", "a", "--tasks", "drawer-dance"), "no task drawer-dance; it has assembly"),
        (("--checkpoint", "a", "--suite", "libero"), "clp serve the checkpoint"),
        (("--server", "b:1", "--suite", "libero", "--libero-suite", "x"), "no suite x; it has libero_spatial"),
        (("--server", "b:1", "--suite", "libero", "--tasks", "10"), "no task 10; it has 0 to 9"),
        (("--server", "b:1", "--suite", "libero", "--episodes", "51"), "but a task of libero has 50 initial states"),
        (("--server", "b:1", "--suite", "aloha-sim", "--tasks", "juggle"), "no task juggle; it has transfer-cube"),
    ],
)
def test_flags_that_cannot_be_are_refused(words, message, tmp_path, capsys):
    assert main(["evaluate", "--suite", "metaworld", "--out", str(tmp_path / "o"), *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("suite", "task"), [("metaworld", "drawer-open"), ("aloha-sim", "insertion")])
def test_a_simulator_that_is_not_here_is_told_before_the_policy_is_read(suite, task, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    words = ["--suite", suite, "--tasks", task, "--checkpoint", "nowhere", "--out", str(tmp_path / "o")]
    assert main(["evaluate", *words]) == 2
    assert f'{suite} needs mujoco, which is not installed; pip install "clp-jax[{suite}]"' in capsys.readouterr().err


def test_simulators_need_no_jax():
    names = "commands.evaluate, clp_jax.evaluation.remote, clp_jax.evaluation.libero, clp_jax.evaluation.metaworld"
    code = f"import sys, clp_jax.{names}; assert 'jax' not in sys.modules and 'mujoco' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_summary_counts():
    episodes = [Episode("a", n, success=n < 3, steps=10 * (n + 1), asked=2) for n in (3, 1, 0, 2)]
    found = summary(["a"], episodes, [0.001, 0.003])["tasks"]["a"]
    assert (found["successes"], found["episodes"], found["steps"], found["steps_to_success"]) == (3, 4, 100, 20)
    assert (found["rate"], found["low"], found["high"]) == wilson(3, 4)
    assert [row["number"] for row in found["per_episode"]] == [0, 1, 2, 3]


def test_the_end_of_a_film_is_framed():
    pictures = tuple(np.full((6, 8, 3), value, np.uint8) for value in (0, 50, 100))
    solved, failed = (
        strip(Episode("a", n, success=n == 0, steps=1, asked=1, film=Film(b"", pictures)), columns=3, width=16)
        for n in range(2)
    )
    assert solved.shape == (12, 3 * 16, 3)
    assert (solved[6, [8, 24, 40]] == [[0] * 3, [50] * 3, [100] * 3]).all()
    assert solved[0, -1, 1] > solved[0, -1, 0] and failed[0, -1, 0] > failed[0, -1, 1]


def test_joined_vertices_keep_the_shape():
    """A fine sphere becomes a coarse one: no face is flat or there twice, no vertex has moved further than a cell."""
    turns = np.linspace(0, 2 * np.pi, 41)[:-1]
    heights = np.linspace(-0.99, 0.99, 20)
    ring = np.stack([np.cos(turns), np.sin(turns)], -1)
    vertices = np.concatenate([np.c_[np.sqrt(1 - h * h) * ring, np.full(40, h)] for h in heights])
    corner = np.arange(40)
    quads = [(i * 40 + corner, i * 40 + (corner + 1) % 40) for i in range(19)]
    faces = np.concatenate([np.r_[np.c_[a, b, a + 40], np.c_[b, b + 40, a + 40]] for a, b in quads])
    kept, joined = join_vertices(vertices, faces, 0.25)
    assert 0 < len(joined) < len(faces) / 2
    assert (np.diff(np.sort(joined, axis=1), axis=1) > 0).all()
    assert len(np.unique(np.sort(joined, axis=1), axis=0)) == len(joined)
    assert np.linalg.norm(vertices[joined] - vertices[faces[kept]], axis=-1).max() <= 0.25 * math.sqrt(3)
    tiny = functools.partial(join_vertices, vertices, faces)
    assert np.array_equal(tiny(1e-6)[1], faces)


@settings(deadline=None)  # the time of a single example says nothing on a busy machine
@given(st.tuples(*[st.floats(-1, 1)] * 3), st.floats(0.01, 6.2))
def test_a_turn_is_its_axis_times_its_angle(axis, angle):
    length = np.linalg.norm(axis)
    if length > 0.1:
        unit = np.array(axis) / length
        quaternion = np.array([*(np.sin(angle / 2) * unit), np.cos(angle / 2)])
        assert libero.axis_angle(quaternion) == pytest.approx(angle * unit, abs=1e-5)
