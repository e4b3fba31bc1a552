"""``python -m studies.metaworld base --work DIR``: pre-train the base; what is finished is skipped."""

import argparse
from pathlib import Path

from studies.metaworld import base


def main() -> None:
    """Run the stage of the command line."""
    parser = argparse.ArgumentParser(prog="python -m studies.metaworld", description=__doc__)
    parser.add_argument("stage", choices=["base"])
    parser.add_argument("--work", type=Path, required=True, help="folder for data, checkpoints and runs (some GB)")
    arguments = parser.parse_args()
    base.make_base(arguments.work.absolute())


if __name__ == "__main__":
    main()
