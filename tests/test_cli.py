"""The command line: errors become one line and an exit code, commands and scripts take the same flags."""

import dataclasses
import errno
import importlib
import json
import math
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from clp_jax import cli
from clp_jax.commands.results import print_json
from clp_jax.errors import InputError

ROOT = Path(__file__).parent.parent
LAUNCHERS = sorted(path.stem for path in (ROOT / "scripts").glob("*.py") if "from _launch" in path.read_text())
SCRIPTS = {"inspect": "inspect_checkpoint"}
"""Names of scripts by command where they differ; scripts/inspect.py would hide Python's own module."""


@dataclasses.dataclass(frozen=True)
class TwoWords:
    """A command for the tests."""

    depth: int
    """How deep."""
    overwrite: bool = False
    """Whether to."""


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[TwoWords], None]], None]:
    """Makes ``clp two-words`` run a given function."""

    def install(run: Callable[[TwoWords], None]) -> None:
        module = ModuleType("clp_jax.commands.two_words")
        vars(module).update(TwoWords=TwoWords, run=run)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(cli.COMMANDS, "two-words", "only in the tests")

    return install


def raising(error: BaseException) -> Callable[[TwoWords], None]:
    def run(config: TwoWords) -> None:
        raise error

    return run


def test_flags_reach_the_command(command):
    seen = []
    command(seen.append)
    assert cli.main(["two-words", "--depth", "3", "--overwrite"]) == 0
    assert cli.main(["two-words", "--depth=4"]) == 0
    assert seen == [TwoWords(3, overwrite=True), TwoWords(4)]


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("no plan at p.json: run analyse first"), 2, "error: no plan at p.json: run analyse first\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "out/params"),
            1,
            "error: out/params: No space left on device (--debug shows where)\n",
        ),
        (PermissionError(errno.EACCES, "Permission denied"), 1, "error: Permission denied (--debug shows where)\n"),
        (ConnectionError("the bucket\ndid not answer"), 1, "error: the bucket did not answer (--debug shows where)\n"),
        (TimeoutError(), 1, "error: TimeoutError (--debug shows where)\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_an_error_is_one_line_and_an_exit_code(command, capsys, error, code, line):
    command(raising(error))
    assert cli.main(["two-words", "--depth", "3"]) == code
    assert capsys.readouterr() == ("", line)


@pytest.mark.parametrize("words", [["--debug", "two-words", "--depth", "3"], ["two-words", "--depth", "3", "--debug"]])
def test_debug_shows_the_traceback_and_keeps_the_exit_code(command, capsys, words):
    command(raising(InputError("no plan")))
    assert cli.main(words) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("Traceback")
    assert stderr.endswith("InputError: no plan\n")


def test_a_bug_keeps_its_traceback(command):
    command(raising(ZeroDivisionError("ours")))
    with pytest.raises(ZeroDivisionError, match="ours"):
        cli.main(["two-words", "--depth", "3"])


@pytest.mark.parametrize(
    ("flags", "named"), [([], "--depth"), (["--depth", "three"], "--depth"), (["--depth", "3", "--deep"], "--deep")]
)
def test_a_wrong_flag_is_named_and_exits_with_2_before_the_command_runs(command, capsys, flags, named):
    command(raising(AssertionError("ran")))
    assert cli.main(["two-words", *flags]) == 2
    stdout, stderr = capsys.readouterr()
    assert named in stdout + stderr


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--dept", "3"], "clp two-words has no flag --dept: did you mean --depth?"),
        (["--depth", "3", "--over_write=1"], "clp two-words has no flag --over_write: did you mean --overwrite?"),
        (["--no-dept"], "clp two-words has no flag --no-dept: did you mean --depth?"),
        (
            ["--depth", "3", "--no-overwrite"],
            "clp two-words has no flag --no-overwrite: leave it out, that holds unless --overwrite is given",
        ),
        (["--zzz"], "clp two-words has no flag --zzz: clp two-words --help lists those that there are"),
    ],
)
def test_a_mistyped_flag_is_one_line_with_a_suggestion(command, capsys, flags, line):
    command(raising(AssertionError("ran")))
    assert cli.main(["two-words", *flags]) == 2
    assert capsys.readouterr() == ("", f"error: {line}\n")


def test_completions_of_a_shell_can_be_printed(command, capsys):
    command(raising(AssertionError("ran")))
    assert cli.main(["two-words", "--tyro-print-completion", "bash"]) == 0
    assert "--overwrite" in capsys.readouterr().out


