"""Exports that need nothing but JAX: weights, files, cards, the command; its refusals."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import recordings
import toys
from checkpoints import assert_bit_equal, save_by_orbax

from clp_jax import export as exporters
from clp_jax.checkpoint import LeafReader, read_params, read_spec, write_params
from clp_jax.checkpoint.orbax.writer import ItemWriter
from clp_jax.checkpoint.safetensors.tensorfile import TensorWriter, read_tensors
from clp_jax.cli import main
from clp_jax.errors import InputError
from clp_jax.export.model_card import _reason
from clp_jax.export.weights import Weights
from clp_jax.models import abstract_params
from clp_jax.models.layers.torch_rules import from_tensors, tensors_of, to_tensors
from clp_jax.models.pi0 import STACKS, architecture_of, layout, zero_tensors
from clp_jax.models.pi0.layout import EXPERT_HEAD, VLM_HEAD
from clp_jax.models.pi0.lora import merge_lora
from clp_jax.models.stacks import blocks_of
from clp_jax.plan import PrunePlan
from clp_jax.provenance import training_record
from clp_jax.prune import apply_plan
from clp_jax.trees import flatten

STATS = {name: {"mean": [0.5] * d, "std": [2.0] * d} for name, d in (("state", 4), ("actions", 3))}


def eight_heads(kind: str = "pi0"):
    """A toy whose number of heads PyTorch's models accept."""
    arch = toys.architecture(kind)
    more = {"num_heads": 8, "head_dim": 4}
    return dataclasses.replace(
        arch, vlm=dataclasses.replace(arch.vlm, **more), action=dataclasses.replace(arch.action, **more)
    )


def save(folder, arch, assets=("robot",)):
    """A toy checkpoint with norm stats."""
    for name in assets:
        (folder / "stats" / name).mkdir(parents=True)
        (folder / "stats" / name / "norm_stats.json").write_text(json.dumps({"norm_stats": STATS}))
    write_params(folder / "full", params_of(arch), assets=folder / "stats")
    return folder / "full"


