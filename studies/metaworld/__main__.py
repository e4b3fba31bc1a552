"""``python -m studies.metaworld STAGE --work DIR``: one stage of the study; what is finished is skipped."""

import argparse
from pathlib import Path

from studies.metaworld import base


def main() -> None:
    """Run the stage of the command line."""
    parser = argparse.ArgumentParser(prog="python -m studies.metaworld", description=__doc__)
    parser.add_argument("stage", choices=["base"])
    parser.add_argument("--work", type=Path, required=True, help="folder for data, checkpoints and runs (some GB)")
    arguments = parser.parse_args()
    work = arguments.work.absolute()
    base.make_base(work)


if __name__ == "__main__":
    main()
