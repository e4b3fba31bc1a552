"""``python -m openpi_patches [--pruned CHECKPOINT] SCRIPT [arguments]``: run a script of openpi with the patches on."""

import argparse
import runpy
import sys
from pathlib import Path

from openpi_patches.depths import PatchError
from openpi_patches.patches import ENVIRONMENT, install


def main(words: list[str]) -> int:
    """Patches, then runs the script as ``python SCRIPT`` would."""
    parser = argparse.ArgumentParser(prog="python -m openpi_patches", description=__doc__)
    parser.add_argument(
        "--pruned",
        metavar="CHECKPOINT",
        help=f"build models as deep as this one, also where no weights are loaded (or ${ENVIRONMENT})",
    )
    parser.add_argument("script", help="for example scripts/train.py or scripts/serve_policy.py")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the script's own")
    flags = parser.parse_args(words)
    script = Path(flags.script)
    try:
        if not script.is_file():
            raise PatchError(f"there is no script {script}; run this in the folder of openpi.")
        install(flags.pruned)
    except (PatchError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    sys.argv = [flags.script, *flags.arguments]
    sys.path[0] = str(script.resolve().parent)
    runpy.run_path(flags.script, run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
