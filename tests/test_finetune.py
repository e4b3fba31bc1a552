"""``clp finetune`` through its real main: resumption, refusals, kills, and several processes."""

import dataclasses
import gzip
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
import toys
from recordings import GOLDEN
from rich.console import Console

from clp_jax.analysis import loss_of
from clp_jax.checkpoint import read_params, read_spec, write_params
from clp_jax.cli import main
from clp_jax.commands import finetune as finetune_command
from clp_jax.commands.finetune_output import Log
from clp_jax.loading import load_model
from clp_jax.models import Gates
from clp_jax.processing import tokenizer
from clp_jax.training import loop
from clp_jax.training.run_folder import run_folder
from clp_jax.trees import flatten
from scripts.make_lerobot_toy import write as write_toy_set

pytestmark = pytest.mark.slow

ARCH = toys.architecture()
FAST = ("--peak-lr", "1e-2", "--warmup-steps", "1", "--log-every", "1", "--no-augment", "--keep-period", "None")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A toy checkpoint, pruned from four blocks to three, and 24 observations."""
    folder = tmp_path_factory.mktemp("finetune")
    (folder / "stats" / "robot").mkdir(parents=True)
    (folder / "stats" / "robot" / "norm_stats.json").write_text("{}")
    write_params(folder / "full", toys.params(ARCH), assets=folder / "stats")
    assert main(["prune", "--checkpoint", str(folder / "full"), "--out", str(folder / "p"), "--keep", "0,1,3"]) == 0
    np.savez(folder / "data.npz", **toys.data(ARCH, 24).arrays)
    return folder


def words(inputs, out, *flags) -> list[str]:
    paths = ["--checkpoint", inputs / "p", "--data", inputs / "data.npz", "--out", out, "--batch-size", "8"]
    return [str(word) for word in ("finetune", *paths, *FAST, *flags)]


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    """A run of 8 steps in one piece."""
    out = tmp_path_factory.mktemp("finished") / "run"
    assert main(words(inputs, out, "--steps", "8", "--evaluate-every", "4", "--holdout-ratio", "0.3")) == 0
    return out


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in metrics(run) if "loss" in entry}


def spawn(argv: list[str], devices: int) -> subprocess.Popen:
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"  # the last number holds
    environment = os.environ | {
        "XLA_FLAGS": flags,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, "-m", "clp_jax", *argv], env=environment, **pipes)


def test_held_out_loss_of_another_data_set(inputs, tmp_path):
    other = toys.data(ARCH, 12, seed=5)
    np.savez(tmp_path / "other.npz", **other.arrays)
    flags = ("--steps", "2", "--ema-decay", "None", "--holdout-data", tmp_path / "other.npz")
    assert main(words(inputs, tmp_path / "run", *flags)) == 0
    (reported,) = [entry["held_out_loss"] for entry in metrics(tmp_path / "run") if "held_out_loss" in entry]
    expected = loss_of(load_model(read_spec(tmp_path / "run" / "1")), other)(Gates())
    np.testing.assert_allclose(reported, expected, rtol=1e-5)


def test_data_for_a_held_out_loss_that_is_left_out_are_refused(inputs, tmp_path, capsys):
    other = ("--holdout-data", inputs / "data.npz", "--evaluate-every", "0")
    assert main(words(inputs, tmp_path / "run", "--steps", "1", *other)) == 2
    assert "--evaluate-every 0 leaves out" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_held_out_loss_is_not_of_what_the_run_trains_on(inputs, tmp_path, capsys):
    shutil.copy(inputs / "data.npz", tmp_path / "copy.npz")
    for same in (inputs / "data.npz", tmp_path / "copy.npz"):
        told = refusal(capsys, words(inputs, tmp_path / "run", "--steps", "1", "--holdout-data", same))
        assert "is what the run trains on" in told


def test_run_logs_saves_and_records(finished):
    assert sorted(losses(finished)) == list(range(8))
    held = [entry["held_out_loss"] for entry in metrics(finished) if "held_out_loss" in entry]
    assert len(held) == 2
    assert all(entry["held_out_seconds"] > 0 for entry in metrics(finished) if "held_out_loss" in entry)
    assert [entry["step"] for entry in metrics(finished) if "save_seconds" in entry] == [7]
    waited = [entry["data_seconds"] for entry in metrics(finished) if "data_seconds" in entry]
    assert waited and all(0 <= seconds < 60 for seconds in waited)
    assert (finished / "tensorboard").is_dir()
    record = json.loads((finished / "7" / "clp.json").read_text())
    assert record["plan"]["towers"]["vlm"] == {"depth": 4, "keep": [0, 1, 3]}
    assert [step["command"] for step in record["steps"]] == ["prune", "finetune"]
    assert record["steps"][1]["config"]["peak_lr"] == 0.01
    assert record["training"]["step"] == 7
    assert (finished / "7" / "assets" / "robot" / "norm_stats.json").read_text() == "{}"


def test_a_profile_has_the_steps_that_were_asked_for(inputs, tmp_path, capsys):
    flags = ("--steps", "5", "--evaluate-every", "0", "--profile", "2")
    assert main(words(inputs, tmp_path / "run", *flags)) == 0
    assert "tensorboard --logdir" in capsys.readouterr().out
    (folder,) = (tmp_path / "run" / "tensorboard").glob("plugins/profile/*")
    assert list(folder.glob("*.xplane.pb"))
    (trace,) = folder.glob("*.trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert {event["args"]["step_num"] for event in events if event.get("name") == "train"} == {"2", "3"}


def test_a_run_has_a_page_as_soon_as_something_is_known(finished):
    text = (finished / "report.html").read_text(encoding="utf-8")
    assert "<b>8 of 8 steps</b>" in text
    assert "vlm+action: without 2" in text
    last = [entry["held_out_loss"] for entry in metrics(finished) if "held_out_loss" in entry][-1]
    assert f"{last:#.4g}" in text


def test_the_page_is_written_at_every_save_and_shows_another_run(inputs, finished, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "clp_jax.commands.finetune_output.write_run_report",
        lambda folder, record, other: seen.append((len(losses(folder)), other.folder.name)),
    )
    flags = ("--steps", "4", "--evaluate-every", "0", "--holdout-ratio", "0", "--save-every", "2")
    assert main(words(inputs, tmp_path / "run", *flags, "--against", finished)) == 0
    assert seen == [(3, "run"), (4, "run")]


def test_a_page_that_cannot_be_written_ends_no_training_before_its_end():
    def fail() -> None:
        raise OSError(28, "No space left on device")

    written = io.StringIO()
    log = Log(Console(file=written, width=40), None, fail, lambda _: None, 1.0, 0)
    log.paused()
    assert written.getvalue() == "note: report.html was not written: No space left on device\n"
    with pytest.raises(OSError, match="No space left"):
        log.close()


def test_a_run_to_compare_with_must_be_there_before_anything_is_read(inputs, tmp_path, capsys):
    assert main(words(inputs, tmp_path / "run", "--steps", "1", "--against", tmp_path / "no")) == 2
    assert "is no run of clp finetune with a saved step" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_saved_step_can_be_pruned_again(finished, tmp_path):
    assert main(["prune", "--checkpoint", str(finished / "7"), "--out", str(tmp_path / "p"), "--keep", "0,2"]) == 0
    record = read_spec(tmp_path / "p").plan_record
    assert record["plan"]["towers"]["vlm"] == {"depth": 4, "keep": [0, 3]}
    assert [step["command"] for step in record["steps"]] == ["prune", "finetune", "prune"]
    assert "training" not in record


def test_saved_step_can_be_exported_with_its_history(finished, tmp_path):
    flags = ["--to", "openpi", "--check", "bits", "--out", str(tmp_path / "e")]
    assert main(["export", "--checkpoint", str(finished / "7"), *flags]) == 0
    card = (tmp_path / "e" / "README.md").read_text()
    assert "Step 1: pruned, in the block numbers of" in card
    assert "Step 2: fine-tuned from" in card


def test_killed_run_resumes_to_the_same_bits(inputs, finished, tmp_path):
    """kill -9 while it runs and saves; what is there afterwards is complete, and the end is the same."""
    flags = ("--steps", "8", "--holdout-ratio", "0.3", "--evaluate-every", "0", "--save-every", "1", "--resume")
    argv, run = words(inputs, tmp_path / "run", *flags), tmp_path / "run"
    process = spawn(argv, devices=8)
    deadline = time.monotonic() + 600
    while len(losses(run)) < 3 if (run / "metrics.jsonl").exists() else True:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    for folder in run.iterdir():
        if folder.name.isdigit():
            read_params(read_spec(folder))
    assert main(argv) == 0
    assert losses(run) == losses(finished)
    one, other = (flatten(read_params(read_spec(folder / "7"))) for folder in (run, finished))
    for path, leaf in one.items():
        np.testing.assert_array_equal(leaf, other[path], err_msg=path)


def test_two_processes_compute_what_one_does_and_stop_together(inputs, finished, tmp_path):
    """SIGTERM to the second alone ends both with 0, after the same step, which is whole."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    join = ("--coordinator", f"127.0.0.1:{port}", "--processes", "2", "--fsdp-devices", "4")
    flags = ("--steps", "100000", "--evaluate-every", "4", "--holdout-ratio", "0.3", *join)
    run = tmp_path / "run"
    processes = [spawn(words(inputs, run, *flags, "--process-id", str(i)), devices=4) for i in range(2)]
    deadline = time.monotonic() + 600
    try:
        while not (run / "metrics.jsonl").exists() or len(losses(run)) < 8:
            if any(process.poll() is not None for process in processes):
                pytest.fail("\n".join(["one ended too early"] + [p.communicate(timeout=280)[0] for p in processes]))
            assert time.monotonic() < deadline
            time.sleep(0.05)
        processes[1].send_signal(signal.SIGTERM)
        outputs = [process.communicate(timeout=280)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    assert "8 cpu as 2 batch x 4 fsdp, 2 processes" in outputs[0]
    assert "step 7" in outputs[0]
    assert "step" not in outputs[1]
    (step,) = (folder for folder in run.iterdir() if folder.name.isdigit())
    assert f"Stopped by SIGTERM after {int(step.name) + 1} of 100000 steps" in outputs[0].replace("\n", " ")
    read_params(read_spec(step))
    assert read_spec(step).plan_record is not None
    first = list(losses(run).values())[:8]
    np.testing.assert_allclose(first, list(losses(finished).values()), rtol=1e-3)


def refusal(capsys, argv: list[str]) -> str:
    assert main(argv) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def test_a_run_is_not_overwritten_by_one_that_begins_from_it(inputs, finished, capsys):
    for read in ("--checkpoint", "--teacher"):
        argv = words(inputs, finished, "--steps", "9", "--overwrite", read, finished / "7")
        assert "overlaps with the input" in refusal(capsys, argv)
    assert (finished / "7" / "params").is_dir()


def test_finished_folder_is_not_written_over(inputs, finished, capsys):
    assert "go on with --resume" in refusal(capsys, words(inputs, finished, "--steps", "9"))


def test_a_run_of_openpi_is_not_gone_on_with(inputs, tmp_path, capsys):
    shutil.copytree(GOLDEN / "ckpt" / "pi0_trained", tmp_path / "run")
    assert "has no clp.json" in refusal(capsys, words(inputs, tmp_path / "run", "--steps", "9", "--resume"))


def test_resumption_with_other_settings_is_refused(inputs, finished, capsys):
    flags = ("--steps", "9", "--resume", "--holdout-ratio", "0.3")
    assert "seed was 42, is 1" in refusal(capsys, words(inputs, finished, *flags, "--seed", "1"))
    told = refusal(capsys, words(inputs, finished, *flags, "--evaluate-observations", "3"))
    assert "evaluate_observations was 64, is 3" in told
    before = (finished / "report.html").read_text()
    told = refusal(capsys, words(inputs, finished, *flags, "--steps", "7"))
    assert "has done 8 steps, more than --steps 7" in told
    assert (finished / "report.html").read_text() == before


def test_the_time_of_steps_that_are_seen_at_once_is_shared_and_the_first_ones_have_none(monkeypatch):
    now, logged = [0.0], {}
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now[0])
    watch = loop._Watch(loop.Run(steps=9, log_every=1), logged.__setitem__)
    for number in range(5):
        watch.begin(0.0)
        watch.add(number, {"loss": jnp.ones(()), "stop": jnp.zeros(())})
        now[0] += 1.0
    now[0] += 1.0  # the log is slow
    watch.drain()
    assert {number: values.get("step_seconds") for number, values in logged.items()} == {
        **dict.fromkeys((0, 1)),
        **dict.fromkeys((2, 3, 4), 1.0),
    }


