"""The command line ``clp NAME [flags]``: finds the command, reads its flags, turns errors into exit codes.

Exit codes:
  0    done; `finetune` and `serve` also when SIGTERM ended them in good order
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
import difflib
import importlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from typing import NoReturn

from clp_jax.errors import InputError
from clp_jax.machine import failure_of
from clp_jax.version import __version__

COMMANDS = {
    "inspect": "say what a checkpoint is, and how two of them differ, without loading a tensor",
    "analyse": "measure which layers are twins of their neighbours and propose a plan",
    "advise": "find the depth for a checkpoint and its task by short fine-tunes of equal time",
    "prune": "write the smaller checkpoint",
    "finetune": "train a checkpoint, on one device or a pod",
    "check": "prove that a LeRobot data set is whole: rows, times, tasks, videos, pictures",
    "norm-stats": "compute the statistics that normalise a robot's numbers",
    "export": "carry a checkpoint to openpi's PyTorch, lerobot or StableHLO, and compare",
    "serve": "answer openpi's clients over a websocket",
    "evaluate": "let a checkpoint or a server act in a simulator, and count successes",
    "plan-scale": "compile for TPU slices that are not here: memory, operations, least time",
    "benchmark": "compare speed, memory and size before and after",
    "demo": "walk the whole road on the small example model",
}

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
    name, *flags = words
    if name in ("-h", "--help"):
        print(_help())
    elif name == "--version":
        print(f"clp-jax {__version__}")
    elif name in COMMANDS:
        _run(name, flags)
    else:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"the commands are {', '.join(COMMANDS)}"
        raise InputError(f"there is no command '{name}': {hint}")
    return 0


def _run(name: str, flags: list[str]) -> None:
    """Reads the flags into the command's dataclass (``plan-scale``: ``PlanScale``) and runs the command."""
    import tyro

    from clp_jax.commands.ranges import check_ranges

    command = importlib.import_module(f"clp_jax.commands.{name.replace('-', '_')}")
    config_class = getattr(command, name.title().replace("-", ""))
    config = tyro.cli(config_class, prog=f"clp {name}", args=flags, config=(tyro.conf.FlagCreatePairsOff,))
    check_ranges(config)
    command.run(config)


def _help() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:{width}}  {summary}" for name, summary in COMMANDS.items())
    return f"""usage: clp NAME [flags]

Finds the twin layers of an openpi-style JAX checkpoint with CKA, and removes them.

{commands}

clp NAME --help   the flags of a command
clp --version     the version
--debug           with any command: the traceback of an error"""


def _fail(message: str, *, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    else:
        print(f"error: {message}", file=sys.stderr)
    return code
