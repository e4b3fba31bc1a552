"""A cut folder: the kept tensors bit for bit under their new numbers, everything else as it was."""

import json

import pytest
from checkpoints import RECORD
from safetensors_folders import (
    GROOT,
    GROOT_PRUNED,
    INDEX,
    SMOLVLA,
    WEIGHTS,
    change_config,
    copied,
    groot_keep,
    header_of,
    sharded,
    tensors_of,
    write_file,
    write_index,
)

from clp_jax.checkpoint.safetensors.folder import read_folder
from clp_jax.checkpoint.safetensors.slicing import slice_folder
from clp_jax.errors import InputError
from clp_jax.outputs import MANIFEST

SMOLVLA_CUTS = [[0, 1, 4, 5, 8, 11], [2, 3, 4, 9, 10]]
HEAD = "backbone.eagle_model.language_model.lm_head.weight"
EMBEDDING = "backbone.eagle_model.language_model.model.embed_tokens.weight"


def coupled(blocks: list[int]) -> dict[str, list[int]]:
    return {"vlm": blocks, "action": blocks}


def smolvla_expected(keep: list[int]) -> dict:
    """What a cut of the recorded policy must hold, found without the code under test."""
    expected = {}
    for name, tensor in tensors_of(SMOLVLA).items():
        for stack in ("text_model.layers.", "lm_expert.layers."):
            if stack in name:
                before, _, after = name.partition(stack)
                block, _, rest = after.partition(".")
                if int(block) in keep:
                    expected[f"{before}{stack}{keep.index(int(block))}.{rest}"] = tensor
                break
        else:
            expected[name] = tensor
    return expected


@pytest.mark.parametrize("keep", SMOLVLA_CUTS)
def test_a_smolvla_policy_is_cut(keep, tmp_path):
    seen = []
    report = slice_folder(
        read_folder(SMOLVLA), coupled(keep), tmp_path / "out", progress=lambda done, total: seen.append((done, total))
    )
    expected, got = smolvla_expected(keep), tensors_of(tmp_path / "out")
    assert got == expected
    config = json.loads((SMOLVLA / "config.json").read_text())
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config | {"num_vlm_layers": len(keep)}
    for file in SMOLVLA.iterdir():
        if file.name not in ("config.json", WEIGHTS):
            assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    written = {file.name for file in (tmp_path / "out").iterdir()}
    assert written == {file.name for file in SMOLVLA.iterdir()} | {MANIFEST}
    size = sum(len(content) for _, _, content in got.values())
    others = sum(file.stat().st_size for file in SMOLVLA.iterdir() if file.name not in ("config.json", WEIGHTS))
    assert report.bytes_out == size and seen[-1] == (size + others, size + others)
    assert report.leaves == len(got) and report.sliced == 9 * 2 * len(keep) and report.notes == ()
    assert read_folder(tmp_path / "out").depths == {"vision": 3, "vlm": len(keep), "action": len(keep)}


def test_the_recorded_cut_of_groot_is_reproduced(tmp_path):
    slice_folder(read_folder(GROOT), groot_keep(), tmp_path / "out")
    assert tensors_of(tmp_path / "out") == tensors_of(GROOT_PRUNED)
    config, recorded = ((f / "config.json").read_text() for f in (tmp_path / "out", GROOT_PRUNED))
    assert json.loads(config) == json.loads(recorded)
    assert header_of(tmp_path / "out" / WEIGHTS)["__metadata__"] == header_of(GROOT / WEIGHTS)["__metadata__"]


@pytest.mark.parametrize(("count", "spread"), [(2, False), (3, True), (4, False)])
def test_shards_are_cut_like_one_file(count, spread, tmp_path):
    source = sharded(GROOT, tmp_path / "source", count, spread=spread)
    slice_folder(read_folder(source), groot_keep(), tmp_path / "out")
    got = tensors_of(tmp_path / "out")
    assert got == tensors_of(GROOT_PRUNED)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"] == {"total_size": sum(len(content) for _, _, content in got.values())}
    for file in sorted(source.glob("*.safetensors")):
        cut = header_of(tmp_path / "out" / file.name)
        assert cut["__metadata__"] == {"format": "pt"}
        assert {name for name, where in index["weight_map"].items() if where == file.name} == cut.keys() - {
            "__metadata__"
        }
    assert read_folder(tmp_path / "out").depths == {"vision": 3, "llm": 5, "vl": 3, "dit": 8}


