"""Exports of a SmolVLA: the policy folder again, from a folder or a step of a run; a program without model code."""

import importlib.util
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors_folders import SMOLVLA, change_config, tensors_of, write_file
from smolvla_recordings import KEEPS, SAMPLE_TOLERANCE, architecture, cut, params

from clp_jax.checkpoint import read_spec, write_params
from clp_jax.cli import main
from clp_jax.models import smolvla
from clp_jax.outputs import MANIFEST
from clp_jax.plan import PrunePlan
from clp_jax.prune_folder import prune_folder

KEEP = list(KEEPS[""])
PROCESSORS = ("policy_preprocessor", "policy_postprocessor")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pruned policy folder, its record in it and the vision-language model beside it."""
    place = tmp_path_factory.mktemp("export")
    shutil.copytree(SMOLVLA.parent / "vlm", place / "vlm")
    spec = read_spec(SMOLVLA)
    plan = PrunePlan.of(spec.kind, spec.depths, {"vlm": KEEP, "action": KEEP}, coupled=spec.groups)
    prune_folder(spec, plan, place / "pruned")
    return place / "pruned"


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """A step of a run that began from the pruned folder, trained on chunks of four actions."""
    place = tmp_path_factory.mktemp("run")
    policy = place / "assets" / "policy"
    shutil.copytree(folder, policy, ignore=shutil.ignore_patterns("model.safetensors", "clp.json"))
    shutil.copytree(folder.parent / "vlm", policy / "vlm")
    record = json.loads((folder / "clp.json").read_text())
    flags = {"action_horizon": 4, "data": "d", "steps": 1, "batch_size": 1}
    record["steps"].append({"command": "finetune", "source": "s", "config": flags})
    write_params(place / "1", cut(params(), tuple(KEEP)), assets=place / "assets", record=record)
    return place / "1"


def export(checkpoint, out, to, *words) -> int:
    return main(["export", "--checkpoint", str(checkpoint), "--to", to, "--out", str(out), *words])


def config_of(folder) -> dict:
    return json.loads((folder / "config.json").read_text())


def test_a_policy_folder_is_written_again(folder, tmp_path):
    """Every tensor bit for bit under its name; config, processors and statistics as they were."""
    assert export(folder, tmp_path / "e", "lerobot", "--check", "bits") == 0
    written = tmp_path / "e"
    assert tensors_of(written) == tensors_of(folder)
    assert config_of(written) == config_of(folder)
    assert config_of(written)["num_vlm_layers"] == len(KEEP)
    for name in PROCESSORS:
        assert json.loads((written / f"{name}.json").read_text()) == json.loads((folder / f"{name}.json").read_text())
    statistics = sorted(file.name for file in written.glob("policy_*.safetensors"))
    assert len(statistics) == len(PROCESSORS)
    assert all((written / name).read_bytes() == (folder / name).read_bytes() for name in statistics)
    assert (written / "clp.json").read_text() == (folder / "clp.json").read_text()
    assert {"config.json", "tokenizer.json"} <= {file.name for file in (written / "vlm").iterdir()}
    record = json.loads((written / "export.json").read_text())
    assert record["architecture"]["vlm"]["depth"] == len(KEEP)


def test_an_unpruned_folder_is_written_again(tmp_path):
    assert export(SMOLVLA, tmp_path / "e", "lerobot", "--check", "bits") == 0
    assert tensors_of(tmp_path / "e") == tensors_of(SMOLVLA)
    assert not (tmp_path / "e" / "clp.json").exists()


def test_a_step_of_a_run_becomes_the_same_folder_with_the_lengths_it_was_trained_with(run, folder, tmp_path):
    assert export(run, tmp_path / "e", "lerobot", "--check", "bits") == 0
    assert tensors_of(tmp_path / "e") == tensors_of(folder)
    assert "As trained: 4 actions" in (tmp_path / "e" / "README.md").read_text()
    changed = {"chunk_size": 4, "n_action_steps": 4}
    assert config_of(tmp_path / "e") == config_of(folder) | changed
    assert (tmp_path / "e" / "vlm" / "tokenizer.json").exists()


def test_lengths_and_steps_that_are_asked_for_reach_config_and_tokenizer(run, tmp_path):
    words = ("--prompt-length", "12", "--num-steps", "3", "--action-horizon", "6", "--check", "bits")
    assert export(run, tmp_path / "e", "lerobot", *words) == 0
    asked = {"chunk_size": 6, "n_action_steps": 5, "tokenizer_max_length": 12, "num_steps": 3}
    assert asked.items() <= config_of(tmp_path / "e").items()
    steps = json.loads((tmp_path / "e" / "policy_preprocessor.json").read_text())["steps"]
    assert [step["config"]["max_length"] for step in steps if "max_length" in step["config"]] == [12]


@pytest.mark.parametrize(
    ("words", "whose"),
    [
        ((), "As trained: 7 actions, 24 tokens"),
        (("--action-horizon", "3"), "As asked; the checkpoint's own files say 7 actions and 24 tokens: 3 actions"),
    ],
)
def test_the_card_says_whose_the_lengths_are(words, whose, tmp_path):
    assert export(SMOLVLA, tmp_path / "e", "lerobot", "--check", "bits", *words) == 0
    assert whose in (tmp_path / "e" / "README.md").read_text()


def test_dtypes_stay_as_they_are_stored_unless_one_is_asked_for(folder, tmp_path):
    """lerobot stores the vision-language model in bfloat16 and the projections in float32."""
    mixed = shutil.copytree(folder, folder.parent / "mixed")
    tensors = {name: _as_bfloat16(tensor) if ".vlm." in name else tensor for name, tensor in tensors_of(folder).items()}
    write_file(mixed / "model.safetensors", tensors, {"format": "pt"})
    (mixed / MANIFEST).unlink()  # of the arrays as they were
    assert export(mixed, tmp_path / "e", "lerobot", "--check", "bits") == 0
    assert tensors_of(tmp_path / "e") == tensors
    assert export(mixed, tmp_path / "f", "lerobot", "--check", "bits", "--dtype", "float32") == 0
    assert tensors_of(tmp_path / "f") == tensors_of(folder)


def _as_bfloat16(tensor):
    _, shape, content = tensor
    return "BF16", shape, np.frombuffer(content, np.float32).astype(jnp.bfloat16).tobytes()


@pytest.mark.slow
def test_the_recorded_actions_are_the_models(folder, tmp_path):
    """What check_lerobot.py compares with, sampled here from the parameters of the recordings."""
    assert export(folder, tmp_path / "e", "lerobot") == 0
    with np.load(tmp_path / "e" / "check.npz") as archive:
        arrays = dict(archive)
    expected, noise = arrays.pop("actions"), arrays.pop("noise")
    assert not arrays["image_mask/observation.images.side"].any()
    model = smolvla.build(architecture().with_depths({"vlm": len(KEEP), "action": len(KEEP)}))
    sample = jax.jit(lambda *given: smolvla.sample(model, *given[:2], noise=given[2], num_steps=10))
    actions = sample(cut(params(), tuple(KEEP)), arrays, noise)
    np.testing.assert_allclose(actions, expected, rtol=0, atol=SAMPLE_TOLERANCE)
    card = (tmp_path / "e" / "README.md").read_text()
    assert "| vlm | 12 | 6 | 2, 3, 6, 7, 9, 10 |" in card
    assert "strict=True" in card and "Apache-2.0" in card


def test_what_cannot_be_is_refused_in_one_line(folder, run, tmp_path, capsys):
    def complaint(checkpoint, to) -> str:
        assert export(checkpoint, tmp_path / "e", to, "--check", "bits") == 2
        assert not (tmp_path / "e").exists()
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    assert "openpi has no SmolVLA to export to; use --to lerobot or --to stablehlo" in complaint(folder, "openpi")
    assert "openpi-pytorch has no SmolVLA" in complaint(run, "openpi-pytorch")
    lacking = shutil.copytree(folder, folder.parent / "lacking")
    (lacking / "policy_postprocessor.json").unlink()
    assert "lacking has no policy_postprocessor.json" in complaint(lacking, "lerobot")
    seen = shutil.copytree(run, tmp_path / "seen")
    record = json.loads((seen / "clp.json").read_text())
    record["plan"]["towers"]["vision"] = {"depth": 4, "keep": [0, 1, 2]}
    (seen / "clp.json").write_text(json.dumps(record))
    assert "the image encoder has 3 of 4 blocks" in complaint(seen, "lerobot")


def test_an_export_may_lie_beside_its_source_but_not_in_it(folder, tmp_path, capsys):
    assert export(folder, folder / "e", "lerobot", "--check", "bits") == 2
    assert "overlaps" in capsys.readouterr().err
    assert export(folder, folder.parent / "beside", "lerobot", "--check", "bits") == 0
    change_config(folder.parent / "beside", lambda config: config.update(num_vlm_layers=5))
    assert export(folder.parent / "beside", tmp_path / "e", "lerobot") == 2


@pytest.mark.slow
def test_a_program_runs_without_model_code_on_any_batch(folder, tmp_path):
    pytest.importorskip("safetensors", reason="needs safetensors")
    assert export(folder, tmp_path / "e", "stablehlo", "--activations", "float32", "--platforms", "cpu") == 0
    record = json.loads((tmp_path / "e" / "export.json").read_text())
    assert record["check"]["largest_difference"] < SAMPLE_TOLERANCE
    policy = tmp_path / "e" / "assets" / "policy"
    assert config_of(policy) == config_of(folder)
    assert not (policy / "model.safetensors").exists()
    assert (policy / "policy_preprocessor_step_5_normalizer_processor.safetensors").exists()
    found = importlib.util.spec_from_file_location("load_stablehlo", tmp_path / "e" / "load_stablehlo.py")
    loader = importlib.util.module_from_spec(found)
    found.loader.exec_module(loader)
    with np.load(tmp_path / "e" / "check.npz") as archive:
        arrays = {key: np.concatenate([archive[key], archive[key][:1]]) for key in archive.files}
    expected = arrays.pop("actions")
    actions = loader.load(tmp_path / "e")(**arrays)
    assert actions.shape == (3, 7, 11)
    np.testing.assert_allclose(actions, expected, rtol=0, atol=SAMPLE_TOLERANCE)


def test_statistics_without_a_name_are_not_chosen(folder, tmp_path, capsys):
    words = ("--checkpoint", str(folder), "--to", "lerobot", "--out", str(tmp_path / "e"), "--asset-id", "foo")
    assert main(["export", *words]) == 2
    assert "--asset-id: the checkpoint's own files hold its statistics, without a name" in capsys.readouterr().err
