"""The training step and the run around it: the same numbers on any devices, and nothing lost."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from recordings import GOLDEN

from clp_jax import sharding
from clp_jax.checkpoint import read_params, read_spec, write_params
from clp_jax.data import open_dataset
from clp_jax.errors import InputError
from clp_jax.models import Architecture, abstract_params, build, family_of
from clp_jax.models.pi0 import architecture_of
from clp_jax.plan import PrunePlan
from clp_jax.provenance import training_record
from clp_jax.training import OptimizerSettings, Run, Steps, StepSettings, TrainState, make_optimizer, make_state, train
from clp_jax.training.adapters import init_adapters, with_adapters
from clp_jax.training.freezing import frozen_paths, merge_parts, split_frozen
from clp_jax.training.optimizer import learning_rate
from clp_jax.training.state import training_dtypes
from clp_jax.training.step import train_step
from clp_jax.training.throughput import peak_flops
from clp_jax.trees import flatten

pytestmark = pytest.mark.slow

ARCH = toys.architecture()
FAST = OptimizerSettings(peak_lr=1e-2, warmup_steps=1)
FIRST, LATER = 5e-6, 1e-3
"""Relative, of losses on different numbers of devices, which add in different orders. Adam divides what is left of
tiny gradients by itself, so that later steps differ more than the first."""


def mesh_of(batch: int, fsdp: int) -> jax.sharding.Mesh:
    devices = np.array(jax.devices()[: batch * fsdp]).reshape(batch, fsdp)
    return jax.sharding.Mesh(devices, ("batch", "fsdp"))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A toy checkpoint and 24 observations of it."""
    folder = tmp_path_factory.mktemp("training")
    write_params(folder / "full", toys.params(ARCH))
    np.savez(folder / "data.npz", **toys.data(ARCH, 24).arrays)
    return folder


def run(
    inputs,
    out,
    mesh=None,
    *,
    arch: Architecture = ARCH,
    log=None,
    write_assets=lambda _: None,
    evaluate=None,
    **settings,
):
    """Trains; returns the report and the loss of every step."""
    losses: dict[int, float] = {}

    def keep(step, values):
        if "loss" in values:
            losses[step] = values["loss"]
        if log is not None:
            log(step, values)

    step = settings.pop("step", StepSettings(augment=False))
    todo = Run(batch_size=8, optimizer=settings.pop("optimizer", FAST), step=step, log_every=1, **settings)
    saved = Steps(out, write_assets=write_assets)
    plan = PrunePlan.of(arch.kind, arch.depths, coupled=arch.coupled)
    try:
        report = train(
            read_spec(inputs / "full"),
            arch,
            open_dataset(inputs / "data.npz", ARCH),
            todo,
            saved,
            mesh=mesh or mesh_of(1, 1),
            record=lambda training: training_record(None, plan, {"config": {}}, training).to_json(),
            log=keep,
            evaluate=evaluate,
        )
    finally:
        saved.close()
    return report, losses


@pytest.fixture(scope="module")
def uninterrupted(inputs, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    report, losses = run(inputs, out, steps=6, save_every=100)
    return report, losses, out


def assert_same_bits(a: TrainState, b: TrainState) -> None:
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=jax.tree_util.keystr(path))


def test_run_lowers_the_loss_and_saves_openpis_layout(uninterrupted):
    report, losses, out = uninterrupted
    assert (report.done, report.saved) == (6, 5)
    assert sorted(losses) == list(range(6))
    assert losses[5] < losses[0]
    found = {path.name for path in (out / "5").iterdir()}
    assert {"params", "train_state", "assets", "clp.json"} <= found
    names = json.loads((out / "5" / "train_state" / "_METADATA").read_text())["tree_metadata"]
    stored = {"/".join(key["key"] for key in entry["key_metadata"]) for entry in names.values()}
    leaf = "PaliGemma/llm/layers/mlp/linear/value"
    assert {f"opt_state/1/0/mu/{leaf}", f"opt_state/1/0/nu/{leaf}", f"params/{leaf}", "step"} <= stored
    assert {"opt_state/1/0/count", "opt_state/1/2/count"} <= stored


