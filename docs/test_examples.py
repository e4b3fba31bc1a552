"""What the pages tell people to type, typed: the tutorial, the page on the library, and the notebook.

`make docs` runs it as tests, in its own environment. ``python docs/test_examples.py`` runs the notebook and saves what
it prints and draws.
"""

import re
import shlex
import shutil
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

from clp_jax import example
from clp_jax.cli import COMMANDS, main
from clp_jax.models.pi0.processing import CAMERAS

DOCS = Path(__file__).resolve().parent
NOTEBOOK = DOCS / "notebooks" / "clp.ipynb"
NOT_HERE = {"serve", "evaluate"}
"""Commands of the tutorial that run for ever, or need a simulator; tests/test_docs.py reads their flags."""


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A folder in which the paths of the pages lead to the example."""
    (tmp_path / "clp_jax").mkdir()
    shutil.copytree(example.FOLDER, tmp_path / "clp_jax" / "example")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def save_calibration():
    """Observations as a file of model-ready ones, which holds the cameras that the example lacks, too, as absent."""
    arrays = example.observations(16).arrays
    for camera in CAMERAS[1:]:
        arrays[f"image/{camera}"] = np.zeros_like(arrays[f"image/{CAMERAS[0]}"])
        arrays[f"image_mask/{camera}"] = np.zeros(16, bool)
    np.savez("calibration.npz", **arrays)


def test_the_tutorial_does_what_it_says(clone):
    text = (DOCS / "tutorial.md").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [shlex.split(line[2:]) for line in text.splitlines() if line.startswith("$ clp ")]
    assert len(lines) >= 9, "the tutorial lost its commands"
    codes = {name: set() for name in COMMANDS}
    for _, name, *flags in lines:
        if name not in NOT_HERE:
            codes[name].add(main([name, *flags]))
    assert {name for name, found in codes.items() if found - {0}} == {"inspect"}
    assert codes["inspect"] == {0, 1}, "the comparison of a cut with its source says that they differ"
    assert (clone / "run" / "59" / "clp.json").exists()
    assert (clone / "program" / "export.json").exists()


def test_the_page_on_the_library_runs(clone):
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / "library.md").read_text(encoding="utf-8"), re.DOTALL)
    shutil.copytree(example.CHECKPOINT, "CKPT")
    save_calibration()
    exec(compile(code, "library.md", "exec"), {})
    assert (clone / "pruned" / "clp.json").exists()


def test_the_page_on_criteria_runs(clone):
    page = (DOCS / "how-to" / "criterion.md").read_text(encoding="utf-8")
    library = (DOCS / "library.md").read_text(encoding="utf-8")
    rule, use = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    shutil.copytree(example.CHECKPOINT, "CKPT")
    save_calibration()
    (measure,) = re.findall(r"```python\n(.*?analyse\(model, data\))", library, re.DOTALL)
    save = "from pathlib import Path\nPath('analysis').mkdir()\nanalysis.save('analysis/similarity.npz')\n"
    exec(compile(f"{measure}\n{save}{rule}{use}", "criterion.md", "exec"), {})
    assert main(["prune", "--checkpoint", "CKPT", "--plan", "plan.json", "--out", "pruned"]) == 0


def test_the_notebook_runs_and_its_outputs_are_saved():
    saved = nbformat.read(NOTEBOOK, as_version=4)
    assert all(cell.execution_count for cell in saved.cells if cell.cell_type == "code"), (
        "run python docs/test_examples.py"
    )
    run_notebook()


def run_notebook() -> nbformat.NotebookNode:
    """Executes the notebook from the first cell to the last; an error in a cell is raised."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with_path = {"metadata": {"path": str(DOCS.parent)}}
    NotebookClient(notebook, timeout=600, resources=with_path, record_timing=False).execute()
    return notebook


def save_notebook() -> None:
    """Saves the notebook with its outputs; what it prints of its progress is left out."""
    notebook = run_notebook()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    sys.exit(save_notebook())