@functools.cache
def params_of(arch, seed: int = 0):
    return toys.params(arch, seed=seed)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A pruned π0 of eight heads, with its record."""
    folder = tmp_path_factory.mktemp("export")
    full = save(folder, eight_heads())
    assert main(["prune", "--checkpoint", str(full), "--keep", "0,3", "--out", str(folder / "pruned")]) == 0
    return folder / "pruned"


def export(checkpoint, out, to, *words) -> int:
    flags = ["--checkpoint", str(checkpoint), "--to", to, "--out", str(out), "--action-horizon", "4"]
    return main(["export", *flags, "--prompt-length", "5", *words])


def _chunks(step) -> dict[str, bytes]:
    """The files of all chunks."""
    return {str(file.relative_to(step)): file.read_bytes() for file in step.glob("params/params.*/[0-9]*")}


@pytest.mark.slow
def test_an_openpi_export_is_the_checkpoint_again(checkpoint, tmp_path, capsys):
    assert export(checkpoint, tmp_path / "e", "openpi") == 0
    assert "Largest difference" in capsys.readouterr().out
    assert_bit_equal(read_params(read_spec(checkpoint)), read_params(read_spec(tmp_path / "e")))
    assert (tmp_path / "e" / "clp.json").read_text() == (checkpoint / "clp.json").read_text()
    assert (tmp_path / "e" / "assets" / "robot" / "norm_stats.json").exists()
    record = json.loads((tmp_path / "e" / "export.json").read_text())
    assert record["check"]["largest_difference"] == 0.0
    assert record["architecture"]["vlm"]["depth"] == 2


def test_what_an_openpi_export_does_not_change_is_copied_as_it_is_stored_and_read_back(
    checkpoint, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(Weights, "parts", lambda *_: pytest.fail("encoded again"))
    assert export(checkpoint, tmp_path / "e", "openpi", "--check", "bits") == 0
    written = _chunks(tmp_path / "e")
    assert len(written) > 10 and written == _chunks(checkpoint)
    read = ItemWriter._compare
    monkeypatch.setattr(ItemWriter, "_compare", lambda *args: read(*args[:-1], args[-1] ^ 1))
    assert export(checkpoint, tmp_path / "f", "openpi", "--check", "bits") == 2
    assert "does not read back" in capsys.readouterr().err and not (tmp_path / "f").exists()


@pytest.mark.slow
def test_an_openpi_export_in_another_dtype_says_how_far_it_is(checkpoint, tmp_path):
    assert export(checkpoint, tmp_path / "e", "openpi", "--dtype", "bfloat16") == 0
    expected = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), read_params(read_spec(checkpoint)))
    assert_bit_equal(expected, read_params(read_spec(tmp_path / "e")))
    assert 0 < json.loads((tmp_path / "e" / "export.json").read_text())["check"]["largest_difference"] < 0.1


@pytest.mark.slow
def test_adapters_can_be_merged_on_the_way(tmp_path):
    arch = toys.architecture()
    arch = dataclasses.replace(arch, vlm=dataclasses.replace(arch.vlm, attn_lora_rank=2, ffn_lora_rank=3))
    full = save(tmp_path, arch)
    assert export(full, tmp_path / "e", "openpi", "--merge-lora", "--lora-scale", "0.5") == 0
    expected = merge_lora(read_params(read_spec(full)), lora_scale=0.5)
    assert_bit_equal(expected, read_params(read_spec(tmp_path / "e")))
    assert json.loads((tmp_path / "e" / "export.json").read_text())["check"]["largest_difference"] < 1e-4
    assert "LoRA adapters are merged" in (tmp_path / "e" / "README.md").read_text()


def test_raw_takes_the_live_weights_of_the_training_state(tmp_path, capsys):
    """openpi's layout: with EMA, params are the average and train_state holds what was being trained."""
    arch = toys.architecture()
    live = params_of(arch)
    average = jax.tree.map(lambda x: x / 2, live)
    step = tmp_path / "run" / "7"
    save_by_orbax(step, average, with_value=True)
    save_by_orbax(tmp_path / "other", live, with_value=True)
    shutil.move(tmp_path / "other" / "params", step / "train_state")
    assert export(step, tmp_path / "ema", "openpi", "--check", "bits") == 0
    assert export(step, tmp_path / "raw", "openpi", "--raw", "--check", "bits") == 0
    assert_bit_equal(average, read_params(read_spec(tmp_path / "ema")))
    assert_bit_equal(live, read_params(read_spec(tmp_path / "raw")))
    shutil.rmtree(step / "train_state")
    assert export(step, tmp_path / "none", "openpi", "--raw") == 2
    assert "leave out --raw" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("keep", "title"), [((0, 1, 2, 3), "# π0 for openpi"), ((0, 2), "# A pruned π0 for openpi")])
def test_the_card_calls_pruned_what_lacks_blocks(tmp_path, keep, title):
    """A record alone does not say so: one of a fine-tuning has it as well."""
    arch = toys.architecture()
    kept = {"vlm": keep, "action": keep}
    plan = PrunePlan.of(arch.kind, arch.depths, kept, coupled=arch.coupled)
    flags = {"data": "d", "steps": 1, "batch_size": 1}
    record = training_record(None, plan, {"source": "s", "config": flags}, {"step": 0}).to_json()
    write_params(tmp_path / "full", apply_plan(params_of(arch), plan), record=record)
    assert export(tmp_path / "full", tmp_path / "e", "openpi", "--check", "bits") == 0
    assert (tmp_path / "e" / "README.md").read_text().splitlines()[0] == title