def test_first_loss_is_that_of_openpis_key(inputs, uninterrupted):
    """openpi's main function splits the key of the seed, and its step folds the number in."""
    data = open_dataset(inputs / "data.npz", ARCH)
    batch = next(data.batches(8, seed=Run(steps=1).seed, workers=0))
    family, key = family_of(ARCH), jax.random.split(jax.random.key(Run(steps=1).seed))[0]
    drawn, _ = family.draw(ARCH, jax.random.fold_in(key, 0), batch)
    losses = jax.jit(lambda params, rows: family.losses(build(ARCH), params, rows).each)(toys.params(ARCH), drawn)
    np.testing.assert_allclose(np.mean(losses), uninterrupted[1][0], rtol=FIRST)


def test_what_is_evaluated_is_what_is_saved(inputs, tmp_path):
    seen = []
    report, _ = run(inputs, tmp_path / "run", steps=2, evaluate=lambda p: seen.append(jax.device_get(p)) or {})
    (evaluated,) = seen
    for path, leaf in flatten(report.state.ema_params).items():
        np.testing.assert_array_equal(flatten(evaluated)[path], np.asarray(leaf), err_msg=path)
        assert leaf is not flatten(report.state.params)[path]


def test_saved_params_are_the_average_and_load_as_a_checkpoint(uninterrupted):
    report, _, out = uninterrupted
    spec = read_spec(out / "5")
    assert spec.value_suffix
    for path, leaf in flatten(read_params(spec)).items():
        np.testing.assert_array_equal(leaf, np.asarray(flatten(report.state.ema_params)[path]), err_msg=path)


def test_average_follows_the_parameters(uninterrupted):
    report, _, _ = uninterrupted
    live, average = flatten(report.state.params), flatten(report.state.ema_params)
    start = flatten(toys.params(ARCH))
    path = "action_out_proj/kernel"
    moved = np.abs(np.asarray(live[path]) - start[path]).max()
    assert 0 < np.abs(np.asarray(average[path]) - start[path]).max() < 0.2 * moved


def test_resumed_run_equals_an_uninterrupted_one_bit_for_bit(inputs, uninterrupted, tmp_path):
    run(inputs, tmp_path / "run", steps=3)
    report, losses = run(inputs, tmp_path / "run", steps=6, save_every=100)
    assert sorted(losses) == [3, 4, 5]
    assert_same_bits(report.state, uninterrupted[0].state)


def test_finished_run_is_left_as_it_is(inputs, uninterrupted):
    report, losses = run(inputs, uninterrupted[2], steps=6)
    assert (report.done, losses) == (6, {})


@pytest.mark.parametrize("shape", [(8, 1), (2, 4)])
def test_shards_compute_what_one_device_computes(inputs, uninterrupted, tmp_path, shape, monkeypatch):
    monkeypatch.setattr(sharding, "_MIN_SHARDED_BYTES", 0)
    report, losses = run(inputs, tmp_path / "run", mesh_of(*shape), steps=6)
    np.testing.assert_allclose(losses[0], uninterrupted[1][0], rtol=FIRST)
    np.testing.assert_allclose(list(losses.values()), list(uninterrupted[1].values()), rtol=LATER)
    kernel = report.state.params["PaliGemma"]["llm"]["layers"]["mlp"]["linear"]
    assert kernel.sharding.is_fully_replicated == (shape[1] == 1)
    assert report.state.opt_state[1][0].mu["PaliGemma"]["llm"]["layers"]["mlp"]["linear"].sharding == kernel.sharding


def test_accumulation_gives_the_gradient_of_the_whole_batch(inputs, uninterrupted, tmp_path):
    _, losses = run(inputs, tmp_path / "run", steps=4, step=StepSettings(augment=False, accumulate=4))
    np.testing.assert_allclose(list(losses.values()), list(uninterrupted[1].values())[:4], rtol=1e-5)


