"""The portable program: runs without our model code, at any batch, and says who can read it."""

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
import toys
from test_export import export, save

pytestmark = pytest.mark.slow

pytest.importorskip("safetensors", reason="needs safetensors")
pytest.importorskip("flatbuffers", reason="needs flatbuffers")


def loader(folder):
    spec = importlib.util.spec_from_file_location("load_stablehlo", folder / "load_stablehlo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stablehlo")
    checkpoint = save(folder, toys.architecture())
    assert export(checkpoint, folder / "e", "stablehlo", "--activations", "float32") == 0
    return folder / "e"


def test_the_program_was_compared_and_gives_the_model_s_actions(exported):
    """The command ran the loader in a process of its own; here it runs again, at other batch sizes."""
    check = json.loads((exported / "export.json").read_text())["check"]
    assert check["missing"] is None and check["largest_difference"] < 1e-5
    signature = json.loads((exported / "signature.json").read_text())
    assert signature["inputs"]["noise"] == {"shape": ["b", "4", "6"], "dtype": "float32"} or (
        signature["inputs"]["noise"] == {"shape": ["b", 4, 6], "dtype": "float32"}
    )
    assert signature["platforms"] == ["cpu", "cuda", "tpu"]
    sample = loader(exported).load()
    with np.load(exported / "check.npz") as archive:
        arrays = dict(archive)
    expected = arrays.pop("actions")
    one = sample(**{name: array[:1] for name, array in arrays.items()})
    assert np.abs(np.asarray(one) - expected[:1]).max() < 1e-4
    with pytest.raises(TypeError, match="the inputs are"):
        sample(state=arrays["state"])


def test_the_loader_needs_nothing_of_ours(exported):
    code = "import runpy, sys; sys.argv = ['load_stablehlo.py']\n"
    code += f"try: runpy.run_path({str(exported / 'load_stablehlo.py')!r}, run_name='__main__')\n"
    code += "except SystemExit as stop: assert not stop.code\n"
    code += "assert not {name for name in sys.modules if name.split('.')[0] in ('clp_jax', 'orbax')}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "largest difference" in done.stdout


def test_damaged_weights_are_seen(exported, tmp_path):
    import shutil

    shutil.copytree(exported, tmp_path / "e")
    content = bytearray((tmp_path / "e" / "model.safetensors").read_bytes())
    content[-40:] = np.full(10, 3.0, np.float32).tobytes()
    (tmp_path / "e" / "model.safetensors").write_bytes(content)
    assert loader(tmp_path / "e").largest_difference(tmp_path / "e") > 1e-3


def test_what_is_not_installed_is_said_before_anything_is_read(tmp_path, monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "flatbuffers" else found(name))
    assert export(save(tmp_path, toys.architecture()), tmp_path / "e", "stablehlo") == 2
    assert 'pip install "clp-jax[export]"' in capsys.readouterr().err
    assert not (tmp_path / "e").exists()
