"""What training leaves out at random, and that nothing else does."""

import dataclasses
import functools
import json

import groot_recordings as golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from clp_jax.models import groot
from clp_jax.models.groot.dropout import SEED, Site, block_keys, dropped
from clp_jax.models.groot.transformer import branch_ends

SEEDS = np.array([3, 4, 3], np.uint32)


def test_a_share_is_zero_and_the_mean_stays():
    keys = block_keys(jnp.asarray(SEEDS), 0, 2, 3)
    out = np.asarray(dropped(jnp.ones((3, 50, 40)), keys[0], 0.2, Site.HIDDEN))
    assert set(np.unique(out)) == {np.float32(0), np.float32(1.25)}
    assert abs((out == 0).mean() - 0.2) < 0.02
    np.testing.assert_array_equal(out[0], out[2])  # the same number, wherever the row is
    assert (out[0] != out[1]).any()
    twice = np.asarray(dropped(jnp.ones((3, 50, 40)), keys[0], 0.2, Site.ATTENTION, Site.AGAIN))
    assert abs((twice == 0).mean() - 0.36) < 0.02
    for other in (dropped(jnp.ones((3, 50, 40)), keys[1], 0.2, Site.HIDDEN), twice):
        assert (other != out).any()
    assert (block_keys(jnp.asarray(SEEDS), 1, 2, 3) != keys).all()


def test_draws_of_one_observation_leave_out_other_values():
    keys = block_keys(jnp.asarray(SEEDS[:2]), 0, 1, 4)[0]
    assert len({str(jax.random.key_data(key)) for key in keys}) == 4


def test_training_draws_seeds_only_where_there_is_dropout():
    a = golden.architecture("ckpt_pruned")
    assert (a.dit.dropout, a.dit.final_dropout, a.vl.dropout) == (0.2, True, 0.2)
    assert SEED in groot.draw(a, jax.random.key(0), golden.inputs())[0]
    assert SEED not in groot.draw(dataclasses.replace(a, dropout=False), jax.random.key(0), golden.inputs())[0]
    assert SEED not in groot.fixed_draw(a, golden.inputs())


@functools.cache
def velocity():
    model = groot.build(golden.architecture("ckpt_pruned"))
    return jax.jit(lambda params, inputs: groot.forward(model, params, inputs)[0])


@pytest.mark.slow
def test_rows_keep_their_masks_in_any_batch():
    params, inputs = golden.checkpoint("ckpt_pruned"), golden.inputs()
    # One prompt for all, so that the rows differ by nothing but their seeds.
    inputs = {key: np.concatenate([array[:1]] * 3) for key, array in inputs.items()}
    plain = velocity()(params, inputs)
    left = np.asarray(velocity()(params, inputs | {SEED: SEEDS}))
    assert np.abs(left - plain).max() > 0.05
    np.testing.assert_allclose(left[0], left[2], atol=1e-5)
    assert np.abs(left[0] - left[1]).max() > 0.01
    turned = np.asarray(velocity()(params, inputs | {SEED: SEEDS[[1, 0, 0]]}))
    np.testing.assert_allclose(turned[1], left[0], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("field", ["vl", "dit"])
def test_rates_are_those_of_the_config(field):
    a = golden.architecture("ckpt_pruned")
    still = {name: dataclasses.replace(getattr(a, name), dropout=0.0) for name in ("vl", "dit")}
    model = groot.build(dataclasses.replace(a, **{name: sizes for name, sizes in still.items() if name != field}))
    inputs = golden.inputs()
    changed = jax.jit(lambda p, i: groot.forward(model, p, i)[0])(
        golden.checkpoint("ckpt_pruned"), inputs | {SEED: SEEDS}
    )
    assert np.abs(changed - golden.ours("ckpt_pruned")["velocity"]).max() > 0.01


def test_dropout_is_read_from_the_config(tmp_path):
    config = json.loads((golden.GOLDEN / "ckpt" / "config.json").read_text())
    head = config["action_head_cfg"]
    head["diffusion_model_cfg"] |= {"dropout": 0.05, "final_dropout": False}
    del head["vl_self_attention_cfg"]["dropout"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    a = groot.architecture_of(golden.tensors("ckpt"), epath.Path(tmp_path), vlm_config=golden.GOLDEN / "eagle")
    assert (a.dit.dropout, a.dit.final_dropout) == (0.05, False)
    assert (a.vl.dropout, a.vl.final_dropout) == (0.1, True)
    assert branch_ends(a.dit, Site.ATTENTION, Site.AGAIN) == (Site.ATTENTION,)
    assert branch_ends(a.dit, Site.FEED_FORWARD) == ()
