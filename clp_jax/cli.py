"""The command line ``clp NAME [flags]``: finds the command, reads its flags, turns errors into exit codes.

Exit codes:
  0    done; `finetune`, `advise` and `serve` also when SIGTERM ended them in good order
  1    done, and the answer is no (`inspect --against` found a difference); or the machine failed (disk or memory
       full, no permission, connection lost, no such device: one line); or a bug of ours (traceback)
  2    what the user gave cannot be used: a flag, a path, a checkpoint, a plan, a data file
  130  interrupted (Ctrl-C)
  143  ended by SIGTERM
Nothing half-written is left behind in any of these cases.

A command is a module ``clp_jax/commands/NAME.py`` with one frozen dataclass, whose fields are the flags, and a function
``run(config)``. Nothing here imports JAX, so ``clp --help`` answers at once.
"""

import contextlib
import dataclasses
import difflib
import importlib
import io
import itertools
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Annotated, Any, NoReturn, get_args

from clp_jax.errors import InputError
from clp_jax.machine import failure_of
from clp_jax.version import __version__

WAYS = {
    "Look at what there is": {
        "inspect": "say what a checkpoint is, and how two of them differ",
        "check": "prove that a LeRobot data set is whole, or list what is wrong",
        "norm-stats": "compute the statistics that normalise a robot's numbers",
        "plan-scale": "say what a model needs on TPU slices that are not here",
    },
    "Make it smaller": {
        "analyse": "measure which blocks are twins of their neighbours, plan a cut",
        "advise": "find the depth for a task by short fine-tunes of equal time",
        "prune": "write the smaller checkpoint, and repair it if asked (--heal)",
        "finetune": "train a checkpoint, on one device or a pod",
    },
    "Take it to a robot": {
        "export": "write it for openpi, its PyTorch, lerobot, GR00T or StableHLO",
        "serve": "answer openpi's clients over a websocket",
        "evaluate": "let it act in a simulator, and count successes",
    },
    "Try it out": {
        "demo": "do all of this with the embedded example, in a few minutes",
        "benchmark": "measure time, memory and size before and after",
    },
}
"""Commands by the part of the work that they are for, with what ``clp --help`` says of them."""

COMMANDS = {name: summary for commands in WAYS.values() for name, summary in commands.items()}

_INTERRUPTED = 130
_ENDED = 143


class _Terminated(BaseException):
    """SIGTERM, raised wherever the main thread is."""