def test_sharded_run_resumes_on_other_devices(inputs, uninterrupted, tmp_path, monkeypatch):
    monkeypatch.setattr(sharding, "_MIN_SHARDED_BYTES", 0)
    run(inputs, tmp_path / "run", mesh_of(2, 4), steps=3)
    _, losses = run(inputs, tmp_path / "run", steps=6)
    np.testing.assert_allclose(list(losses.values()), list(uninterrupted[1].values())[3:], rtol=LATER)


def test_nonfinite_loss_stops_before_it_is_saved(inputs, tmp_path):
    arrays = toys.data(ARCH, 24).arrays
    np.savez(tmp_path / "marked.npz", **arrays | {"state": np.repeat(np.arange(24.0, dtype=np.float32)[:, None], 6, 1)})
    batches = open_dataset(tmp_path / "marked.npz", ARCH).batches(8, seed=Run(steps=1).seed)
    third = int([next(batches)["state"] for _ in range(3)][2][0, 0])
    arrays["actions"][third] = 1e30  # finite, but not its square
    np.savez(tmp_path / "data.npz", **arrays)
    write_params(tmp_path / "full", toys.params(ARCH))
    with pytest.raises(InputError, match=r"step 2: \w+ is (inf|nan)"):
        run(tmp_path, tmp_path / "run", steps=20, save_every=1)
    assert [int(path.name) for path in (tmp_path / "run").iterdir() if path.name.isdigit()] == [1]
    for path, leaf in flatten(read_params(read_spec(tmp_path / "run" / "1"))).items():
        assert np.isfinite(leaf).all(), path


def test_sigterm_saves_and_ends_the_run(inputs, tmp_path, uninterrupted):
    import os
    import signal

    def stop_at_one(step, _):
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    report, _ = run(inputs, tmp_path / "run", steps=1000, save_every=1000, log=stop_at_one)
    assert 2 < report.done < 10
    assert report.saved == report.done - 1
    assert signal.getsignal(signal.SIGTERM) is before


def test_sigterm_while_the_last_save_is_written_makes_nothing_of_it(inputs, tmp_path, monkeypatch):
    import os
    import signal

    wait, ended = Steps.wait, []

    def wait_long(self):
        if self.latest == 1:
            ended.append(os.kill(os.getpid(), signal.SIGTERM))
        wait(self)

    def raise_at_once(*_):
        raise AssertionError("SIGTERM came through")

    monkeypatch.setattr(Steps, "wait", wait_long)
    before = signal.signal(signal.SIGTERM, raise_at_once)
    try:
        report, _ = run(inputs, tmp_path / "run", steps=2, save_every=1000)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (report.done, report.saved, len(ended)) == (2, 1, 1)


def test_other_tree_is_refused_with_every_difference(inputs, uninterrupted, tmp_path):
    run(inputs, tmp_path / "run", steps=1)
    with pytest.raises(InputError, match=r"params.action_in_proj.bias.value: expected nothing"):
        run(inputs, tmp_path / "run", steps=2, step=StepSettings(augment=False, ema_decay=None))


def test_lora_trains_adapters_and_leaves_the_language_stack(inputs, tmp_path):
    arch = with_adapters(ARCH, (2, 3))
    frozen = frozen_paths(tuple(flatten(abstract_params(arch))), default=family_of(arch).frozen_rules(arch))
    report, losses = run(inputs, tmp_path / "run", arch=arch, steps=2, step=StepSettings(augment=False, frozen=frozen))
    assert np.isfinite(list(losses.values())).all()
    start, end = flatten(toys.params(ARCH)), flatten(report.state.params)
    adapters = [path for path in end if "lora" in path]
    assert len(adapters) == 2 * 5 * 2  # two factors on q, kv, output, gating and linear of two experts
    for path in frozen:
        assert end[path].dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.asarray(end[path]), start[path].astype(jnp.bfloat16), err_msg=path)
    moments = set(flatten(report.state.opt_state[1][0].mu))
    assert moments == set(end) - set(frozen)
    assert not np.array_equal(end["state_proj/kernel"], start["state_proj/kernel"])


