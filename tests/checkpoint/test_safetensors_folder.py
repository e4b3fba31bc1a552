"""What a folder of safetensors files holds, and every way in which one can be wrong."""

import json
import os
import shutil

import pytest
from safetensors_folders import (
    GROOT,
    INDEX,
    SMOLVLA,
    WEIGHTS,
    change_config,
    copied,
    header_of,
    sharded,
    tensors_of,
    write_file,
)

from clp_jax.checkpoint.safetensors.folder import fingerprint_folder, is_safetensors_folder, read_folder
from clp_jax.errors import InputError


@pytest.fixture
def folder(tmp_path):
    return copied(SMOLVLA, tmp_path / "policy")


def rewrite(folder, change) -> None:
    """Lets a function change the tensors of a single file."""
    tensors = tensors_of(folder)
    change(tensors)
    write_file(folder / WEIGHTS, tensors)


def refused(folder, match: str) -> None:
    with pytest.raises(InputError, match=match) as caught:
        read_folder(folder)
    assert "\n" not in str(caught.value)


def test_a_smolvla_policy_is_recognised_with_its_towers():
    spec = read_folder(SMOLVLA)
    assert spec.kind == "smolvla" and spec.index is None and spec.plan_record is None
    assert spec.depths == {"vision": 3, "vlm": 12, "action": 12} and spec.groups == (("vlm", "action"),)
    assert [tower.period for tower in spec.towers] == [1, 2, 2]
    assert len(spec.others) == 4 and len(spec.tensors) == 284
    name = "model.vlm_with_expert.lm_expert.layers.11.mlp.up_proj.weight"
    assert spec.tensors[name].shape == (256, 36) and spec.tensors[name].dtype == "F32"
    assert spec.block_of(name) == ("action", 11, name.replace("11", "{block}"))
    assert spec.block_of("model.vlm_with_expert.lm_expert.norm.weight") is None


def test_a_groot_folder_is_recognised_with_its_towers():
    spec = read_folder(GROOT)
    assert spec.kind == "groot_n15" and spec.depths == {"vision": 3, "llm": 12, "vl": 4, "dit": 16}
    assert {tower.name: tower.period for tower in spec.towers} == {"vision": 1, "llm": 1, "vl": 1, "dit": 2}


@pytest.mark.parametrize(
    ("changes", "period"),
    [
        ({"self_attn_every_n_layers": 1}, 1),
        ({"self_attn_every_n_layers": -1}, 1),
        ({"attention_mode": "self_attn"}, 1),
        ({}, 2),
    ],
)
def test_what_smolvla_alternates_follows_its_config(changes, period, folder):
    def same_kind(tensors):
        for name in list(tensors):
            if "lm_expert" in name and ("k_proj" in name or "v_proj" in name) and period == 1:
                tensors[name] = ("F32", (2,), b"\0" * 8)

    change_config(folder, lambda config: config.update(changes))
    rewrite(folder, same_kind)
    assert {tower.period for tower in read_folder(folder).towers[1:]} == {period}


@pytest.mark.parametrize(("count", "spread"), [(2, False), (3, True), (4, True)])
def test_shards_hold_what_one_file_holds(count, spread, tmp_path):
    spec, whole = read_folder(sharded(GROOT, tmp_path / "s", count, spread=spread)), read_folder(GROOT)
    assert len(spec.shards) == count and spec.depths == whole.depths
    assert {k: (t.shape, t.dtype) for k, t in spec.tensors.items()} == {
        k: (t.shape, t.dtype) for k, t in whole.tensors.items()
    }