def program(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs one command line as a process of its own.

    Args:
      argv: as for `main`.
    """
    code = main(argv)
    if code in (_INTERRUPTED, _ENDED):
        # What was broken off may still compile or compute in threads of XLA. They crash when the interpreter is taken
        # down under them (SIGSEGV instead of the exit code), or keep the process until they are done.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line.

    Args:
      argv: the words after ``clp``; ``None`` takes those of this process. ``--debug``, anywhere, shows the traceback of
        an error that is otherwise one line.

    Returns:
      The exit code (see the module's docstring).
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    try:
        with _unwinding_on_sigterm():
            return _dispatch([word for word in words if word != "--debug"])
    except InputError as error:
        return _fail(str(error), code=2, debug=debug)
    except KeyboardInterrupt:
        return _fail("interrupted", code=_INTERRUPTED, debug=debug)
    except _Terminated:
        return _fail("ended by SIGTERM", code=_ENDED, debug=debug)
    except SystemExit as stop:  # tyro: 0 after --help, 2 after a wrong flag
        return int(stop.code or 0)
    except Exception as error:
        if (said := failure_of(error)) is None:
            raise
        return _fail(f"{said} (--debug shows where)", code=1, debug=debug)


@contextlib.contextmanager
def _unwinding_on_sigterm() -> Iterator[None]:
    """Turns SIGTERM into an exception, so that whoever writes something removes what is not complete."""

    def unwind(*_: object) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one does not disturb the cleaning up
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():  # of a program that uses commands as functions
        yield
        return
    before = signal.signal(signal.SIGTERM, unwind)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _dispatch(words: list[str]) -> int:
    if not words:
        print(_help(), file=sys.stderr)
        return 2
    _check_text(words)
    name, *flags = words
    if name in ("-h", "--help"):
        print(_help())
    elif name == "--version":
        print(f"clp-jax {__version__}")
    elif name.startswith("--tyro-"):
        _complete(words)
    elif name in COMMANDS:
        _run(name, flags)
    else:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"the commands are {', '.join(COMMANDS)}"
        raise InputError(f"there is no command '{name}': {hint}")
    return 0


def _check_text(words: Sequence[str]) -> None:
    """Bytes that are no UTF-8 reach Python as halves of surrogate pairs, which no record could be written with."""
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError:
            raise InputError(f"{word!a} is no text in UTF-8, in which records are written; give another") from None


def _run(name: str, flags: list[str]) -> None:
    config = read_flags(name, flags)
    from clp_jax.progress import heard

    with heard():
        _module(name).run(config)


def read_flags(name: str, flags: Sequence[str]) -> Any:
    """Reads the flags of a command, without running it.

    Args:
      name: one of `COMMANDS`.
      flags: the words after it.

    Returns:
      An instance of the command's `config_class`.

    Raises:
      InputError: a flag is not one of the command's, is missing, or has a value that it cannot have.
      SystemExit: with 0 after ``--help``.
    """
    import tyro

    from clp_jax.commands.ranges import check_ranges

    flags_of = config_class(name)
    _check_names(name, flags_of, flags)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            config = tyro.cli(flags_of, prog=f"clp {name}", args=flags, config=(tyro.conf.FlagCreatePairsOff,))
    except SystemExit as end:
        if not end.code:
            raise
        raise InputError(_in_one_line(name, flags_of, flags, said.getvalue())) from None
    sys.stderr.write(said.getvalue())
    check_ranges(config)
    return config


_RULE = re.compile("[-─]*").fullmatch
"""A line of nothing else, or an empty one, ends a part of such a box."""


def _in_one_line(name: str, flags_of: type, flags: Sequence[str], said: str) -> str:
    """What tyro says of a mistake in a box: a title, the mistake on several lines, and where help is to be had."""
    more = f"; clp {name} --help lists all flags."
    missing = [one for one in map(_required, dataclasses.fields(flags_of)) if one is not None]
    given = {word.partition("=")[0].replace("_", "-") for word in flags}
    missing = [one for one in missing if one not in given and (one.startswith("--") or not flags)]
    if missing:
        return f"clp {name} needs {' and '.join(missing)}{more}"
    title, *lines = [re.sub("[│╭╮╰╯]", "", line).strip() for line in said.strip().splitlines()]
    lines = itertools.dropwhile(_RULE, lines)
    message = " ".join(itertools.takewhile(lambda line: not _RULE(line), lines))
    return f"{message.rstrip('.') or title}{more}"


def _required(field: dataclasses.Field) -> str | None:
    """How a flag without a default is written; None for others."""
    import tyro

    if field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING:
        return None
    (positional,) = get_args(tyro.conf.Positional[str])[1:]
    is_positional = positional in get_args(field.type)
    return field.name.upper() if is_positional else f"--{field.name.replace('_', '-')}"


def config_class(name: str) -> type:
    """The dataclass whose fields are a command's flags: ``PlanScale`` of ``plan-scale``."""
    return getattr(_module(name), name.title().replace("-", ""))


def _complete(words: list[str]) -> None:
    """Lets tyro write a shell's completions of all commands (``--tyro-print-completion``); it then ends the process."""
    import functools
    import operator

    import tyro

    commands = [Annotated[config_class(name), tyro.conf.subcommand(name)] for name in COMMANDS]
    any_of: Any = functools.reduce(operator.or_, commands)
    tyro.cli(any_of, prog="clp", args=words, config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes))


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"clp_jax.commands.{name.replace('-', '_')}")


def _check_names(name: str, flags_of: type, flags: Sequence[str]) -> None:
    """One line about the first mistyped flag; tyro would rather list the required ones that are not there."""
    defaults = {field.name.replace("_", "-"): field.default for field in dataclasses.fields(flags_of)}
    known = {f"--no-{flag}" if default is True else f"--{flag}" for flag, default in defaults.items()}
    # A switch can only be moved away from where it stands.
    where_it_stands = {f"--{flag}": f"--no-{flag}" for flag, default in defaults.items() if default is True}
    where_it_stands |= {f"--no-{flag}": f"--{flag}" for flag, default in defaults.items() if default is False}
    for word in flags:
        flag = word.partition("=")[0].replace("_", "-")
        if not word.startswith("--") or flag in known or flag == "--help" or flag.startswith("--tyro-"):
            continue
        close = difflib.get_close_matches(flag, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"clp {name} --help lists those that there are"
        if flag in where_it_stands:
            hint = f"leave it out, that holds unless {where_it_stands[flag]} is given"
        raise InputError(f"clp {name} has no flag {word.partition('=')[0]}: {hint}")


def _help() -> str:
    width = max(map(len, COMMANDS))
    ways = "\n\n".join(
        "\n".join([f"{way}:", *(f"  {name:{width}}  {summary}" for name, summary in commands.items())])
        for way, commands in WAYS.items()
    )
    return f"""usage: clp COMMAND [flags]

Finds the blocks of a vision-language-action model that are twins of their
neighbours, removes them, and carries the smaller model to a robot.

{ways}

clp COMMAND --help  lists the flags of a command.
clp --version       says the version.
--debug             with any command shows the traceback of an error.

Exit codes: 0 done; 1 done, and the answer is no, or the machine failed;
2 what was given cannot be used; 130 Ctrl-C; 143 SIGTERM."""


def _fail(message: str, *, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    else:
        print(f"error: {message}", file=sys.stderr)
    return code