def test_lora_freezes_what_openpi_froze():
    """openpi stores what it froze in bfloat16: the language stack with its embedder and norms, but for the adapters."""
    tree = read_spec(GOLDEN / "ckpt" / "pi0_lora_trained" / "1").tree
    leaves = flatten(tree)
    stored = {path for path, leaf in leaves.items() if leaf.dtype == jnp.bfloat16}
    assert {"PaliGemma/llm/embedder/input_embedding", "PaliGemma/llm/final_norm_1/scale"} < stored
    arch = architecture_of(tree)
    assert frozen_paths(tuple(leaves), default=family_of(arch).frozen_rules(arch)) == stored


def test_adapters_begin_as_openpis():
    arch = with_adapters(ARCH, (2, 3))
    leaves = flatten(init_adapters(arch, jax.random.key(0), mesh_of(1, 1)))
    shape = (toys.DEPTH, toys.VLM.num_heads, toys.VLM.width, 2)
    assert leaves["PaliGemma/llm/layers/attn/q_einsum/lora_a"].shape == shape
    values = np.concatenate([np.ravel(x) for x in leaves.values()])
    assert np.std(values) == pytest.approx(0.01, rel=0.1)
    with pytest.raises(InputError, match="adapters already"):
        with_adapters(arch)
    with pytest.raises(InputError, match=r"--lora-ranks 16 0 leaves an expert without"):
        with_adapters(ARCH, (16, 0))
    with pytest.raises(
        InputError, match=r"--lora-ranks has 3 numbers, and adapters of a pi0 have 2; leave the last out"
    ):
        with_adapters(ARCH, (16, 32, 4))


def test_rules_freeze_and_except():
    paths = ["PaliGemma/img/head/kernel", "PaliGemma/llm/final_norm/scale", "action_in_proj/bias"]
    assert frozen_paths(paths) == frozenset()
    assert frozen_paths(paths, freeze=["PaliGemma/.*"], train=[".*/scale"]) == {paths[0]}
    default = (("PaliGemma/.*", True),)
    assert frozen_paths(paths, train=[".*/scale"], default=default) == {paths[0]}
    assert frozen_paths(paths, train=["PaliGemma/.*"], default=default) == frozenset()  # nothing is left to the default
    with pytest.raises(InputError, match="match no path"):
        frozen_paths(paths, freeze=["PaliGema/.*"])
    with pytest.raises(InputError, match="match no path"):
        frozen_paths(paths, default=(("PaliGema/.*", True),))
    with pytest.raises(InputError, match="nothing to train"):
        frozen_paths(paths, freeze=[".*"])
    with pytest.raises(InputError, match="no regular expression"):
        frozen_paths(paths, freeze=["("])


def test_split_and_merge_are_inverse():
    tree = toys.params(ARCH)
    frozen = frozenset(path for path in flatten(tree) if "img" in path)
    merged = flatten(merge_parts(*split_frozen(tree, frozen)))
    assert merged.keys() == flatten(tree).keys()
    assert all(merged[path] is leaf for path, leaf in flatten(tree).items())


def test_trained_parameters_are_float32_and_frozen_ones_as_asked():
    tree = {"a": jax.ShapeDtypeStruct((2,), jnp.bfloat16), "b": jax.ShapeDtypeStruct((2,), jnp.float32)}
    assert flatten(training_dtypes(tree, frozenset("b")))["a"].dtype == jnp.float32
    assert flatten(training_dtypes(tree, frozenset("b")))["b"].dtype == jnp.bfloat16
    assert flatten(training_dtypes(tree, frozenset("b"), frozen_dtype=None))["b"].dtype == jnp.float32


def test_step_takes_shapes_and_augments_each_kind():
    for kind in ("pi0", "pi05", "pi0_fast"):
        arch = toys.architecture(kind)
        tx = make_optimizer(FAST)
        shapes = training_dtypes(abstract_params(arch), frozenset())
        state = jax.eval_shape(lambda p, tx=tx: make_state(p, tx, ema=True), shapes)
        batch = {k: v for k, v in toys.data(arch, 4).arrays.items() if k not in ("noise", "time", "episode_index")}
        key = jax.random.key(0)
        after, info = jax.eval_shape(
            lambda s, b, arch=arch, tx=tx, key=key: train_step(arch, tx, StepSettings(), key, s, b), state, batch
        )
        assert jax.tree.structure(after) == jax.tree.structure(state)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
        assert set(info) == {"loss", "grad_norm", "param_norm"}