def test_writes_that_end_after_a_failed_save_say_nothing(monkeypatch):
    told = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)
    for _ in range(2):
        finetune_command._one_line_for_a_failed_save()
    hook = sys.unraisablehook
    finetune_command._one_line_for_a_failed_save()
    assert sys.unraisablehook is hook
    for text in ("Event loop is closed", "something else"):
        sys.unraisablehook(SimpleNamespace(exc_value=RuntimeError(text)))
    assert [str(one.exc_value) for one in told] == ["something else"]


def test_the_checkpoints_tokenizer_goes_with_every_step(tmp_path, capsys):
    """Without it a step trained with another tokenizer than PaliGemma's could not be served."""
    arch = dataclasses.replace(ARCH, vocab_size=512)
    assets = tmp_path / "assets"
    assets.mkdir()
    (assets / tokenizer.FILE).write_bytes((GOLDEN / "tokenizer/tiny_spm.model").read_bytes())
    write_params(tmp_path / "start", toys.params(arch), assets=assets)
    write_toy_set(tmp_path / "d", "v3.0", {"observation.state": 4, "action": 4}, {"observation.image": "image"})
    paths = ("--checkpoint", tmp_path / "start", "--data", tmp_path / "d", "--out", tmp_path / "run")
    flags = ("--robot", "metaworld", "--asset-id", "lab/arm", "--action-horizon", "3", "--max-token-len", "12")
    argv = [str(word) for word in ("finetune", *paths, *flags, "--steps", "1", "--batch-size", "8", *FAST)]
    assert main(argv) == 0
    told = capsys.readouterr().out
    assert "there are too few episodes to hold one out, so there is no held-out loss" in told
    assert "the run ends within the warm-up of 1 steps: its highest learning rate is 0.005, not the 0.01" in told
    saved = tmp_path / "run" / "0" / "assets"
    assert (saved / tokenizer.FILE).read_bytes() == (assets / tokenizer.FILE).read_bytes()
    assert (saved / "lab" / "arm" / "norm_stats.json").exists()