def test_help_of_a_command_names_its_flags_and_what_they_mean(command, capsys):
    command(raising(AssertionError("ran")))
    assert cli.main(["two-words", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(
        words in text for words in ("clp two-words", "A command for the tests.", "--depth", "How deep.", "--overwrite")
    )
    assert "--no-overwrite" not in text


def test_a_word_that_no_record_could_hold_is_refused_before_the_command_runs(command, capsys):
    seen = []
    command(seen.append)
    assert cli.main(["two-words", "--depth", "3", os.fsdecode(b"--out=\xff")]) == 2
    assert capsys.readouterr().err.startswith(r"error: '--out=\udcff' is no text in UTF-8")
    assert seen == []


def test_no_command_shows_the_commands_and_exits_with_2(capsys):
    assert cli.main([]) == 2
    stdout, stderr = capsys.readouterr()
    assert stdout == ""
    assert all(f"  {name} " in stderr for name in cli.COMMANDS)


@pytest.mark.parametrize("word", ["-h", "--help"])
def test_help_lists_the_commands(capsys, word):
    assert cli.main([word]) == 0
    stdout = capsys.readouterr().out
    assert all(f"  {name} " in stdout for name in cli.COMMANDS)
    assert all(f"{way}:\n" in stdout for way in cli.WAYS)
    lines = stdout.splitlines()
    assert len(lines) < 40 and max(map(len, lines)) < 80, "it fits a small terminal"


@pytest.mark.parametrize(
    ("word", "hint"), [("prun", "did you mean 'prune'?"), ("xyz", "the commands are inspect, check, norm-stats")]
)
def test_an_unknown_command_is_told_which_there_are(capsys, word, hint):
    assert cli.main([word]) == 2
    assert capsys.readouterr().err.startswith(f"error: there is no command '{word}': {hint}")


def test_help_and_typing_errors_load_no_heavy_package():
    heavy = {"jax", "jaxlib", "flax", "numpy", "orbax", "tensorstore", "matplotlib", "tyro", "rich"}
    program = (
        "import sys; from clp_jax.cli import main;"
        f"main(['--help']); main(['prun']); main(['--version']); sys.exit(', '.join({heavy!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr == "error: there is no command 'prun': did you mean 'prune'?\n\n"


def test_a_command_that_starts_loads_only_what_all_need():
    rare = {"scipy", "orbax", "optax", "grain", "matplotlib", "PIL"}
    program = f"import sys, clp_jax.commands.prune; sys.exit(', '.join({rare!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr == "\n"


def test_every_command_has_a_script_and_every_script_a_command():
    assert sorted(SCRIPTS.get(name, name.replace("-", "_")) for name in cli.COMMANDS) == LAUNCHERS


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_a_command_is_one_frozen_dataclass_and_run(name):
    module = importlib.import_module(f"clp_jax.commands.{name.replace('-', '_')}")
    config_class = getattr(module, name.title().replace("-", ""))
    assert dataclasses.is_dataclass(config_class)
    assert vars(config_class)["__dataclass_params__"].frozen
    assert callable(module.run)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_script_takes_the_flags_of_its_command(monkeypatch, capsys, name):
    command = {script: command for command, script in SCRIPTS.items()}.get(name, name.replace("_", "-"))
    assert cli.main([command, "--help"]) == 0
    of_the_command = capsys.readouterr().out
    monkeypatch.syspath_prepend(ROOT / "scripts")
    monkeypatch.setattr(sys, "argv", [f"scripts/{name}.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "scripts" / f"{name}.py"), run_name="__main__")
    assert stop.value.code == 0
    assert capsys.readouterr().out == of_the_command


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("inspect", "clp inspect needs CHECKPOINT; clp inspect --help lists all flags."),
        ("export --checkpoint x --out=q", "clp export needs --to; clp export --help lists all flags."),
        (
            "norm-stats --robot r --json",
            "clp norm-stats needs --data and --out; clp norm-stats --help lists all flags.",
        ),
        ("export --checkpoint x --out q --to lerobt", "--to"),  # what tyro calls it differs between releases
        ("prune --checkpoint x --out q --seed x", "--seed: invalid literal for int() with base 10: 'x'; clp prune"),
        ("advise --checkpoint x --data d --out o --steps", "--steps"),
    ],
)
@pytest.mark.parametrize("columns", ["40", "200"])
def test_flags_that_are_missing_or_wrong_are_one_line(words, message, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    assert cli.main(words.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert message in captured.err and "╭" not in captured.err


def test_a_script_without_clp_jax_says_how_to_install_it():
    words = [sys.executable, "-S", str(ROOT / "scripts" / "prune.py"), "--help"]  # -S: without site-packages
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: clp_jax is not installed for {sys.executable}: run `make install`")
    assert done.stderr.count("\n") == 1


def test_python_m_is_the_same_command_line():
    words = [sys.executable, "-m", "clp_jax", "prun"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "error: there is no command 'prun': did you mean 'prune'?\n")


BREAKS_OFF = """
import dataclasses, signal, sys, threading, time
from types import ModuleType
from clp_jax import cli
from clp_jax.commands.results import print_json
from clp_jax.outputs import staged

@dataclasses.dataclass(frozen=True)
class Slow:
    out: str

def run(config):
    with staged(config.out, by="clp slow") as folder:
        (folder / "half").write_text("half")
        threading.Thread(target=time.sleep, args=(600,)).start()  # as a compilation in a thread of XLA
        print("ready", flush=True)
        time.sleep(600)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what is in its background without
module = ModuleType("clp_jax.commands.slow")
vars(module).update(Slow=Slow, run=run)
sys.modules[module.__name__] = module
cli.COMMANDS["slow"] = "only in the tests"
cli.program(["slow", "--out", sys.argv[1]])
"""


@pytest.mark.parametrize(
    ("number", "code", "line"),
    [(signal.SIGTERM, 143, "error: ended by SIGTERM\n"), (signal.SIGINT, 130, "error: interrupted\n")],
)
def test_a_signal_ends_the_process_at_once_and_leaves_nothing_behind(tmp_path, number, code, line):
    words = [sys.executable, "-c", BREAKS_OFF, str(tmp_path / "out")]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        assert len(list(tmp_path.iterdir())) == 1
        process.send_signal(number)
        try:
            assert process.communicate(timeout=60)[1] == line
        finally:
            process.kill()
    assert process.returncode == code
    assert list(tmp_path.iterdir()) == []


def test_json_has_no_word_for_what_is_not_finite(capsys):
    print_json({"loss": math.nan, "ratios": [1.5, math.inf], "name": "π0"})
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {
        "loss": None,
        "ratios": [1.5, None],
        "name": "π0",
    }