@pytest.mark.slow
def test_a_run_is_exported_with_the_lengths_that_it_was_trained_with(checkpoint, tmp_path, capsys):
    """Not with upstream's chunk of 50 actions and 48 tokens, which nobody trained."""
    step = shutil.copytree(checkpoint, tmp_path / "8")
    record = json.loads((step / "clp.json").read_text())
    flags = {"action_horizon": 8, "max_token_len": 7, "data": "d", "steps": 1, "batch_size": 1}
    record["steps"].append({"command": "finetune", "source": "s", "config": flags})
    (step / "clp.json").write_text(json.dumps(record))
    words = ["--checkpoint", str(step), "--to", "lerobot", "--check", "bits"]
    assert main(["export", *words, "--out", str(tmp_path / "e")]) == 0
    config = json.loads((tmp_path / "e" / "config.json").read_text())
    assert (config["chunk_size"], config["n_action_steps"], config["tokenizer_max_length"]) == (8, 8, 7)
    assert main(["export", *words, "--out", str(tmp_path / "f"), "--action-horizon", "5"]) == 0
    config = json.loads((tmp_path / "f" / "config.json").read_text())
    assert (config["chunk_size"], config["tokenizer_max_length"]) == (5, 7)
    assert "assumed" not in capsys.readouterr().out


@pytest.mark.slow
def test_lengths_that_nobody_said_are_printed_and_written(checkpoint, tmp_path, capsys):
    words = ["export", "--checkpoint", str(checkpoint), "--to", "lerobot", "--check", "bits"]
    assert main([*words, "--out", str(tmp_path / "e"), "--prompt-length", "7"]) == 0
    said = "chunks of 50 actions, upstream's default, for the checkpoint does not say how it was trained"
    assert f"assumed: {said}" in capsys.readouterr().out
    assert f"## Conventions\n\nAssumed: {said}" in (tmp_path / "e" / "README.md").read_text()


