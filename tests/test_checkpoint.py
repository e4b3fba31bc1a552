"""Reading and writing checkpoints: what openpi's code recorded, and what Orbax itself gets from ours."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from checkpoints import (
    RECORD,
    RECORDED,
    RECORDED_STEPS,
    assert_bit_equal,
    restore_as_openpi,
    save_by_orbax,
    toy_params,
    without_value,
)

from clp_jax import trees
from clp_jax.checkpoint import fingerprint, read_params, read_spec, rewrite, write_params
from clp_jax.checkpoint.opening import unchanged
from clp_jax.checkpoint.orbax import writer as writer_module
from clp_jax.errors import InputError

KEEP = (0, 1, 2, 3, 5, 8, 11, 14, 17)


@pytest.fixture
def toy(tmp_path):
    save_by_orbax(tmp_path / "toy", toy_params())
    return tmp_path / "toy"


@pytest.mark.parametrize("name", RECORDED_STEPS)
def test_rewrite_keeps_layers_bit_equal_for_every_reader(name, tmp_path):
    spec = read_spec(RECORDED / name)
    source = restore_as_openpi(spec.path, restore_type=np.ndarray)
    assert_bit_equal(source, read_params(spec))

    report = rewrite(spec, tmp_path / "out", take=lambda path: KEEP if "/llm/layers/" in path else None, record=RECORD)

    expected = trees.unflatten(
        {path: leaf[np.array(KEEP)] if "/llm/layers/" in path else leaf for path, leaf in trees.flatten(source).items()}
    )
    out = read_spec(tmp_path / "out")
    assert trees.difference(out.tree, expected, dtypes=True) == []
    assert out.value_suffix == spec.value_suffix == ("trained" in name)
    assert out.plan_record == RECORD
    for restore_type in (np.ndarray, jax.Array):
        assert_bit_equal(expected, restore_as_openpi(out.path, restore_type=restore_type))
    with ocp.PyTreeCheckpointer() as checkpointer:
        assert_bit_equal(expected, without_value(checkpointer.restore(out.path)["params"]))
    assert report.bytes_out == sum(leaf.nbytes for leaf in trees.flatten(expected).values())
    if spec.assets is None:
        assert out.assets is None
    else:
        stats = "physical-intelligence/libero/norm_stats.json"
        assert (out.assets / stats).read_bytes() == (spec.assets / stats).read_bytes()


def test_spec_is_the_same_from_the_step_and_from_its_params_folder():
    assert read_spec(RECORDED / "pi0_trained" / "1") == read_spec(str(RECORDED / "pi0_trained" / "1" / "params"))


def test_recorded_lora_checkpoint_keeps_its_mixed_dtypes():
    leaves = trees.flatten(read_spec(RECORDED / "pi0_lora_trained" / "1").tree)
    assert leaves["PaliGemma/llm/layers/attn/q_einsum/w"].dtype == jnp.bfloat16
    assert leaves["PaliGemma/llm/layers/attn/q_einsum/lora_a"].dtype == np.float32


@pytest.mark.parametrize("use_ocdbt", [True, False])
@pytest.mark.parametrize("with_value", [True, False])
def test_round_trip_of_what_orbax_saves(use_ocdbt, with_value, tmp_path):
    save_by_orbax(tmp_path / "a", toy_params(), with_value=with_value, use_ocdbt=use_ocdbt)
    spec = read_spec(tmp_path / "a")
    assert spec.value_suffix == with_value
    assert_bit_equal(toy_params(), read_params(spec))
    rewrite(spec, tmp_path / "b", take={"llm/layers/w": [0, 2]})
    expected = toy_params()
    expected["llm"]["layers"]["w"] = expected["llm"]["layers"]["w"][[0, 2]]
    assert_bit_equal(expected, read_params(read_spec(tmp_path / "b")))


@pytest.mark.parametrize("value_suffix", [True, False])
def test_write_params_is_what_openpi_reads(value_suffix, tmp_path):
    params = toy_params()
    params["llm"]["layers"]["w"] = jnp.asarray(params["llm"]["layers"]["w"])
    params["scalar"] = np.float32(3)
    write_params(tmp_path / "out", params, record=RECORD, value_suffix=value_suffix)
    spec = read_spec(tmp_path / "out")
    assert (spec.value_suffix, spec.plan_record) == (value_suffix, RECORD)
    assert_bit_equal(params, restore_as_openpi(tmp_path / "out" / "params", restore_type=np.ndarray))
    rewrite(spec, tmp_path / "again", take={})
    assert_bit_equal(params, read_params(read_spec(tmp_path / "again")))


@pytest.mark.parametrize("sharded_over", [0, 1])
def test_rewrite_slices_arrays_that_several_devices_saved(sharded_over, tmp_path):
    # One chunk a device: with axis 0 cut, layers lie in several chunks; with axis 1 cut, a layer does.
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("fsdp",))
    spec = jax.sharding.PartitionSpec(*[None] * sharded_over, "fsdp")
    values = np.arange(8 * 12 * 3, dtype=np.float32).reshape(8, 12, 3)
    save_by_orbax(tmp_path / "a", {"w": jax.device_put(values, jax.sharding.NamedSharding(mesh, spec))})
    rewrite(read_spec(tmp_path / "a"), tmp_path / "b", take={"w": [1, 2, 5, 7]})
    assert_bit_equal({"w": values[[1, 2, 5, 7]]}, read_params(read_spec(tmp_path / "b")))


@pytest.mark.parametrize("rows", [(0, 3, 4, 8), (6,), None])
@pytest.mark.parametrize("chunk_bytes", [1, 100, 250])
def test_output_chunks_of_any_size_hold_the_right_rows(rows, chunk_bytes, tmp_path, monkeypatch):
    # 40 bytes a row; the last chunk of 2 or 6 rows is padded. The second pass reads small chunks, the first a big one.
    values = np.arange(90, dtype=np.float32).reshape(9, 10)
    save_by_orbax(tmp_path / "a", {"w": values})
    monkeypatch.setattr(writer_module, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr("clp_jax.checkpoint.orbax.slicing.CHUNK_BYTES", chunk_bytes)
    rewrite(read_spec(tmp_path / "a"), tmp_path / "b", take={"w": rows})
    first = values if rows is None else values[list(rows)]
    assert_bit_equal({"w": first}, read_params(read_spec(tmp_path / "b")))
    last = [len(first) - 1]
    rewrite(read_spec(tmp_path / "b"), tmp_path / "c", take={"w": last})
    assert_bit_equal({"w": first[last]}, read_params(read_spec(tmp_path / "c")))


def test_layers_that_are_chunks_already_are_copied_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(writer_module, "ROW_BYTES", 1)
    values = np.random.default_rng(0).normal(size=(6, 500)).astype(np.float32)
    write_params(tmp_path / "a", {"w": values})
    monkeypatch.setattr(writer_module.ItemWriter, "write_chunk", lambda *_: pytest.fail("encoded again"))
    rewrite(read_spec(tmp_path / "a"), tmp_path / "b", take={"w": [1, 4]})
    assert_bit_equal({"w": values[[1, 4]]}, read_params(read_spec(tmp_path / "b")))


def test_read_params_shards_and_casts(toy):
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    params = read_params(read_spec(toy), sharding=sharding, dtype=jnp.bfloat16)
    for path, leaf in trees.flatten(params).items():
        assert leaf.sharding == sharding and leaf.dtype == jnp.bfloat16, path
    by_tree = jax.tree.map(lambda _: sharding, toy_params())
    pairs = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 4), ("batch", "fsdp"))
    columns = jax.sharding.NamedSharding(pairs, jax.sharding.PartitionSpec(None, "fsdp"))
    by_tree["llm"]["layers"]["w"] = columns
    params = read_params(read_spec(toy), sharding=by_tree)
    assert params["llm"]["layers"]["w"].sharding == columns
    assert_bit_equal(toy_params(), params)


def test_read_params_lists_every_difference(toy):
    expected = toy_params()
    expected["llm"]["layers"]["w"] = np.zeros((18, 4, 5), np.float32)
    expected["extra"] = expected.pop("img")
    with pytest.raises(InputError, match="3 paths differ") as caught:
        read_params(read_spec(toy), expected=expected)
    assert "llm/layers/w: expected float32[18, 4, 5], got float32[3, 4, 5]" in str(caught.value)
    with pytest.raises(InputError, match=r"shardings and parameters differ at.*extra/kernel"):
        read_params(read_spec(toy), sharding=jax.tree.map(lambda _: None, expected))


@pytest.mark.parametrize("rows", [[], [2, 1], [0, 0], [-1, 0], [0, 3]])
def test_rewrite_refuses_rows_that_are_no_increasing_layers(rows, toy, tmp_path):
    with pytest.raises(InputError, match="increasing numbers from 0 to 2"):
        rewrite(read_spec(toy), tmp_path / "out", take={"llm/layers/w": rows})
    assert not (tmp_path / "out").exists()


def test_rewrite_refuses_rows_of_unknown_parameters(toy, tmp_path):
    with pytest.raises(InputError, match=r"no parameters.*llm/layer/w"):
        rewrite(read_spec(toy), tmp_path / "out", take={"llm/layer/w": [0]})


def test_rewrite_reports_progress_up_to_the_last_byte(toy, tmp_path):
    calls = []
    report = rewrite(read_spec(toy), tmp_path / "out", take={}, progress=lambda *call: calls.append(call))
    done, totals = zip(*calls, strict=True)
    assert list(done) == sorted(done) and done[-1] == report.bytes_out and set(totals) == {report.bytes_out}


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16])
def test_nonfinite_weights_are_refused_by_name(bad, dtype, tmp_path):
    values = np.zeros((3, 4), dtype)
    values[1, 2] = bad
    with pytest.raises(InputError, match=r"params.llm.w holds NaN or infinity"):
        write_params(tmp_path / "a", {"llm": {"w": values}})
    assert list(tmp_path.iterdir()) == []
    write_params(tmp_path / "a", {"llm": {"w": values}}, allow_nonfinite=True)
    spec = read_spec(tmp_path / "a")
    with pytest.raises(InputError, match=r"params.llm.w holds NaN or infinity"):
        rewrite(spec, tmp_path / "b", take={"llm/w": [1]})
    assert not (tmp_path / "b").exists()
    rewrite(spec, tmp_path / "b", take={"llm/w": [0, 2]})  # what stays is finite
    assert_bit_equal({"llm": {"w": values[[0, 2]]}}, read_params(read_spec(tmp_path / "b")))


def test_fingerprint_stays_when_copied_and_tells_checkpoints_apart(toy, tmp_path):
    original = fingerprint(read_spec(toy))
    shutil.copytree(toy, tmp_path / "elsewhere")
    assert fingerprint(read_spec(tmp_path / "elsewhere")) == original
    names = {fingerprint(read_spec(RECORDED / name)) for name in RECORDED_STEPS}
    assert len({original, *names}) == 1 + len(RECORDED_STEPS)
    rewrite(read_spec(toy), tmp_path / "out", take={"llm/layers/w": [0, 1]})
    assert fingerprint(read_spec(tmp_path / "out")) != original


def test_a_source_that_is_replaced_while_it_is_read_is_no_mixture(toy, tmp_path):
    """As when somebody syncs another step over the folder that is being pruned."""
    tree = read_params(read_spec(toy))
    write_params(tmp_path / "other", jax.tree.map(lambda x: x + 1, tree))

    def replace(*_) -> None:
        if (tmp_path / "other").exists():
            Path(toy).rename(tmp_path / "old")
            (tmp_path / "other").rename(toy)

    with pytest.raises(InputError, match="changed while it was read"):
        rewrite(read_spec(toy), tmp_path / "out", take={"llm/layers/w": [0]}, progress=replace)
    assert not (tmp_path / "out").exists()


def test_what_is_read_is_of_the_checkpoint_whose_fingerprint_was_recorded(toy, tmp_path):
    """As when a step is replaced between the record of a run and the reading of its weights."""
    spec = read_spec(toy)
    fingerprint(spec)
    tree = read_params(spec)
    shutil.rmtree(toy)
    write_params(toy, jax.tree.map(lambda x: x + 1, tree))
    with pytest.raises(InputError, match="changed while it was read"), unchanged(spec):
        read_params(spec)


def test_a_record_that_is_replaced_is_a_change(tmp_path):
    write_params(tmp_path / "step", {"w": np.ones(3, np.float32)}, record=RECORD)
    spec = read_spec(tmp_path / "step")
    with pytest.raises(InputError, match="changed while it was read"), unchanged(spec):
        (tmp_path / "step" / "clp.json").write_text(json.dumps(RECORD | {"training": {"step": 1}}))
