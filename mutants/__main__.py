"""``python -m mutants [NAME ...]``: put faults into copies of the code, one at a time, and see that a test fails."""

import argparse
import fnmatch
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from mutants.faults import MUTANTS
from mutants.mutant import Mutant
from mutants.running import copy_tracked, joined, judge_all, run_tests

ROOT = Path(__file__).parent.parent


def main() -> int:
    """The exit code: 0 if every chosen fault was noticed, 1 if not, 2 if nothing could be tried."""
    parser = argparse.ArgumentParser(prog="python -m mutants", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="faults to try, as patterns (ema-*); all by default")
    parser.add_argument("--list", action="store_true", help="print the faults and their tests, and try none")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="faults tried at the same time (default 1)")
    flags = parser.parse_args()
    unmatched = [name for name in flags.names if not fnmatch.filter((m.name for m in MUTANTS), name)]
    if unmatched:
        print(f"error: no fault is named {', '.join(unmatched)}; --list names all.", file=sys.stderr)
        return 2
    chosen = [m for m in MUTANTS if not flags.names or any(fnmatch.fnmatch(m.name, name) for name in flags.names)]
    if flags.list:
        for mutant in chosen:
            print(f"{mutant.name:32} {mutant.file:44} {' '.join(mutant.tests)}")
        return 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        return _try(chosen, Path(folder), jobs=max(1, flags.jobs))


def _try(mutants: Sequence[Mutant], folder: Path, *, jobs: int) -> int:
    start, clean = time.perf_counter(), folder / "clean"
    copy_tracked(ROOT, clean)
    print(f"{len(mutants)} faults; first their tests without any", flush=True)
    for tests in joined(mutants):
        code, detail = run_tests(clean, tests)
        if code:
            print(f"{detail}\nerror: these tests do not pass without a fault; mend them first.", file=sys.stderr)
            return 2
    missed = 0
    for outcome in judge_all(mutants, clean, folder / "scratch", jobs=jobs):
        print(f"{outcome.verdict:8} {outcome.seconds:6.1f} s  {outcome.mutant.name}", flush=True)
        if outcome.verdict != "killed":
            missed += 1
            told = outcome.detail if outcome.verdict == "STALE" else " ".join(outcome.mutant.tests)
            print(f"         {outcome.mutant.file}: {told}", flush=True)
    minutes = (time.perf_counter() - start) / 60
    print(f"{len(mutants) - missed} of {len(mutants)} faults were noticed, {minutes:.1f} minutes")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
