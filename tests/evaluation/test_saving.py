"""What an evaluation found is never lost: after a kill, a dead server or a lost line it goes on, and ends alike."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import simulated_gym
from simulated_gym import serving

from clp_jax.cli import main
from clp_jax.errors import InputError
from clp_jax.evaluation.rollouts import Episode
from clp_jax.evaluation.saving import Line, evaluation, read_lines

FLAGS = ("--env", "simulated_gym:Walk", "--tasks", "a", "b", "--episodes", "4", "--processes", "1", "--filmed", "1")


def evaluate(server, out, *words):
    return main(["evaluate", *FLAGS, "--server", server, "--out", str(out), *words])


def found(out):
    """What must not depend on when an evaluation was interrupted."""
    results = json.loads((out / "results.json").read_text())
    return results["tasks"], results["latency"]["requests"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "found"
    with serving(0.3) as server:
        assert evaluate(server, out) == 0
    return out


def test_json_is_all_of_standard_output_whatever_simulators_print(whole, tmp_path):
    """In a process of its own: its standard output is that of the simulators, which are further processes."""
    out, tests = tmp_path / "found", Path(__file__).parents[1]
    places = f"{tests.parent}{os.pathsep}{tests}"
    environment = os.environ | {"PYTHONPATH": places, simulated_gym.TALKS: "1"}
    with serving(0.3) as server:
        words = ["evaluate", *FLAGS, "--server", server, "--out", str(out), "--json"]
        argv = [sys.executable, "-m", "clp_jax", *words]
        done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == json.loads((out / "results.json").read_text())
    assert json.loads(done.stdout)["tasks"] == found(whole)[0]
    assert simulated_gym.SAID in done.stderr and "success with 95 % intervals" in done.stderr


def test_a_server_that_dies_costs_no_finished_episode(whole, tmp_path, monkeypatch, capsys):
    out, log = tmp_path / "found", tmp_path / "log"
    with serving(0.3, dies_after=7) as server:
        assert evaluate(server, out) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if "episodes," not in line]
    (saved,) = {int(word) for word in told[0].split("; ")[1].split() if word.isdigit()} - {8}
    assert len(told) == 1 and "is gone" in told[0] and f"{saved} of 8 episodes are saved in {out}, go on" in told[0]
    assert 0 < saved < 8 and not (out / "results.json").exists()
    assert len(read_lines(out / "episodes.jsonl")) == saved
    monkeypatch.setenv(simulated_gym.LOG, str(log))
    with serving(0.3) as server:
        assert evaluate(server, out) == 2
        assert "is not empty; go on with --resume" in capsys.readouterr().err
        assert evaluate(server, out, "--resume") == 0
    assert f"{saved} of 8 episodes are saved; missing: a {4 - saved}, b 4" in capsys.readouterr().out
    assert len(log.read_text().splitlines()) == 8 - saved
    assert found(out) == found(whole)
    assert (out / "a.png").read_bytes() == (whole / "a.png").read_bytes()


def test_a_killed_evaluation_goes_on(whole, tmp_path):
    out = tmp_path / "found"
    with serving(0.3, seconds=0.05) as server:
        words = [sys.executable, "-m", "clp_jax", "evaluate", *FLAGS, "--server", server, "--out", str(out)]
        paths = os.pathsep.join(path for path in sys.path if path)
        process = subprocess.Popen(words, env=os.environ | {"PYTHONPATH": paths}, stderr=subprocess.DEVNULL)
        lines = out / "episodes.jsonl"
        while not (lines.exists() and b"\n" in lines.read_bytes()):  # killed before, it has saved nothing yet
            assert process.poll() is None
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert 0 < len(read_lines(lines)) < 8 and not (out / "results.json").exists()
        assert evaluate(server, out, "--resume") == 0
    assert found(out)[0] == found(whole)[0]


def test_a_line_that_was_cut_off_is_played_again(whole, tmp_path):
    lines = (whole / "episodes.jsonl").read_bytes().splitlines(keepends=True)
    file = tmp_path / "episodes.jsonl"
    file.write_bytes(b"".join(lines[:3]) + lines[3][:-9])
    assert [line.episode.number for line in read_lines(file)] == [0, 1, 2]
    assert file.read_bytes() == b"".join(lines[:3])


@pytest.mark.parametrize(
    ("damage", "message"),
    [(lambda lines: [b"{}\n", *lines], "line 1 cannot be read: it lacks 'latencies'"), (lambda x: [*x, x[0]], "twice")],
)
def test_damaged_lines_are_told(whole, tmp_path, damage, message):
    file = tmp_path / "episodes.jsonl"
    file.write_bytes(b"".join(damage((whole / "episodes.jsonl").read_bytes().splitlines(keepends=True))))
    with pytest.raises(InputError, match=message):
        read_lines(file)


def test_a_damaged_line_says_that_its_episode_will_be_played_again(tmp_path):
    file = tmp_path / "episodes.jsonl"
    file.write_text('{"task": "a", "num\n')
    with pytest.raises(InputError, match=r"line 1 is no .*; remove the line, and the episode will be played again$"):
        read_lines(file)


@pytest.mark.parametrize(
    ("words", "step", "message"),
    [
        (("--seed", "3"), 0.3, "seed was 1, is 3"),
        (("--replan", "2"), 0.3, "replan was 5, is 2"),
        ((), 0.4, "policy.walks was 0.3, is 0.4"),
    ],
)
def test_other_settings_or_another_policy_are_refused(whole, words, step, message, capsys):
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    with serving(step) as server:
        assert evaluate(server, whole, "--resume", *words) == 2
    assert f"--resume goes on with the same settings: {message}. Or" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()} == before


def test_more_episodes_are_added(whole, tmp_path, monkeypatch):
    out, log = tmp_path / "found", tmp_path / "log"
    with serving(0.3) as server:
        assert evaluate(server, out, "--episodes", "3") == 0
        monkeypatch.setenv(simulated_gym.LOG, str(log))
        assert evaluate(server, out, "--resume") == 0
    assert len(log.read_text().splitlines()) == 2
    assert found(out) == found(whole)


def test_nothing_stays_of_an_evaluation_without_an_episode(tmp_path, capsys):
    with serving(0.3, dies_after=0) as server:
        assert evaluate(server, tmp_path / "found") == 2
    assert "is gone" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_overwriting_spares_what_others_put_there(whole, tmp_path, capsys):
    out = tmp_path / "found"
    with serving(0.3) as server:
        assert evaluate(server, out, "--episodes", "1") == 0
        assert evaluate(server, out, "--episodes", "1", "--overwrite") == 0
        (out / "notes.txt").touch()
        assert evaluate(server, out, "--episodes", "1", "--overwrite") == 2
        assert "holds notes.txt, which clp evaluate did not write" in capsys.readouterr().err
        assert evaluate(server, "gs://bucket/found") == 2
    assert "give a local folder" in capsys.readouterr().err


def test_one_evaluation_at_a_time(tmp_path):
    settings = {"seed": 1}
    with (
        evaluation(tmp_path / "found", settings, ["a"]) as first,
        pytest.raises(InputError, match="another process is evaluating into"),
        evaluation(tmp_path / "found", settings, ["a"], resume=True),
    ):
        first.add(Line(Episode("a", 0, success=True, steps=1, asked=1), 1.0, (0.1,)))


def test_an_evaluation_of_a_version_that_did_not_look_at_files_is_gone_on_with(tmp_path):
    before = {"policy.checkpoint": "1"}
    with evaluation(tmp_path / "found", before, ["a"]) as found:
        found.add(Line(Episode("a", 0, success=True, steps=1, asked=1), 1.0, (0.1,)))
    with evaluation(tmp_path / "found", before | {"policy.files": "2"}, ["a"], resume=True) as found:
        assert len(found.lines) == 1
    with (
        pytest.raises(InputError, match=r"policy.checkpoint was \"1\", is \"3\""),
        evaluation(tmp_path / "found", {"policy.checkpoint": "3", "policy.files": "2"}, ["a"], resume=True),
    ):
        pass


def test_films_are_saved_with_their_episodes(whole):
    av = pytest.importorskip("av", reason="needs av")
    names = sorted(path.name for path in (whole / "films").iterdir())
    assert names == ["a-0000.mp4", "a-0000.png", "b-0000.mp4", "b-0000.png"]
    with av.open(str(whole / "films/a-0000.mp4")) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    steps = read_lines(whole / "episodes.jsonl")[0].episode.steps
    assert len(frames) == steps + 1 and frames[0].shape == (12, 16, 3)
    assert np.all(np.diff([frame.mean() for frame in frames]) > 0)
