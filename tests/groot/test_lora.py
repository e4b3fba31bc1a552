"""Adapters of a GR00T: the model begins as it was, only they are trained, and a merged model answers alike."""

import dataclasses
import functools
import json
import shutil

import groot_recordings as golden
import jax
import numpy as np
import pytest
from checkpoints import assert_bit_equal
from groot_recordings import GOLDEN, OUTPUT_TOLERANCE

from clp_jax.checkpoint import read_params, read_spec
from clp_jax.cli import main
from clp_jax.errors import InputError
from clp_jax.loading import load_model, read_architecture
from clp_jax.models import abstract_params, groot
from clp_jax.models.groot import lora
from clp_jax.models.groot.dropout import SEED
from clp_jax.models.layers.lora import is_adapter
from clp_jax.sharding import make_mesh
from clp_jax.training.adapters import init_adapters, with_adapters
from clp_jax.training.freezing import frozen_paths
from clp_jax.trees import flatten, unflatten

pytestmark = pytest.mark.slow

RANKS = 2, 3, 4


@functools.cache
def adapted(ranks: tuple[int, ...] = RANKS) -> groot.Architecture:
    return with_adapters(golden.architecture("ckpt_pruned"), ranks)


@functools.cache
def fresh() -> dict:
    return init_adapters(adapted(), jax.random.key(0), make_mesh(1))


def params(adapters: dict) -> dict:
    return unflatten(flatten(golden.checkpoint("ckpt_pruned")) | flatten(adapters))


@functools.cache
def alive(deviation: float) -> dict:
    """Parameters with adapters that do something."""
    rng = np.random.default_rng(0)
    return params(jax.tree.map(lambda leaf: (deviation * rng.standard_normal(leaf.shape)).astype(np.float32), fresh()))


@functools.cache
def velocity(architecture: groot.Architecture):
    model = groot.build(architecture)
    return jax.jit(lambda params, inputs: groot.forward(model, params, inputs)[0])


def test_the_model_begins_as_it_was_to_the_bit():
    before = velocity(golden.architecture("ckpt_pruned"))(golden.checkpoint("ckpt_pruned"), golden.inputs())
    assert np.array_equal(before, velocity(adapted())(params(fresh()), golden.inputs()))


def test_adapters_begin_as_pefts():
    for path, leaf in flatten(fresh()).items():
        if path.endswith("lora_b"):
            assert not np.any(leaf)
        else:
            bound = leaf.shape[-2] ** -0.5
            assert 0.8 * bound < np.abs(leaf).max() <= bound
    at = {path.rpartition("/")[0] for path in flatten(fresh())}
    towers = (
        "backbone/llm/layers",
        "action_head/vl_self_attention/blocks",
        *(f"action_head/dit/{k}" for k in ("cross", "self")),
    )
    vision = "backbone/vision/Transformer/encoderblock/MultiHeadDotProductAttention_0"
    expected = {f"{tower}/attn/{name}" for tower in towers for name in "qkv"}
    assert at == expected | {f"{vision}/{name}" for name in ("query", "key", "value")}


def test_a_merged_model_answers_alike():
    ours = velocity(adapted())(alive(0.05), golden.inputs())
    plain = lora.without_adapters(adapted())
    assert plain == golden.architecture("ckpt_pruned")
    merged = lora.merge_lora(alive(0.05), architecture=adapted())
    assert flatten(merged).keys() == flatten(golden.checkpoint("ckpt_pruned")).keys()
    found = velocity(plain)(merged, golden.inputs())
    assert golden.largest_difference(found, ours) < OUTPUT_TOLERANCE
    before = velocity(plain)(golden.checkpoint("ckpt_pruned"), golden.inputs())
    assert golden.largest_difference(before, ours) > 0.01


@pytest.mark.parametrize(("ranks", "leaves_out"), [((0, 3), True), ((2, 0, 4), False)])
def test_training_leaves_out_inputs_of_adapters_but_for_those_of_the_backbone(ranks, leaves_out):
    arch = adapted(ranks)
    still = {tower: dataclasses.replace(getattr(arch, tower), dropout=0.0) for tower in ("vl", "dit")}
    arch = dataclasses.replace(arch, **still)
    names = flatten(abstract_params(arch))
    tree = unflatten({path: leaf for path, leaf in flatten(alive(0.3)).items() if path in names})
    seeds = {SEED: np.array([3, 4, 3], np.uint32)}
    given = {key: np.concatenate([array[:1]] * 3) for key, array in golden.inputs().items()}
    plain, left = (np.asarray(velocity(arch)(tree, given | more)) for more in ({}, seeds))
    assert np.array_equal(left[0], left[2])
    if not leaves_out:
        np.testing.assert_allclose(left, plain, atol=OUTPUT_TOLERANCE)
        return
    assert np.abs(left - plain).max() > 1e-3
    assert np.abs(left[0] - left[1]).max() > 1e-3