@pytest.mark.parametrize(
    ("to", "kind", "words", "message"),
    [
        ("openpi-pytorch", "pi0_fast", (), "no π0-FAST"),
        ("lerobot", "pi0_fast", (), "no π0-FAST"),
        ("stablehlo", "pi0_fast", (), "token"),
        ("lerobot", "pi0", (), "8 attention heads"),
        ("stablehlo", "pi0", ("--platforms", "cpu,gpu"), "there is no platform gpu"),
        ("openpi", "pi0", ("--num-steps", "0"), "give at least 1"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(tmp_path, capsys, to, kind, words, message):
    full = save(tmp_path, toys.architecture(kind))
    assert export(full, tmp_path / "e", to, *words) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize(
    ("to", "words", "message"),
    [
        (
            "openpi",
            ("--platforms", "bogus", "--batch-size", "3", "--activations", "float32"),
            "--activations, --batch-size and --platforms: --to openpi writes no program; leave them out.",
        ),
        ("openpi", ("--asset-id", "robot"), "--asset-id: --to openpi chooses no norm stats; leave it out."),
        ("openpi-pytorch", ("--asset-id", "robot"), "--asset-id: --to openpi-pytorch chooses no norm stats"),
        ("openpi", ("--merge-lora",), "has no LoRA adapters; leave it out."),
        ("lerobot", ("--merge-lora",), "--merge-lora: --to lerobot merges adapters anyway"),
        ("lerobot", ("--platforms", "x"), "--platforms: --to lerobot writes no program"),
        ("stablehlo", ("--asset-id", "robot"), "--asset-id: --to stablehlo chooses no norm stats"),
    ],
)
def test_flags_of_other_targets_are_refused(checkpoint, tmp_path, capsys, to, words, message):
    assert export(checkpoint, tmp_path / "e", to, *words) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize(("asset_id", "is_named"), [("robot", False), ("physical-intelligence/libero", True)])
def test_only_statistics_that_the_checkpoint_has_are_named(tmp_path, capsys, asset_id, is_named):
    words = ["--checkpoint", str(save(tmp_path, toys.architecture(), assets=(asset_id,))), "--to", "openpi"]
    words += ["--openpi-config", "pi0_libero", "--check", "bits", "--out", str(tmp_path / "e")]
    assert main(["export", *words]) == 0
    record = json.loads((tmp_path / "e" / "export.json").read_text())
    assert record["options"]["asset_id"] == (asset_id if is_named else None)
    card = (tmp_path / "e" / "README.md").read_text()
    out = capsys.readouterr().out
    assert "openpi's configuration `pi0_libero`" in card and "Conventions: 50 actions" in out
    assert ["statistics physical-intelligence/libero" in text for text in (card, out)] == [is_named] * 2


def test_an_export_is_of_one_checkpoint(checkpoint, tmp_path, capsys, monkeypatch):
    step, (write, *rest) = shutil.copytree(checkpoint, tmp_path / "step"), exporters._EXPORTERS["openpi"]
    write_params(tmp_path / "other", params_of(toys.architecture().with_depths({"vlm": 2, "action": 2}), seed=1))

    def replaced(*args) -> None:
        write(*args)
        step.rename(tmp_path / "old")
        (tmp_path / "other").rename(step)

    monkeypatch.setitem(exporters._EXPORTERS, "openpi", exporters._Exporter(replaced, *rest))
    assert export(step, tmp_path / "e", "openpi", "--check", "bits") == 2
    assert not (tmp_path / "e").exists()


def test_nothing_is_overwritten_unasked(checkpoint, tmp_path, capsys):
    (tmp_path / "e").mkdir()
    assert export(checkpoint, tmp_path / "e", "openpi", "--check", "bits") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert export(checkpoint, tmp_path / "e", "openpi", "--check", "bits", "--overwrite") == 0
    assert export(checkpoint, "gs://bucket/e", "lerobot") == 2
    assert "no folder of this machine" in capsys.readouterr().err


def test_the_card_says_who_taught_and_which_depths_were_trained():
    flags = {
        "data": ["set"],
        "steps": 10,
        "batch_size": 2,
        "teacher": "big",
        "teacher_weight": 0.5,
        "depths": ["4", "2"],
    }
    said = _reason({"command": "finetune", "source": "base", "config": flags})
    assert "taught by `big` with weight 0.5, in turn at the depths 4, 2, at most 10 steps of 2" in said
    said = _reason({"command": "finetune", "source": "base", "config": flags | {"teacher": None, "depths": []}})
    assert "taught" not in said and "in turn" not in said


@pytest.mark.parametrize("to", ["openpi", "openpi-pytorch", "lerobot"])
def test_the_card_says_what_was_removed_how_to_load_and_under_which_terms(checkpoint, tmp_path, to):
    assert export(checkpoint, tmp_path / "e", to, "--check", "bits") == 0
    card = (tmp_path / "e" / "README.md").read_text()
    assert "| vlm | 4 | 2 | 1, 2 |" in card
    assert "Gemma terms" in card and "## Load" in card and "Not compared" in card
    assert "GFLOP" in card
    assert ("there is no check.npz" in card) == (to != "openpi")


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_every_parameter_has_its_place_in_pytorch_and_the_way_back_is_exact(kind):
    arch = eight_heads(kind)
    params = flatten(params_of(arch))
    leaves = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in params.items()}
    rules, blocks = layout(leaves), functools.partial(blocks_of, STACKS)
    parts = lambda path: iter(params[path] if stacked(path) else [params[path]])  # noqa: E731
    tensors = dict(to_tensors(leaves, rules, blocks, parts))
    declared = tensors_of(leaves, rules, blocks)
    assert list(declared) == list(tensors)
    assert list(zero_tensors(arch, leaves)) == [EXPERT_HEAD]
    assert all(declared[name].shape == tensor.shape for name, tensor in tensors.items())
    assert sum(tensor.size for tensor in tensors.values()) == sum(leaf.size for leaf in params.values())
    for path, i, array in from_tensors(leaves, rules, blocks, tensors):
        assert np.array_equal(array, params[path][i] if stacked(path) else params[path])


def stacked(path: str) -> bool:
    return "/layers/" in path or "/encoderblock/" in path


@pytest.mark.parametrize(("kind", "count"), [("pi0", 778), ("pi05", 813)])
def test_full_size_has_the_number_of_tensors_that_lerobot_has(kind, count):
    """lerobot 0.6.1 lists the token embedding twice, under its own name and as the tied head."""
    from clp_jax.models.pi0 import PI0, PI05

    arch = {"pi0": PI0, "pi05": PI05}[kind]
    leaves = flatten(abstract_params(arch))
    tensors = tensors_of(leaves, layout(leaves), functools.partial(blocks_of, STACKS)) | zero_tensors(arch, leaves)
    assert len(tensors) == count - 1
    assert tensors[VLM_HEAD].shape == (257_152, 2048)
    assert tensors[EXPERT_HEAD].shape == (257_152, 1024)
    layer = "paligemma_with_expert.paligemma.model.language_model.layers.17."
    assert tensors[f"{layer}self_attn.o_proj.weight"].shape == (2048, 2048)
    assert tensors[f"{layer}mlp.down_proj.weight"].shape == (2048, 16_384)


def test_weights_come_layer_by_layer_merged_and_cast():
    spec = read_spec(recordings.GOLDEN / "ckpt" / "pi0_lora_trained" / "1")
    architecture = architecture_of(spec.tree, lora_scale=2.0)
    weights = Weights(spec, architecture, merge=True, dtype="bfloat16")
    path = "PaliGemma/llm/layers/attn/attn_vec_einsum_1/w"
    expected = merge_lora(read_params(spec), lora_scale=2.0)
    layers = list(weights.parts(path))
    assert len(layers) == 18
    assert np.array_equal(np.stack(layers), flatten(expected)[path].astype(jnp.bfloat16))
    assert_bit_equal(jax.tree.map(lambda x: x.astype(jnp.bfloat16), expected), weights.read())


def test_a_tensor_file_is_what_was_written_and_refuses_what_is_not_finite(tmp_path):
    a, b = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones(5, ml_dtypes.bfloat16)
    shapes = {"a": jax.ShapeDtypeStruct(a.shape, a.dtype), "zero": jax.ShapeDtypeStruct((4,), np.float32)}
    shapes["b"] = jax.ShapeDtypeStruct(b.shape, b.dtype)
    with TensorWriter(tmp_path / "f", shapes, {"format": "pt"}) as writer:
        writer.write("a", iter(a))
        writer.write("zero", None)
        writer.write("b", [b])
    tensors = read_tensors(tmp_path / "f")
    assert np.array_equal(tensors["a"], a) and np.array_equal(tensors["b"], b) and not tensors["zero"].any()

    safetensors = pytest.importorskip("safetensors.flax", reason="needs safetensors")
    loaded = safetensors.load_file(tmp_path / "f")
    assert loaded.keys() == tensors.keys()
    assert all(np.array_equal(loaded[name], tensors[name]) for name in tensors)

    with (
        pytest.raises(InputError, match="a holds NaN or infinity"),
        TensorWriter(tmp_path / "g", shapes, {}) as writer,
    ):
        writer.write("a", [np.full_like(a, np.nan)])


def test_leaves_of_any_chunking_are_read_row_by_row(tmp_path):
    params = {"llm": {"layers": {"w": np.random.default_rng(0).standard_normal((3, 40, 50)).astype(np.float32)}}}
    for name, options in (("ocdbt", {}), ("folders", {"use_ocdbt": False})):
        save_by_orbax(tmp_path / name, params, **options)
        reader = LeafReader(read_spec(tmp_path / name))
        w = params["llm"]["layers"]["w"]
        assert all(np.array_equal(a, b) for a, b in zip(reader.layers("llm/layers/w"), w, strict=True))
        assert np.array_equal(reader.whole("llm/layers/w"), w)
