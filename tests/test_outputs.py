"""Output folders are complete or absent, whatever happens on the way."""

import errno
import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from checkpoints import RECORDED, assert_bit_equal, save_by_orbax, toy_params
from etils import epath

from clp_jax import outputs
from clp_jax.checkpoint import read_params, read_spec, rewrite
from clp_jax.editable_json import write_json
from clp_jax.errors import InputError
from clp_jax.machine import failure_of
from clp_jax.outputs import MANIFEST

staged = functools.partial(outputs.staged, by="clp test")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {MANIFEST}


def write_half(out: Path, error: type[BaseException], **options) -> None:
    with staged(out, **options) as folder:
        (folder / "file").write_text("half")
        raise error


def test_the_folder_appears_at_the_end(tmp_path):
    out = tmp_path / "a" / "b" / "out"
    with staged(out) as folder:
        (folder / "file").write_text("new")
        assert not out.exists()
    assert names(out.parent) == {"out"} and (out / "file").read_text() == "new"


def test_nothing_is_left_of_a_failure(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write_half(tmp_path / "out", KeyboardInterrupt)
    assert names(tmp_path) == set()


def test_an_existing_folder_is_kept_without_overwrite(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="choose another output folder or pass --overwrite"), staged(tmp_path / "out"):
        pytest.fail("began to write")
    assert names(tmp_path) == {"out"}


def test_a_folder_that_appears_meanwhile_is_kept(tmp_path):
    with pytest.raises(InputError, match="exists already"), staged(tmp_path / "out"):
        (tmp_path / "out" / "theirs").mkdir(parents=True)
    assert names(tmp_path) == {"out"} and names(tmp_path / "out") == {"theirs"}


def test_overwrite_keeps_the_old_folder_until_the_new_one_is_complete(tmp_path):
    with staged(tmp_path / "out") as folder:
        (folder / "old").touch()
    with pytest.raises(RuntimeError):
        write_half(tmp_path / "out", RuntimeError, overwrite=True)
    assert names(tmp_path / "out") == {"old"}
    with staged(tmp_path / "out", overwrite=True) as folder:
        (folder / "new").touch()
        assert names(tmp_path / "out") == {"old"}
    assert names(tmp_path / "out") == {"new"} and names(tmp_path) == {"out"}


@pytest.mark.parametrize("out", ["source", "source/inside", ".", "link"])
def test_output_and_input_must_not_overlap(out, tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "link").symlink_to("source")
    staging = staged(tmp_path / out, overwrite=True, sources=[tmp_path / "source"])
    with pytest.raises(InputError, match="overlaps with the input"), staging:
        pytest.fail("began to write")
    assert (tmp_path / "source").is_dir()


def test_rewrite_refuses_to_write_into_its_source(tmp_path):
    save_by_orbax(tmp_path / "step", toy_params())
    (tmp_path / "step" / "assets").mkdir()
    spec = read_spec(tmp_path / "step")
    for out in (tmp_path / "step", tmp_path / "step" / "pruned", tmp_path / "step" / "params"):
        with pytest.raises(InputError, match="overlaps with the input"):
            rewrite(spec, out, take={}, overwrite=True)
    assert_bit_equal(toy_params(), read_params(read_spec(tmp_path / "step")))


def test_what_a_killed_run_left_is_removed_and_what_a_live_one_writes_is_not(tmp_path):
    with staged(tmp_path / "out") as live:
        stale = tmp_path / ".out.unfinished-0123abcd"
        stale.mkdir()
        with staged(tmp_path / "out") as folder:
            assert not stale.exists()
            (folder / "second").touch()
        (live / "file").touch()
        assert names(tmp_path) == {"out", live.name}
        shutil.rmtree(tmp_path / "out")
    assert names(tmp_path) == {"out"} and names(tmp_path / "out") == {"file"}


def test_the_old_folder_comes_back_when_killed_between_the_two_renames(tmp_path):
    (tmp_path / ".out.replaced-0123abcd").mkdir()
    (tmp_path / ".out.replaced-0123abcd" / "old").touch()
    with pytest.raises(InputError, match="exists already"), staged(tmp_path / "out"):
        pytest.fail("began to write")
    assert names(tmp_path) == {"out"} and names(tmp_path / "out") == {"old"}


def test_an_output_that_cannot_be_created(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot create"), staged(tmp_path / "file" / "out"):
        pytest.fail("began to write")


PRUNE_FOR_EVER = """
import sys
from clp_jax.checkpoint import read_spec, rewrite
spec = read_spec(sys.argv[1])
print("ready", flush=True)
while True:
    rewrite(spec, sys.argv[2], take=lambda path: [0, 9] if "/llm/layers/" in path else None, overwrite=True)
"""


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_a_complete_folder_or_none(tmp_path):
    source, out = RECORDED / "pi0_fast_released", tmp_path / "out"
    expected = None
    random = np.random.default_rng(0)
    for _ in range(3):
        command = [sys.executable, "-c", PRUNE_FOR_EVER, str(source), str(out)]
        root = str(Path(__file__).parent.parent)
        with subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": root}) as process:
            assert process.stdout.readline() == b"ready\n"
            time.sleep(random.uniform(0, 0.5))
            process.send_signal(signal.SIGKILL)
        if out.exists():
            got = read_params(read_spec(out))
            expected = got if expected is None else expected
            assert_bit_equal(expected, got)
    rewrite(read_spec(source), out, take=lambda path: [0, 9] if "/llm/layers/" in path else None, overwrite=True)
    assert names(tmp_path) == {"out"}
    assert_bit_equal(read_params(read_spec(out)), expected or read_params(read_spec(out)))


def test_a_remote_folder_is_written_in_place_and_removed_on_failure(tmp_path, monkeypatch):
    monkeypatch.setattr("clp_jax.outputs.is_remote", lambda _: True)  # a local path stands in for gs://
    out = tmp_path / "out"
    with pytest.raises(RuntimeError):
        write_half(out, RuntimeError)
    assert not out.exists()
    with staged(out) as folder:
        assert folder == out
        (folder / "first").touch()
    with pytest.raises(InputError, match="exists already"), staged(out):
        pytest.fail("began to write")
    with staged(out, overwrite=True) as folder:
        (folder / "second").touch()
    assert names(out) == {"second"}


@pytest.mark.parametrize("kind", ["folder", "file", "link", "other command", "one file more", "old output"])
def test_overwrite_deletes_only_what_the_same_command_wrote(kind, tmp_path):
    out, own = tmp_path / "out", tmp_path / "own"
    with outputs.staged(own, by="clp test" if kind != "other command" else "clp other") as folder:
        (folder / "data").write_text("mine")
    if kind == "file":
        out.write_text("mine")
    elif kind == "link":
        out.symlink_to(own)
    elif kind == "folder":
        out.mkdir()
        (out / "thesis.tex").write_text("mine")
    else:
        own.rename(out)
    if kind == "one file more":
        (out / "notes.txt").write_text("mine")
    if kind == "old output":
        (out / MANIFEST).unlink()
    before = {path: path.read_text() for path in sorted(tmp_path.rglob("*")) if path.is_file()}
    wrong = {
        "file": "is no folder",
        "link": "is a link",
        "folder": "was written by something else",
        "old output": "was written by something else",
        "other command": "was written by clp other",
        "one file more": "holds notes.txt, which clp test did not write",
    }[kind]
    with pytest.raises(InputError, match=wrong), staged(out, overwrite=True):
        pytest.fail("began to write")
    assert before == {path: path.read_text() for path in sorted(tmp_path.rglob("*")) if path.is_file()}


def test_overwrite_takes_an_empty_folder_and_what_a_mac_or_python_leaves_in_an_output(tmp_path):
    (tmp_path / "out").mkdir()
    with staged(tmp_path / "out", overwrite=True) as folder:
        (folder / "first").touch()
    (tmp_path / "out" / ".DS_Store").touch()
    (tmp_path / "out" / "__pycache__").mkdir()
    with staged(tmp_path / "out", overwrite=True) as folder:
        (folder / "second").touch()
    assert names(tmp_path / "out") == {"second"}


def test_brackets_in_a_name_are_no_pattern(tmp_path):
    for name in ("out[1]", "out1"):
        (tmp_path / f".{name}.unfinished-0123abcd").mkdir()
    (tmp_path / ".out[1].replaced-0123abcd").mkdir()
    with pytest.raises(InputError, match="exists already"), staged(tmp_path / "out[1]"):
        pytest.fail("began to write")
    assert names(tmp_path) == {"out[1]", ".out1.unfinished-0123abcd"}


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("named", [False, True])
def test_a_full_disk_is_named_by_what_was_to_be_written(named, tmp_path):
    with pytest.raises(OSError, match="No space left") as error, staged(tmp_path / "out") as folder:
        raise OSError(errno.ENOSPC, "No space left on device", str(folder / "part") if named else None)
    assert failure_of(error.value) == f"{tmp_path / 'out'}: No space left on device"
    assert not list(tmp_path.iterdir())


def test_other_failures_and_those_elsewhere_keep_their_name(tmp_path):
    for failure in (ConnectionError("the hub did not answer"), OSError(errno.ENOSPC, "Full", "/tmp/cache")):
        with pytest.raises(OSError, match=r".") as error, staged(tmp_path / "out"):
            raise failure
        assert error.value is failure


def test_a_disk_that_is_full_at_the_beginning_is_no_mistake_in_the_path(tmp_path, monkeypatch):
    monkeypatch.setattr(outputs.Path, "mkdir", full)
    with pytest.raises(OSError, match="No space left"), staged(tmp_path / "out"):
        pytest.fail("began to write")


def test_a_disk_that_is_full_is_named_where_an_output_grows(tmp_path, monkeypatch):
    taking = outputs.resumable(epath.Path(tmp_path), by="clp test", what="testing", resume=False, overwrite=False)
    with pytest.raises(OSError, match="No space left") as error, taking:
        full()
    assert error.value.filename == str(tmp_path)
    monkeypatch.setattr(type(epath.Path(tmp_path)), "write_text", full)
    with pytest.raises(OSError, match="No space left") as error:
        write_json(tmp_path / "numbers.json", {})
    assert error.value.filename == str(tmp_path / "numbers.json")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
@pytest.mark.parametrize("exists", [True, False])
def test_an_output_where_nobody_may_write_is_one_line(tmp_path, monkeypatch, number, exists):
    """(Root may write everywhere, so the refusal is made up.)"""

    def refused(self, *args, **settings):
        raise OSError(number, os.strerror(number), str(self))

    folder = epath.Path(tmp_path / "run")
    if exists:
        folder.mkdir()
    name = "write_text" if exists else "mkdir"
    monkeypatch.setattr(type(folder), name, refused)
    monkeypatch.setattr(Path, name, refused)
    said = f"cannot write {folder}: {os.strerror(number)}; choose another --out"
    with (
        pytest.raises(InputError, match=re.escape(said)),
        outputs.resumable(folder, by="clp test", what="a test", resume=False, overwrite=False),
    ):
        raise AssertionError("begun")


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("kind", ["other command", "no output", "own", "own without its manifest", "own and a note"])
def test_what_another_command_wrote_is_not_gone_on_with(kind, resume, tmp_path):
    out = tmp_path / "out"
    with outputs.staged(out, by="clp other" if kind == "other command" else "clp test") as folder:
        (folder / ("plan.json" if kind in ("other command", "no output") else "17")).touch()
    if kind in ("no output", "own without its manifest"):
        (out / MANIFEST).unlink()
    if kind == "own and a note":
        (out / "notes.txt").touch()
    before = {path: path.read_text() for path in out.iterdir()}
    taking = outputs.resumable(
        epath.Path(out), by="clp test", what="testing", resume=resume, overwrite=False, names=r"\d+"
    )
    refusal = {
        "other command": f"{out} was written by clp other, not by clp test; choose another --out.",
        "no output": f"{out} holds plan.json, which clp test did not write; choose another --out.",
    }.get(kind, None if resume else f"{out} is not empty; go on with --resume, or delete it with --overwrite.")
    if refusal is None:
        with taking:
            return
    with pytest.raises(InputError) as error, taking:
        pytest.fail("was taken")
    assert str(error.value) == refusal
    assert before == {path: path.read_text() for path in out.iterdir()}


def test_a_lock_on_a_file_lets_one_in_and_is_released_at_the_end(tmp_path):
    (tmp_path / "file").touch()
    lock = functools.partial(outputs.alone, tmp_path / "file", "writing")
    with lock(), pytest.raises(InputError, match="another process is writing"), lock():
        pytest.fail("two at once")
    with lock():
        pass