def test_rematerialisation_does_not_change_the_gradient():
    from clp_jax.models.pi0 import losses

    rows, params = toys.data(ARCH, 2).arrays, toys.params(ARCH)

    def gradient(arch):
        model = build(arch)
        return jax.jit(jax.grad(lambda p: jnp.mean(losses(model, p, rows).each)))

    jax.eval_shape(gradient(dataclasses.replace(ARCH, remat="dots")), params)
    other = flatten(gradient(dataclasses.replace(ARCH, remat="none"))(params))
    for path, leaf in flatten(gradient(ARCH)(params)).items():
        np.testing.assert_allclose(other[path], leaf, rtol=1e-4, atol=1e-6, err_msg=path)


def test_optimizer_clips_and_follows_openpis_schedule():
    tx = make_optimizer(OptimizerSettings(peak_lr=1.0, warmup_steps=1, decay_steps=10))
    state = tx.init({"w": jnp.zeros(3)})
    updates, _ = tx.update({"w": jnp.full(3, 1e6)}, state, {"w": jnp.zeros(3)})
    assert updates["w"].tolist() == pytest.approx([-0.5] * 3, rel=1e-3)  # half the peak, Adam's sign


def test_warm_up_from_zero_is_transformers():
    rate = learning_rate(OptimizerSettings(schedule="zero-warmup-cosine", warmup_steps=2, decay_steps=10, decay_lr=0.0))
    expected = [0.0, 0.5, 1.0, 0.5 * (1 + np.cos(np.pi / 8))]
    assert [float(rate(step)) / 2.5e-5 for step in range(4)] == pytest.approx(expected)
    assert float(rate(10)) == pytest.approx(0.0, abs=1e-12)
    short = learning_rate(OptimizerSettings(schedule="zero-warmup-cosine", warmup_steps=1, decay_steps=1))
    assert float(short(0)) == 0.0  # a run of one step ends with its warm-up


def test_names_without_weight_decay():
    settings = {"peak_lr": 1.0, "warmup_steps": 0, "weight_decay": 0.1}
    params = {"dense": {"kernel": jnp.ones(2), "bias": jnp.ones(2)}}
    tx = make_optimizer(OptimizerSettings(**settings, not_decayed=".*/bias"))
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    assert updates["dense"]["bias"].tolist() == [0.0, 0.0]
    assert updates["dense"]["kernel"].tolist() == pytest.approx([-0.1, -0.1])
    plain = make_optimizer(OptimizerSettings(**settings))
    assert jax.tree.structure(plain.init(params)) != jax.tree.structure(tx.init(params))  # openpi's has no mask
    with pytest.raises(InputError, match="--not-decayed '\\(' is no regular expression"):
        make_optimizer(OptimizerSettings(not_decayed="(")).init(params)


def test_peak_is_known_for_chips_and_not_for_cpus():
    assert peak_flops("TPU v5 lite") == 197e12
    assert peak_flops("TPU v5p") == peak_flops("TPU v5") == 459e12
    assert peak_flops("cpu") is None


def test_sharding_rules_come_before_openpis():
    mesh, tree = mesh_of(2, 4), {"llm": {"w": jnp.zeros((8, 4)), "b": jnp.zeros(4)}}
    state = make_state(tree, make_optimizer(FAST), ema=True)
    found = sharding.parameter_shardings(state, mesh, (("llm/w", 1), (".*b", None)))
    for leaf in (found.params, found.ema_params, found.opt_state[1][0].mu):
        assert leaf["llm"]["w"].spec == jax.sharding.PartitionSpec(None, "fsdp")
        assert leaf["llm"]["b"].is_fully_replicated
    with pytest.raises(InputError, match=r"llm/w of shape \(8, 4\) cannot be split over 4 devices along axis 2"):
        sharding.parameter_shardings(tree, mesh, (("llm/w", 2),))
    with pytest.raises(InputError, match="match no parameter"):
        sharding.parameter_shardings(tree, mesh, (("llm/v", 0),))