def test_a_run_from_before_a_flag_existed_goes_on(inputs, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    file = tmp_path / "run" / "7" / "clp.json"
    record = json.loads(file.read_text())
    del record["steps"][-1]["config"]["action_samples"]
    file.write_text(json.dumps(record))
    flags = ("--steps", "9", "--resume", "--holdout-ratio", "0.3", "--evaluate-every", "0")
    assert main(words(inputs, tmp_path / "run", *flags)) == 0
    assert 8 in losses(tmp_path / "run")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--steps", "0"), "at least 1"),
        (("--steps", "2", "--batch-size", "12"), "not a multiple of 8"),
        (("--steps", "2", "--accumulate", "2"), "not a multiple of 16"),
        (("--steps", "2", "--fsdp-devices", "3"), "does not divide"),
        (("--steps", "2", "--batch-size", "48"), "do not fill one batch of 48"),
        (("--steps", "2", "--shard", "nothing=0"), "match no parameter"),
        (("--steps", "2", "--shard", ".*/linear=9"), "cannot be split over 1 devices along axis 9"),
        (("--steps", "2", "--dtype", "float16"), "no activation dtype|not an activation dtype"),
        (("--steps", "2", "--freeze", "nothing"), "match no path"),
        (("--steps", "2", "--resume", "--overwrite"), "not both"),
        (("--steps", "2", "--holdout-ratio", "1"), "below 1"),
        (("--steps", "2", "--processes", "2"), "together"),
        (("--steps", "2", "--wandb", "x"), "pip install wandb"),
        (("--steps", "2", "--profile", "1"), "needs 3; the run has 2"),
        (("--steps", "9", "--warmup-steps", "6", "--decay-steps", "5"), "5 is reached before the warm-up of .* 6 ends"),
    ],
)
def test_bad_flags_are_one_line_and_leave_nothing(inputs, tmp_path, capsys, flags, message):
    assert re.search(message, refusal(capsys, words(inputs, tmp_path / "run", *flags)))
    assert not (tmp_path / "run").exists()


def test_overwrite_spares_what_is_no_run(inputs, tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert "was written by something else" in refusal(capsys, words(inputs, tmp_path, "--steps", "2", "--overwrite"))
    assert (tmp_path / "thesis.tex").exists()


def test_overwrite_spares_a_run_with_something_else_in_it(inputs, tmp_path, capsys):
    with run_folder(tmp_path / "run", resume=False, overwrite=False) as run:
        (run / "metrics.jsonl").touch()
        (run / "notes.txt").write_text("mine")
    told = refusal(capsys, words(inputs, run, "--steps", "2", "--overwrite"))
    assert "holds notes.txt, which clp finetune did not write" in told
    assert (run / "notes.txt").read_text() == "mine" and (run / "metrics.jsonl").exists()


@pytest.mark.parametrize("flags", [(), ("--resume",), ("--overwrite",)])
def test_a_folder_has_one_run_at_a_time(inputs, tmp_path, capsys, flags):
    with run_folder(tmp_path / "run", resume=False, overwrite=False) as run:
        told = refusal(capsys, words(inputs, run, "--steps", "2", *flags))
        assert f"another process is writing a run to {run}" in told
        assert [path.name for path in run.iterdir()] == ["clp-manifest.json"]