def test_a_total_of_parameters_in_the_index_is_counted_anew(tmp_path):
    source = sharded(GROOT, tmp_path / "source", 2)
    index = json.loads((source / INDEX).read_text())
    write_index(source, index["weight_map"], {"total_parameters": 1, "total_size": 1, "more": "kept"})
    slice_folder(read_folder(source), groot_keep(), tmp_path / "out")
    size = sum(len(content) for _, _, content in tensors_of(GROOT_PRUNED).values())
    metadata = json.loads((tmp_path / "out" / INDEX).read_text())["metadata"]
    assert metadata == {"total_parameters": size // 4, "total_size": size, "more": "kept"}


def test_a_shard_that_loses_all_its_tensors_is_left_out(tmp_path):
    source, tensors = copied(GROOT, tmp_path / "source"), tensors_of(GROOT)
    alone = {name for name in tensors if ".vl_self_attention.transformer_blocks.2." in name}
    files = {"model-00001-of-00002.safetensors": tensors.keys() - alone, "model-00002-of-00002.safetensors": alone}
    for file, names in files.items():
        write_file(source / file, {name: tensors[name] for name in sorted(names)})
    write_index(source, {name: file for file, names in files.items() for name in names})
    (source / WEIGHTS).unlink()
    report = slice_folder(read_folder(source), groot_keep(), tmp_path / "out")
    assert report.notes == ("model-00002-of-00002.safetensors was left out: none of its tensors stay",)
    assert [file.name for file in (tmp_path / "out").glob("*.safetensors")] == ["model-00001-of-00002.safetensors"]
    assert tensors_of(tmp_path / "out") == tensors_of(GROOT_PRUNED)


def test_tensors_keep_their_order_in_header_and_data(tmp_path):
    slice_folder(read_folder(GROOT), groot_keep(), tmp_path / "out")
    source, cut = header_of(GROOT / WEIGHTS), header_of(tmp_path / "out" / WEIGHTS)
    kept = [
        name for name in source if ".norm1.linear.weight" in name and int(name.split(".")[3]) in groot_keep()["dit"]
    ]
    numbers = [groot_keep()["dit"].index(int(name.split(".")[3])) for name in kept]
    assert [int(name.split(".")[3]) for name in cut if ".norm1.linear.weight" in name] == numbers
    others = [name for name in source if ".transformer_blocks." not in name and ".layers." not in name]
    assert [name for name in cut if ".transformer_blocks." not in name and ".layers." not in name] == others


def test_keeping_all_changes_nothing(tmp_path):
    source = copied(SMOLVLA, tmp_path / "source")
    (source / "config.json").write_text((source / "config.json").read_text() + "\n\n")
    slice_folder(read_folder(source), {}, tmp_path / "out")
    assert tensors_of(tmp_path / "out") == tensors_of(source)
    assert (tmp_path / "out" / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_two_cuts_are_one(tmp_path):
    slice_folder(read_folder(GROOT), {"llm": [0, 1, 3, 5, 7], "dit": [0, 1, 2, 7, 8, 11]}, tmp_path / "first")
    slice_folder(read_folder(tmp_path / "first"), {"llm": [0, 2, 4], "dit": [2, 3], "vl": [1]}, tmp_path / "second")
    slice_folder(read_folder(GROOT), {"llm": [0, 3, 7], "dit": [2, 7], "vl": [1]}, tmp_path / "once")
    for name in (WEIGHTS, "config.json"):
        assert (tmp_path / "second" / name).read_bytes() == (tmp_path / "once" / name).read_bytes()


def test_the_config_keeps_its_form(tmp_path):
    slice_folder(read_folder(SMOLVLA), coupled(SMOLVLA_CUTS[0]), tmp_path / "out")
    before = (SMOLVLA / "config.json").read_text().splitlines()
    after = (tmp_path / "out" / "config.json").read_text().splitlines()
    assert [(a, b) for a, b in zip(before, after, strict=True) if a != b] == [
        ('    "num_vlm_layers": 12,', '    "num_vlm_layers": 6,')
    ]


def test_an_expert_depth_of_its_own_follows(tmp_path):
    source = copied(SMOLVLA, tmp_path / "source")
    change_config(source, lambda config: config.update(num_expert_layers=12))
    slice_folder(read_folder(source), coupled([0, 1]), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_vlm_layers"] == config["num_expert_layers"] == 2


# The tied head of GR00T


def test_a_head_alone_gets_its_embedding_table(tmp_path):
    source, tensors = copied(GROOT, tmp_path / "source"), tensors_of(GROOT)
    table = tensors.pop(EMBEDDING)
    write_file(source / WEIGHTS, tensors)
    report = slice_folder(read_folder(source), groot_keep(), tmp_path / "out")
    assert report.notes == (f"{EMBEDDING} was added with the bytes of {HEAD}, because stock loaders need it",)
    got = tensors_of(tmp_path / "out")
    assert got[EMBEDDING] == got[HEAD] == table and got == tensors_of(GROOT_PRUNED)
    shards = sharded(source, tmp_path / "shards", 3)
    slice_folder(read_folder(shards), groot_keep(), tmp_path / "cut")
    assert tensors_of(tmp_path / "cut") == got
    read_folder(tmp_path / "cut")  # the index names the new tensor


@pytest.mark.parametrize("absent", [[], [HEAD]])
def test_an_embedding_table_is_enough(absent, tmp_path):
    source, tensors = copied(GROOT, tmp_path / "source"), tensors_of(GROOT)
    for name in absent:
        del tensors[name]
    write_file(source / WEIGHTS, tensors)
    report = slice_folder(read_folder(source), groot_keep(), tmp_path / "out")
    expected = {name: tensor for name, tensor in tensors_of(GROOT_PRUNED).items() if name not in absent}
    assert report.notes == () and tensors_of(tmp_path / "out") == expected


# Files around the weights


def test_other_files_are_carried_and_bookkeeping_is_not(tmp_path):
    source = copied(GROOT, tmp_path / "source")
    for name in ("experiment_cfg/metadata.json", ".git/config", ".cache/huggingface/x.metadata", "a/.git", "README.md"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(b"\xff" + name.encode())
    (source / "clp.json").write_text(json.dumps(RECORD))
    report = slice_folder(read_folder(source), groot_keep(), tmp_path / "out")
    files = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert files == {"config.json", WEIGHTS, MANIFEST, "experiment_cfg/metadata.json", "a/.git", "README.md"}
    assert (tmp_path / "out/experiment_cfg/metadata.json").read_bytes() == b"\xffexperiment_cfg/metadata.json"
    assert [note.split()[0] for note in report.notes] == [".git", ".cache"]


def test_what_an_export_says_of_its_weights_does_not_speak_for_a_cut(tmp_path):
    source = copied(GROOT, tmp_path / "source")
    spoken, kept = ("export.json", "README.md", "check.npz", "check_groot.py"), ("load_lerobot.py", "eagle/README.md")
    for name in (*spoken, *kept):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("{}")
    report = slice_folder(read_folder(source), groot_keep(), tmp_path / "out")
    assert {note.split()[0] for note in report.notes} == set(spoken)
    assert not any((tmp_path / "out" / name).exists() for name in spoken)
    assert all((tmp_path / "out" / name).exists() for name in kept)


def test_links_of_the_hubs_cache_become_files(tmp_path):
    snapshot, blobs = tmp_path / "models" / "snapshots" / "0", tmp_path / "models" / "blobs"
    (snapshot / "experiment_cfg").mkdir(parents=True)
    blobs.mkdir()
    (blobs / "m").write_text("{}")
    (snapshot / "experiment_cfg" / "metadata.json").symlink_to("../../../blobs/m")
    for name in ("config.json", WEIGHTS):
        (blobs / name[:1]).write_bytes((GROOT / name).read_bytes())
        (snapshot / name).symlink_to(f"../../blobs/{name[:1]}")
    (blobs / "m").write_bytes((GROOT / WEIGHTS).read_bytes())
    slice_folder(read_folder(snapshot), groot_keep(), tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    assert tensors_of(tmp_path / "out") == tensors_of(GROOT_PRUNED)


# What cannot be meant


@pytest.mark.parametrize(
    ("keep", "match"),
    [
        ({"llm": []}, "cannot keep blocks \\[\\] of tower 'llm'"),
        ({"llm": [0, 12]}, "increasing numbers from 0 to 11"),
        ({"llm": [-1, 3]}, "increasing numbers from 0 to 11"),
        ({"llm": [3, 3]}, "increasing numbers"),
        ({"expert": [0]}, "no tower 'expert'; its towers are vision, llm, vl, dit"),
        ({"vision": [0, 1]}, "tower 'vision' must keep its 3 blocks"),
        ({"dit": [0, 3, 5]}, "tower 'dit': block 5 cannot take place 2, .*; keep 4 instead, or keep 6 instead"),
    ],
)
def test_blocks_that_cannot_be_kept(keep, match, tmp_path):
    with pytest.raises(InputError, match=match):
        slice_folder(read_folder(GROOT), keep, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_coupled_towers_keep_the_same_blocks(tmp_path):
    with pytest.raises(InputError, match=r"'vlm' and 'action' share one stack .*\[0, 1\] and \[0, 3\]"):
        slice_folder(read_folder(SMOLVLA), {"vlm": [0, 1], "action": [0, 3]}, tmp_path / "out")
    with pytest.raises(InputError, match="'vlm' and 'action' share one stack"):
        slice_folder(read_folder(SMOLVLA), {"vlm": [0, 1]}, tmp_path / "out")


def test_an_output_that_is_in_the_way(tmp_path):
    source = copied(SMOLVLA, tmp_path / "source")
    spec = read_folder(source)
    for out in (source, source / "inside", tmp_path):
        with pytest.raises(InputError, match="overlaps with the input"):
            slice_folder(spec, {}, out, overwrite=True)
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="exists already"):
        slice_folder(spec, {}, tmp_path / "out")
    with pytest.raises(InputError, match="is remote"):
        slice_folder(spec, {}, "gs://bucket/out")
    slice_folder(spec, {}, tmp_path / "out", overwrite=True)
    assert tensors_of(tmp_path / "out") == tensors_of(source)
