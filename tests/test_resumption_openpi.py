"""Saved steps between two programs: our `Steps` and openpi's checkpoint manager read each other's to the bit."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import real_openpi
from test_openpi_patches import pruned, train_config

import openpi_patches
from clp_jax.checkpoint import read_params, read_spec
from clp_jax.models.pi0 import architecture_of
from clp_jax.training import OptimizerSettings, Steps, make_optimizer, make_state
from clp_jax.trees import flatten


def state_of(params, average):
    """A state two steps on whose moments and average are no zeros."""
    state = make_state(params, make_optimizer(OptimizerSettings()), ema=average)
    state = jax.tree.map(lambda x: x + jnp.asarray(2, x.dtype), state)
    return dataclasses.replace(state, params=params)


def state_of_openpi(average):
    """The shapes that openpi's init_train_state has for a run that is resumed."""
    import flax.nnx as nnx
    import openpi.training.optimizer as optimizer
    import openpi.training.utils as utils

    config, tx = train_config("pi0"), optimizer.create_optimizer(optimizer.AdamW(), optimizer.CosineDecaySchedule())

    def init(rng):
        model = config.model.create(rng)
        params = nnx.state(model)
        return utils.TrainState(
            step=0,
            params=params,
            model_def=nnx.graphdef(model),
            tx=tx,
            opt_state=tx.init(params.filter(config.trainable_filter)),
            ema_decay=0.99 if average else None,
            ema_params=params if average else None,
        )

    return jax.eval_shape(init, jax.random.key(0))


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for path, leaf in ours.items():
        assert leaf.dtype == theirs[path].dtype, path
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(theirs[path]), err_msg=path)


def assert_same_leaves(one, other):
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("average", [True, False])
def test_either_program_restores_what_the_other_saved(tmp_path, monkeypatch, average):
    real_openpi.import_openpi()
    import openpi.training.checkpoints as checkpoints

    step = pruned("pi0", tmp_path / "pruned", llm=[0, 11], vision=[2])
    params = jax.tree.map(jnp.asarray, read_params(read_spec(step)))
    saved = state_of(params, average)
    steps = Steps(tmp_path / "run", write_assets=lambda _: None)
    steps.save(saved, {})
    steps.close()

    real_openpi.shrink(architecture_of(params), monkeypatch)
    openpi_patches.install(step)
    try:
        shape = state_of_openpi(average)
    finally:
        openpi_patches.uninstall()
    manager, resuming = checkpoints.initialize_checkpoint_dir(
        tmp_path / "run", keep_period=None, overwrite=False, resume=True
    )
    assert resuming
    found = checkpoints.restore_state(manager, shape, None)
    assert int(found.step) == int(saved.step)
    assert_same(flatten(found.params.to_pure_dict()), flatten(saved.params))
    if average:
        assert_same(flatten(found.ema_params.to_pure_dict()), flatten(saved.ema_params))
    assert_same_leaves(saved.opt_state, found.opt_state)

    manager, _ = checkpoints.initialize_checkpoint_dir(tmp_path / "o", keep_period=None, overwrite=False, resume=False)
    data = types.SimpleNamespace(data_config=lambda: types.SimpleNamespace(norm_stats=None, asset_id=None))
    checkpoints.save_state(manager, found, data, 1)
    manager.wait_until_finished()
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), saved)
    steps = Steps(tmp_path / "o", write_assets=lambda _: None)
    assert_same_leaves(steps.restore(abstract, 1), saved)
    steps.close()
