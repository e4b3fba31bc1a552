"""Exports of a GR00T: NVIDIA's folder again, from a folder or a step of a run, sharded where it is large."""

import json
import shutil

import groot_recordings as golden
import numpy as np
import pytest
from groot_recordings import GOLDEN, OUTPUT_TOLERANCE
from safetensors_folders import INDEX, WEIGHTS, copied, tensors_of, write_file

from clp_jax.checkpoint import read_spec, write_params
from clp_jax.cli import main
from clp_jax.export import tensors
from clp_jax.loading import load_model, read_architecture
from clp_jax.outputs.ownership import MANIFEST
from clp_jax.trees import flatten, unflatten

HEAD = "backbone.eagle_model.language_model.lm_head.weight"
EMBEDDING = "backbone.eagle_model.language_model.model.embed_tokens.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The pruned recording with statistics, Eagle's configuration and a record of its cut."""
    place = tmp_path_factory.mktemp("export")
    shutil.copytree(GOLDEN / "ckpt_pruned", place / "ckpt")
    shutil.copytree(GOLDEN / "eagle", place / "eagle")
    (place / "ckpt" / "experiment_cfg").mkdir()
    (place / "ckpt" / "experiment_cfg" / "metadata.json").write_text("{}")
    keep = [f"{name}={','.join(map(str, range(depth)))}" for name, depth in {"llm": 5, "vl": 2, "dit": 8}.items()]
    words = ["--checkpoint", place / "ckpt", "--keep", *keep, "--out", place / "cut"]
    assert main([str(word) for word in ("prune", *words)]) == 0
    return place / "cut"


@pytest.fixture(scope="module")
def step(folder, tmp_path_factory):
    """A step of a run that began from the folder and trained the token embedding, which its head then differs from."""
    place = tmp_path_factory.mktemp("run")
    policy = place / "assets" / "policy"
    shutil.copytree(folder, policy, ignore=shutil.ignore_patterns("model.safetensors", "clp.json"))
    shutil.copytree(folder.parent / "eagle", policy / "eagle")
    flat = flatten(load_model(folder, dtype="float32").params)
    flat |= {"backbone/llm/embed_tokens": flat["backbone/llm/embed_tokens"] + 1}
    write_params(
        place / "1", unflatten(flat), assets=place / "assets", record=json.loads((folder / "clp.json").read_text())
    )
    return place / "1"


def export(checkpoint, out, *words) -> int:
    return main(["export", "--checkpoint", str(checkpoint), "--to", "groot", "--out", str(out), *words])


def config_of(folder) -> dict:
    return json.loads((folder / "config.json").read_text())


def test_nvidias_folder_is_written_again(folder, tmp_path):
    """Every tensor bit for bit under its name; config and statistics as they were."""
    assert export(folder, tmp_path / "e", "--check", "bits") == 0
    assert tensors_of(tmp_path / "e") == tensors_of(folder)
    assert config_of(tmp_path / "e") == config_of(folder)
    assert (tmp_path / "e" / "experiment_cfg" / "metadata.json").read_text() == "{}"
    assert (tmp_path / "e" / "eagle" / "config.json").exists()
    card = (tmp_path / "e" / "README.md").read_text()
    assert "| vl | 3 | 2 | 2 |" in card and "NVIDIA's licence" in card and "from_pretrained" in card
    assert read_architecture(read_spec(tmp_path / "e")) == read_architecture(read_spec(folder))