def test_upstreams_adapters_are_of_the_action_head_with_alpha_16():
    arch = adapted(())
    assert arch.llm.adapters is arch.vision.adapters is None
    assert (arch.dit.adapters.rank, arch.dit.adapters.scale, arch.dit.adapters.dropout) == (32, 0.5, 0.1)
    wide = with_adapters(dataclasses.replace(golden.architecture("ckpt_pruned"), lora_scale=2.0), (4, 8, 2))
    assert [getattr(wide, tower).adapters.rank for tower in ("llm", "vl", "dit", "vision")] == [4, 8, 8, 2]
    assert {getattr(wide, tower).adapters.scale for tower in ("llm", "vl", "dit", "vision")} == {2.0}
    assert lora.lora_scale(wide, "backbone/llm/layers/attn/q/kernel") == 2.0
    assert lora.lora_scale(adapted(), "action_head/dit/self/attn/q/kernel") == 16 / 3
    for ranks, message in (((0, 0), "--lora-ranks 0 0 0 gives no adapter"), ((-1, 4), "gives no adapter")):
        with pytest.raises(InputError, match=message):
            with_adapters(golden.architecture("ckpt_pruned"), ranks)
    with pytest.raises(InputError, match="adapters already"):
        with_adapters(adapted(), RANKS)


def test_adapters_alone_are_trained_and_a_tree_tells_their_ranks():
    leaves = flatten(abstract_params(adapted()))
    frozen = frozen_paths(tuple(leaves), default=groot.frozen_rules(adapted()))
    assert {path for path in leaves if path not in frozen} == {path for path in leaves if is_adapter(path)}
    mixed = {path: leaf.shape for path, leaf in leaves.items()}
    assert lora.ranks_of(mixed) == {"vision": 4, "llm": 2, "vl": 3, "dit": 3}
    mixed["action_head/dit/self/attn/q/lora_a"] = (4, 36, 5)
    with pytest.raises(InputError, match=r"tower 'dit' have ranks \[3, 5\]"):
        lora.ranks_of(mixed)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A checkpoint, observations, and a run of two steps on its adapters."""
    folder = tmp_path_factory.mktemp("lora")
    shutil.copytree(GOLDEN / "ckpt_pruned", folder / "ckpt")
    shutil.copytree(GOLDEN / "eagle", folder / "eagle")
    rows = golden.inputs()
    stored = {key: np.concatenate([rows[key]] * 4) for key in rows if key not in ("noise", "time", "sample_noise")}
    np.savez(folder / "data.npz", **stored)
    assert main(words(folder, "run", "2")) == 0
    return folder


def words(folder, out: str, steps: str, *flags: str) -> list[str]:
    given = ["--checkpoint", folder / "ckpt", "--data", folder / "data.npz", "--out", folder / out, "--steps", steps]
    given += ["--batch-size", "8", "--lora", "--lora-ranks", *RANKS, "--peak-lr", "0.01", "--warmup-steps", "0"]
    return [str(word) for word in ("finetune", *given, "--decay-steps", "2", "--evaluate-every", "0", *flags)]


def test_ranks_without_lora_are_refused(capsys):
    folder = GOLDEN / "ckpt_pruned"
    given = ["--checkpoint", folder, "--vlm-config", GOLDEN / "eagle", "--data", "x.npz", "--out", "x"]
    assert main([str(word) for word in ("finetune", *given, "--steps", "1", "--lora-ranks", "2")]) == 2
    assert "error: --lora-ranks is for new adapters; give --lora, too, or leave it out." in capsys.readouterr().err


def test_frozen_parameters_stay_to_the_bit_and_adapters_move(place):
    before = flatten(load_model(place / "ckpt", dtype="float32").params)
    after = flatten(read_params(read_spec(place / "run/1")))
    assert {path for path in after if path not in before} == {path for path in after if is_adapter(path)}
    assert_bit_equal(unflatten({path: after[path] for path in before}), unflatten(before))
    assert all(np.any(leaf) for path, leaf in after.items() if path.endswith("lora_b"))
    architecture = read_architecture(read_spec(place / "run/1"))
    assert (architecture.llm.adapters.rank, architecture.vision.adapters.rank) == (2, 4)


def test_a_run_is_resumed_to_the_bit(place):
    assert main(words(place, "again", "1")) == 0
    assert main(words(place, "again", "2", "--resume")) == 0
    assert_bit_equal(read_params(read_spec(place / "run/1")), read_params(read_spec(place / "again/1")))


def test_a_step_is_cut_with_its_adapters_and_exported_without(place, capsys):
    step = place / "run/1"
    keep = ["--keep", "llm=0,2,4", "dit=0,1,2,5"]
    assert main([str(word) for word in ("prune", "--checkpoint", step, *keep, "--out", place / "cut")]) == 0
    cut = flatten(read_params(read_spec(place / "cut")))
    whole = flatten(read_params(read_spec(step)))
    name = "backbone/llm/layers/attn/q/lora_a"
    assert np.array_equal(cut[name], whole[name][[0, 2, 4]])
    assert cut["action_head/dit/self/attn/k/lora_b"].shape[0] == 2
    assert main([str(word) for word in ("export", "--checkpoint", step, "--to", "groot", "--out", place / "out")]) == 0
    model = load_model(place / "out", dtype="float32")
    assert not lora.has_adapters(model.architecture)
    merged = flatten(lora.merge_lora(unflatten(whole), architecture=read_architecture(read_spec(step))))
    for path, leaf in flatten(model.params).items():
        np.testing.assert_array_equal(leaf, merged[path], err_msg=path)
    capsys.readouterr()
    assert main(["inspect", str(step), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["adapters"] == 5 * 3 * 2