def test_names_may_lack_or_carry_the_prefix_of_the_wrapper(folder, tmp_path):
    def bare(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    rewrite(folder, bare)
    assert read_folder(folder).depths == read_folder(SMOLVLA).depths
    groot = copied(GROOT, tmp_path / "groot")
    write_file(groot / WEIGHTS, {f"_groot_model.{name}": tensor for name, tensor in tensors_of(GROOT).items()})
    assert read_folder(groot).depths == read_folder(GROOT).depths


def test_the_fingerprint_is_of_the_content(folder, tmp_path):
    first = fingerprint_folder(read_folder(folder))
    assert first == fingerprint_folder(read_folder(SMOLVLA))  # a copy
    (folder / "README.md").write_text("about")
    assert first == fingerprint_folder(read_folder(folder))
    name = "model.vlm_with_expert.lm_expert.layers.5.mlp.up_proj.weight"

    def train(tensors):
        dtype, shape, content = tensors[name]
        tensors[name] = (dtype, shape, content[:-1] + bytes([content[-1] ^ 1]))

    rewrite(folder, train)
    second = fingerprint_folder(read_folder(folder))
    change_config(folder, lambda config: config.update(chunk_size=8))
    assert len({first, second, fingerprint_folder(read_folder(folder))}) == 3


def test_looks_of_a_folder(folder, tmp_path):
    assert is_safetensors_folder(folder) and is_safetensors_folder(SMOLVLA)
    assert not is_safetensors_folder(tmp_path) and not is_safetensors_folder(tmp_path / "none")
    assert not is_safetensors_folder("gs://bucket/step") and not is_safetensors_folder(folder / WEIGHTS)


# What is no such folder


def test_what_is_no_folder_of_a_family_says_what_it_is(folder, tmp_path):
    refused(tmp_path / "none", "is not there")
    refused(folder / WEIGHTS, "is a file; give a folder")
    refused("gs://bucket/policy", "is remote")
    (tmp_path / "step" / "pretrained_model").mkdir(parents=True)
    refused(tmp_path / "step", "training step of lerobot; give its folder .*pretrained_model")
    change_config(folder, lambda config: config.update(type="act"))
    refused(folder, "has type 'act'; folders of safetensors that clp_jax can cut are smolvla, groot")
    (folder / "config.json").write_text('{"a": 1}')
    refused(folder, "only the keys \\['a'\\]")
    (folder / "config.json").unlink()
    refused(folder, "has no config.json; it holds model.safetensors, ")


def test_lerobots_groot_policy_is_refused_with_the_reason(tmp_path):
    folder = copied(GROOT, tmp_path / "groot")
    (folder / "config.json").write_text('{"type": "groot", "base_model_path": "nvidia/GR00T-N1.5-3B"}')
    refused(folder, "rebuilds GR00T from its base_model_path .nvidia/GR00T-N1.5-3B.")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"type": "smolvla", "type": "smolvla"}', "\xff", "[" * 100_000])
def test_a_config_that_is_no_json_object(text, folder):
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    refused(folder, "config.json (is no valid JSON|must hold a JSON object|is no text in UTF-8)")


# Weights and config that do not fit each other


def test_depths_that_the_config_contradicts(folder, tmp_path):
    change_config(folder, lambda config: config.update(num_vlm_layers=16))
    refused(folder, "says 16 blocks of tower 'vlm', but the weights hold 12")
    change_config(folder, lambda config: config.update(num_vlm_layers="12"))
    refused(folder, "num_vlm_layers is '12', not a whole number")
    groot = copied(GROOT, tmp_path / "groot")
    change_config(groot, lambda config: config["backbone_cfg"].update(select_layer=5))
    refused(groot, "says 5 blocks of tower 'llm', but the weights hold 12")
    change_config(groot, lambda config: config.pop("backbone_cfg"))
    refused(groot, "backbone_cfg.select_layer is None, not a whole number")


def test_a_gap_in_the_blocks(folder):
    def without(tensors):
        for name in [name for name in tensors if "text_model.layers.4." in name]:
            del tensors[name]

    rewrite(folder, without)
    refused(folder, "tower 'vlm' of .* has block 11, but not block 4")


def test_a_block_that_lacks_a_tensor(folder):
    name = "model.vlm_with_expert.lm_expert.layers.7.mlp.up_proj.weight"
    rewrite(folder, lambda tensors: tensors.pop(name))
    refused(folder, "block 7 of tower 'action' lacks model.vlm_with_expert.lm_expert.layers.7.mlp.up_proj.weight")


def test_a_tower_without_tensors(folder):
    def without(tensors):
        for name in [name for name in tensors if "lm_expert.layers" in name]:
            del tensors[name]

    rewrite(folder, without)
    refused(folder, "holds no tensors of tower 'action'")


def test_blocks_that_do_not_alternate_as_the_config_says(folder):
    change_config(folder, lambda config: config.update(self_attn_every_n_layers=3))
    refused(folder, "k_proj.weight of tower 'action' has shape .* in block 0, but .* in block 3; .*config.json")


# The index