def test_a_large_step_is_sharded_and_its_tied_head_is_the_embedding(step, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "SHARD_BYTES", 400_000)
    assert export(step, tmp_path / "e", "--check", "bits") == 0
    index = json.loads((tmp_path / "e" / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    assert not (tmp_path / "e" / WEIGHTS).exists()
    assert all((tmp_path / "e" / file).stat().st_size < 400_000 + 20_000 for file in files)
    written, source = tensors_of(tmp_path / "e"), tensors_of(folder)
    assert index["metadata"]["total_size"] == sum(len(content) for _, _, content in written.values())
    assert written.keys() == source.keys()
    assert {name for name in source if written[name] != source[name]} == {HEAD, EMBEDDING}
    assert written[HEAD] == written[EMBEDDING]
    assert read_architecture(read_spec(tmp_path / "e")) == read_architecture(read_spec(folder))


def test_a_file_with_the_head_alone_becomes_one_with_the_embedding(folder, tmp_path):
    alone = copied(folder, tmp_path / "alone")
    shutil.copytree(folder.parent / "eagle", alone / "eagle")
    (alone / MANIFEST).unlink()  # the arrays are changed on purpose
    stored = tensors_of(folder)
    write_file(alone / WEIGHTS, {name: tensor for name, tensor in stored.items() if name != EMBEDDING})
    assert export(alone, tmp_path / "e", "--check", "bits") == 0
    assert tensors_of(tmp_path / "e") == {name: tensor for name, tensor in stored.items() if name != HEAD}


def test_what_is_asked_for_reaches_the_config(step, tmp_path):
    words = ("--dtype", "bfloat16", "--action-horizon", "3", "--num-steps", "2", "--check", "bits")
    assert export(step, tmp_path / "e", *words) == 0
    config = config_of(tmp_path / "e")
    head = config["action_head_cfg"]
    assert (config["torch_dtype"], config["action_horizon"]) == ("bfloat16", 3)
    assert (head["action_horizon"], head["num_inference_timesteps"]) == (3, 2)
    assert {dtype for dtype, _, _ in tensors_of(tmp_path / "e").values()} == {"BF16"}


@pytest.mark.slow
def test_the_recorded_actions_are_the_models(folder, tmp_path):
    """What check_groot.py compares with; its prompts are padded on the left and have a place for every image token."""
    assert export(folder, tmp_path / "e", "--prompt-length", "31") == 0
    with np.load(tmp_path / "e" / "check.npz") as archive:
        arrays = dict(archive)
    assert ((arrays["tokenized_prompt"] == 327).sum(axis=1) == 16).all()
    assert arrays["tokenized_prompt_mask"].tolist()[1] == sorted(arrays["tokenized_prompt_mask"].tolist()[1])
    model = load_model(folder, dtype="float32")
    blank = {"actions": arrays["actions"], "time": np.zeros(2, np.float32), "sample_noise": arrays["noise"]}
    blank["action_mask"] = np.ones(arrays["actions"].shape, bool)
    out = golden.runner(model.architecture)(model.params, arrays | blank)
    assert golden.largest_difference(out["actions"], arrays["actions"]) < OUTPUT_TOLERANCE


def test_statistics_without_names_of_parts_are_told(step, tmp_path, capsys):
    whole = {"statistics": {"state": {"state": {}}, "action": {"arm": {}, "hand": {}}}}
    named = {"statistics": {"state": {"arm": {}}, "action": {"arm": {}, "hand": {}}}}
    changed = shutil.copytree(step, tmp_path / "changed")
    metadata = changed / "assets/policy/experiment_cfg/metadata.json"
    metadata.write_text(json.dumps({"new_embodiment": whole, "gr1": named}))
    assert export(changed, tmp_path / "e", "--check", "bits") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("as one part") == 1 and "of new_embodiment as one part" in said and "--data-config" in said
    assert export(step, tmp_path / "other", "--check", "bits") == 0
    assert "as one part" not in capsys.readouterr().out


def test_what_cannot_be_is_refused_in_one_line(step, tmp_path, capsys):
    def complaint(checkpoint) -> str:
        assert export(checkpoint, tmp_path / "e", "--check", "bits") == 2
        assert not (tmp_path / "e").exists()
        return capsys.readouterr().err

    bare = shutil.copytree(step, tmp_path / "bare")
    (bare / "assets" / "policy" / "config.json").unlink()
    assert complaint(bare).count("\n") == 1
    seen = shutil.copytree(step, tmp_path / "seen")
    record = json.loads((seen / "clp.json").read_text())
    record["plan"]["towers"]["vision"] = {"depth": 4, "keep": [0, 1, 2]}
    (seen / "clp.json").write_text(json.dumps(record))
    assert "the image encoder has 3 of 4 blocks" in complaint(seen)
