"""Draw the pictures of README.md and docs/ again: the figures that `clp analyse` writes about the embedded example.

``python scripts/make_pictures.py`` takes half a minute on two cores and needs nothing but clp_jax.
"""

import sys
import tempfile
from pathlib import Path

from PIL import Image

from clp_jax.cli import main
from clp_jax.example import CHECKPOINT, DEMONSTRATIONS, HORIZON, PROMPT_TOKENS, ROBOT

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "pictures"
PICTURES = ("cka_vlm", "cka_action", "profile_vlm+action")
COMMAND = (
    *("analyse", "--checkpoint", CHECKPOINT, "--data", DEMONSTRATIONS, "--robot", ROBOT),
    *("--action-horizon", str(HORIZON), "--max-token-len", str(PROMPT_TOKENS), "--max-observations", "64"),
    *("--keep-layers", "9", "--criterion", "jumps"),
)
COLOURS = 96
"""Of a picture's palette: the difference cannot be seen, and the files are a third as large."""


def draw() -> int:
    """Analyse the example and keep its figures; returns the exit code of the command."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "analysis"
        if code := main([*COMMAND, "--out", str(out)]):
            return code
        FOLDER.mkdir(exist_ok=True)
        for name in PICTURES:
            with Image.open(out / f"{name}.png") as picture:
                file = FOLDER / f"{name.replace('+', '_')}.png"
                picture.convert("RGB").quantize(COLOURS).save(file, optimize=True)
    return 0


if __name__ == "__main__":
    sys.exit(draw())
