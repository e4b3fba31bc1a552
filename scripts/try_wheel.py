"""Install the wheel in a folder into an empty environment outside of the repository, and use it there.

``python scripts/try_wheel.py dist``, as `make dist` does, tries the command, the embedded example and openpi_patches.
"""

import os
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

CONSTRAINTS = Path(__file__).resolve().parent.parent / "constraints" / "newest.txt"
MOST_MB = {".whl": 12, ".gz": 40}
"""The wheel holds the example, the sdist the recordings of the tests, too."""
EXAMPLE = "from clp_jax import example; print(example.CHECKPOINT, example.DEMONSTRATIONS)"


def main(folder: Path) -> int:
    """Try the one wheel in the folder; returns 0, or raises on the first step that fails."""
    (wheel,) = folder.glob("*.whl")
    (sdist,) = folder.glob("*.tar.gz")
    for file in (wheel, sdist):
        size, most = file.stat().st_size / 1e6, MOST_MB[file.suffix]
        if size > most:
            raise SystemExit(f"error: {file} has {size:.1f} MB; {most} are expected at most")
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
    if extra := {top for top in tops if not top.endswith(".dist-info")} - {"clp_jax", "openpi_patches"}:
        raise SystemExit(f"error: {wheel} also installs {', '.join(sorted(extra))}")
    with tempfile.TemporaryDirectory() as scratch:
        _try(wheel.resolve(), Path(scratch))
    print(f"{wheel.name} and {sdist.name}: installed into an empty environment and used there")
    return 0


def _try(wheel: Path, scratch: Path) -> None:
    environment = scratch / "environment"
    venv.create(environment, with_pip=True)
    programs = environment / "bin"

    def run(*words: str | Path) -> str:
        clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        done = subprocess.run(words, cwd=scratch, env=clean, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(
                f"error: {' '.join(map(str, words))} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
            )
        return done.stdout

    run(programs / "python", "-m", "pip", "install", "-qq", "--disable-pip-version-check", wheel, "-c", CONSTRAINTS)
    run(programs / "clp", "--help")
    run(programs / "python", "-c", "import openpi_patches")
    checkpoint, demonstrations = run(programs / "python", "-c", EXAMPLE).split()
    if not Path(checkpoint).is_relative_to(environment.resolve()):
        raise SystemExit(f"error: the example of {checkpoint} was used, not the wheel's")
    robot = ("--robot", "metaworld", "--norm-stats", "None", "--action-horizon", "8", "--max-token-len", "12")
    few = ("--max-observations", "12", "--keep-layers", "9", "--compare", "first")
    analyse = ("analyse", "--checkpoint", checkpoint, "--data", demonstrations, *robot, *few, "--out", "analysis")
    run(programs / "clp", *analyse)
    run(programs / "clp", "prune", "--checkpoint", checkpoint, "--analysis", "analysis", "--out", "pruned")
    run(programs / "clp", "inspect", "pruned", "--verify")


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