@pytest.fixture
def shards(tmp_path):
    return sharded(GROOT, tmp_path / "shards", 2)


def change_index(folder, change) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def test_an_index_that_does_not_fit_its_files(shards):
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    name = next(key for key in header_of(shards / first) if key != "__metadata__")
    before = (shards / INDEX).read_text()
    for change, match in [
        (lambda index: index["weight_map"].update(more=first), "puts more into .*00001.*, which does not hold it"),
        (lambda index: index["weight_map"].update({name: second}), "into .*00002.*, but it is in .*00001"),
        (lambda index: index["weight_map"].pop(name), "which model.safetensors.index.json lacks"),
        (lambda index: index["weight_map"].update(more="model-00009-of-00002.safetensors"), "which is not there"),
        (lambda index: index["weight_map"].update(more="../x.safetensors"), "no name of a file beside it"),
        (lambda index: index["weight_map"].update(more=3), "into 3, which is no name of a file"),
        (lambda index: index["weight_map"].clear(), "no weight_map, or an empty one"),
        (lambda index: index.update(metadata=[]), "metadata that is no JSON object"),
    ]:
        change_index(shards, change)
        refused(shards, match)
        (shards / INDEX).write_text(before)
    read_folder(shards)


def test_weights_that_are_missing_or_left_over(shards, folder):
    shutil.copy(folder / WEIGHTS, shards / WEIGHTS)
    refused(shards, "holds model.safetensors, which model.safetensors.index.json does not name")
    (shards / INDEX).unlink()
    refused(shards, "holds model.safetensors and model-00001-of-00002.safetensors, one of several")
    (shards / WEIGHTS).unlink()
    refused(shards, "no model.safetensors.index.json that says what belongs to it")
    (folder / WEIGHTS).unlink()
    refused(folder, "neither model.safetensors nor model.safetensors.index.json")


def test_a_tensor_that_two_shards_hold(shards):
    first, second = sorted(shards.glob("*.safetensors"))
    tensors = tensors_of(shards)
    ours = [name for name in header_of(first) if name != "__metadata__"]
    theirs = [name for name in header_of(second) if name != "__metadata__"]
    write_file(second, {name: tensors[name] for name in [ours[0], *theirs]})
    refused(shards, f"has the tensor {ours[0]} twice, in {first.name} and {second.name}")


# Files that are not files


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "README.md"])
def test_a_pipe_in_place_of_a_file_does_not_hang(name, folder):
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    refused(folder, f"{name} is a pipe, socket or device")


def test_a_folder_in_place_of_a_file(folder):
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()
    refused(folder, "neither model.safetensors nor")


def test_links_that_lead_outside_are_refused(folder, tmp_path):
    outside = tmp_path / "elsewhere"
    outside.write_text("secret")
    (folder / "note").symlink_to(outside)
    refused(folder, "note is a link to .*elsewhere, outside of the checkpoint")
    (folder / "note").unlink()
    (folder / "note").symlink_to("missing")
    refused(folder, "note is a link to missing, which is not there")
    (folder / "note").unlink()
    (folder / "note").symlink_to("note")
    refused(folder, "note is a link to note, which is not there")
    (folder / "note").unlink()
    (folder / "note").symlink_to(tmp_path)
    refused(folder, "outside of the checkpoint")
    (folder / "note").unlink()
    (folder / "note").symlink_to("config.json")
    assert read_folder(folder).others["note"] == folder / "config.json"


def hub_snapshot(cache, source):
    """A folder as the hub's client leaves it: links into the blobs beside it."""
    snapshot = cache / "models--a--b" / "snapshots" / "0123"
    blobs = cache / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(source.iterdir())):
        shutil.copy(file, blobs / f"sha{number}")
        (snapshot / file.name).symlink_to(f"../../blobs/sha{number}")
    return snapshot


def test_a_snapshot_of_the_hub_is_followed_into_its_blobs(tmp_path):
    snapshot = hub_snapshot(tmp_path, SMOLVLA)
    spec = read_folder(snapshot)
    assert spec.depths == read_folder(SMOLVLA).depths and len(spec.others) == 4
    assert fingerprint_folder(spec) == fingerprint_folder(read_folder(SMOLVLA))
    (tmp_path / "link").symlink_to(snapshot)
    assert read_folder(tmp_path / "link").depths == spec.depths
