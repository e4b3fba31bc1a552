"""``make attack``: damages inputs of every kind and counts what the product says about them.

``python -m attack --seeds 0 1 2 --rounds 200 --targets plan record``; exit code 1 if anything but an answer or a
refusal of one line came of it.
"""

import argparse
import collections
import faulthandler
import logging
import resource
import sys
import tempfile
import warnings
from pathlib import Path

from attack.running import HANG, OK, OUTCOMES, REFUSED, attack, leave, prove
from attack.targets import targets

_MEMORY = 4 * 2**30
"""Bytes of this process: what asks for all of the machine's fails early."""


def main() -> None:
    """Runs the attacks and prints a table."""
    parser = argparse.ArgumentParser(prog="make attack", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rounds", type=int, default=100, help="attacks per target and seed")
    parser.add_argument("--processes", type=int, default=2, help="how many of them as a process of their own")
    parser.add_argument("--targets", nargs="*", help="some of them; all if absent")
    parser.add_argument("--verbose", action="store_true", help="say what each attack was and what came of it")
    flags = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY, _MEMORY))
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    failed = hung = 0
    with tempfile.TemporaryDirectory() as name:
        known = targets(Path(name) / "sources")
        (Path(name) / "sources").mkdir()
        print(f"{'target':20}" + "".join(f"{outcome:>18}" for outcome in OUTCOMES), flush=True)  # noqa: T201
        for target_name in flags.targets or known:
            target = known[target_name]()
            prove(target, Path(name) / target_name)
            counts = collections.Counter()
            for seed in flags.seeds:
                for number in range(min(flags.rounds, target.rounds or flags.rounds)):
                    identity = f"{target_name} {seed} {number}"
                    faulthandler.dump_traceback_later(10 * target.seconds, exit=True)  # where no exception ends it
                    found = attack(target, identity, Path(name) / identity, as_process=number < flags.processes)
                    faulthandler.cancel_dump_traceback_later()
                    counts[found.outcome] += 1
                    bad = found.outcome not in (OK, REFUSED)
                    failed, hung = failed + bad, hung + (found.outcome == HANG)
                    if bad or flags.verbose:
                        print(f"{found.outcome}: {identity}: {found.how}\n{found.message}", flush=True)  # noqa: T201
            print(f"{target_name:20}" + "".join(f"{counts[outcome]:18}" for outcome in OUTCOMES), flush=True)  # noqa: T201
    (leave if hung else sys.exit)(int(failed > 0))


if __name__ == "__main__":
    main()
