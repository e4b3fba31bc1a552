"""Oracles of a pruner: what the smaller model computes can be computed in other ways."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clp_jax.checkpoint import read_params, read_spec, write_params
from clp_jax.errors import InputError
from clp_jax.models import abstract_params, build
from clp_jax.models.layers.attention import attention_mask, token_positions
from clp_jax.models.pi0 import STACKS, Observation, architecture_of, sample_actions
from clp_jax.models.pi0.gemma import Block
from clp_jax.models.stacks import stack_of
from clp_jax.plan import PrunePlan, TowerPlan, compose
from clp_jax.prune import apply_plan, depth_of, prune_checkpoint, take_layers
from clp_jax.sensitivity import plan_gates
from clp_jax.trees import abstract, flatten, unflatten

ROUNDING = 2e-5
"""Between two float32 programs for the same model: values of magnitude 1 after 4 blocks."""


def coupled_plan(keep, kind="pi0", **towers):
    return PrunePlan.of(
        kind,
        toys.architecture(kind).depths,
        {"vlm": list(keep), "action": list(keep)} | towers,
        coupled=(("vlm", "action"),),
    )


def velocity(params, gates=None):
    arch = architecture_of(params, dtype="float32")
    model, data = build(arch), toys.data(arch, 3)
    arrays = data.arrays
    extra = {} if gates is None else {"gates": gates}
    return jax.jit(
        lambda p: model.apply({"params": p}, Observation.of(data.arrays), arrays["noise"], arrays["time"], **extra)[0]
    )(params)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_pruned_model_equals_full_model_with_dropped_branches_zeroed(kind):
    params = toys.params(toys.architecture(kind))
    flat = flatten(params)
    for path, leaf in flat.items():
        writes = ("attn_vec_einsum/w", "attn_vec_einsum_1/w", "mlp/linear", "mlp_1/linear")
        if path.endswith(writes):
            flat[path] = leaf * np.array([1, 0, 1, 0], np.float32).reshape(-1, *[1] * (leaf.ndim - 1))
    zeroed, small = velocity(unflatten(flat)), velocity(apply_plan(params, coupled_plan((0, 2), kind)))
    np.testing.assert_allclose(small, zeroed, atol=ROUNDING)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_pruned_model_equals_full_model_with_gates_closed(kind):
    arch = toys.architecture(kind)
    params, plan = toys.params(arch), coupled_plan((1, 3), kind, vision=[1])
    small, gated = velocity(apply_plan(params, plan)), velocity(params, plan_gates(arch, plan))
    np.testing.assert_allclose(small, gated, atol=ROUNDING)


@pytest.mark.slow
def test_sampling_from_the_pruned_model_equals_sampling_with_gates_closed():
    arch = toys.architecture()
    params, plan, data = toys.params(arch), coupled_plan((0, 3)), toys.data(toys.architecture(), 2)
    small = apply_plan(params, plan)

    def sample(p, gates):
        model = build(architecture_of(p, dtype="float32"))
        return sample_actions(model, p, Observation.of(data.arrays), noise=data.arrays["noise"], num_steps=3, **gates)

    ours = sample(small, {})
    np.testing.assert_allclose(ours, sample(params, {"gates": plan_gates(arch, plan)}), atol=ROUNDING)


@pytest.mark.slow
def test_pruned_scan_equals_kept_blocks_one_after_another():
    arch, keep = toys.architecture(), (0, 1, 3)
    params, data = toys.params(arch), toys.data(arch, 2)
    small = apply_plan(params, coupled_plan(keep))
    model = build(architecture_of(small, dtype="float32"))
    _, towers = model.apply(
        {"params": small}, Observation.of(data.arrays), data.arrays["noise"], data.arrays["time"], capture=True
    )
    xs = [jnp.asarray(towers[name].states[0]) for name in ("vlm", "action")]
    valid = jnp.concatenate([towers["vlm"].valid, towers["action"].valid], axis=1)
    prefix, suffix = xs[0].shape[1], xs[1].shape[1]
    starts = np.zeros(prefix + suffix, bool)
    starts[[prefix, prefix + 1]] = True  # the state token, then the actions
    mask = attention_mask(valid, jnp.broadcast_to(starts, valid.shape))
    positions = token_positions(valid)
    # A stream sees itself and those before it.
    streams = [positions[:, :prefix], positions[:, prefix:]], [mask[:, :prefix, :prefix], mask[:, prefix:]]
    block = Block(arch.experts, capture=False)
    for layer in keep:
        variables = {
            "params": jax.tree.map(lambda leaf, i=layer: jnp.asarray(leaf[i]), params["PaliGemma"]["llm"]["layers"])
        }
        xs, _ = block.apply(variables, xs, None, None, None, None, *streams, [None, None])
    for got, name in zip(xs, ("vlm", "action"), strict=True):
        np.testing.assert_allclose(towers[name].states[-1], got, atol=ROUNDING)


def test_identity_plan_returns_the_same_leaves():
    params = toys.params(toys.architecture())
    same = flatten(apply_plan(params, coupled_plan(range(4))))
    assert all(same[path] is leaf for path, leaf in flatten(params).items())


def test_only_planned_towers_change():
    params = toys.params(toys.architecture())
    changed = flatten(apply_plan(params, coupled_plan((0, 2))))
    for path, leaf in flatten(params).items():
        stack = stack_of(STACKS, path)
        if stack is not None and stack.tower in ("vlm", "action"):
            np.testing.assert_array_equal(changed[path], leaf[[0, 2]])
        else:
            assert changed[path] is leaf


subsets = st.lists(st.integers(0, 3), min_size=1, unique=True).map(sorted)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(first=subsets, choice=st.lists(st.booleans(), min_size=4, max_size=4))
def test_pruning_twice_equals_pruning_by_the_composed_plan(first, choice):
    tree = {"PaliGemma": {"llm": {"layers": {"mlp": {"linear": np.arange(8.0).reshape(4, 2)}}}}}
    second = [i for i in range(len(first)) if choice[i]] or [0]
    p = PrunePlan("pi0_fast", {"vlm": TowerPlan(4, tuple(first))})
    q = PrunePlan("pi0_fast", {"vlm": TowerPlan(len(first), tuple(second))})
    twice, once = apply_plan(apply_plan(tree, p), q), apply_plan(tree, compose(p, q))
    np.testing.assert_array_equal(*(flatten(t)["PaliGemma/llm/layers/mlp/linear"] for t in (twice, once)))


def test_apply_plan_works_on_shapes():
    params, plan = toys.params(toys.architecture()), coupled_plan((0, 2))
    shapes = flatten(apply_plan(abstract(params), plan))
    arrays = flatten(apply_plan(params, plan))
    assert {p: (s.shape, s.dtype) for p, s in shapes.items()} == {p: (a.shape, a.dtype) for p, a in arrays.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_take_layers_keeps_dtype(dtype):
    leaf = jax.numpy.arange(6.0, dtype=dtype).reshape(3, 2)
    assert take_layers(leaf, (0, 2)).dtype == leaf.dtype


def test_plan_for_another_depth_is_refused():
    with pytest.raises(InputError, match="5 blocks, but the model's has 4"):
        apply_plan(toys.params(toys.architecture()), PrunePlan("pi0", {"vlm": TowerPlan(5, (0,))}))


def test_leaves_that_disagree_about_depth_are_named():
    params = toys.params(toys.architecture())
    layers = params["PaliGemma"]["llm"]["layers"]
    layers["mlp"]["linear"] = layers["mlp"]["linear"][:3]
    with pytest.raises(InputError, match="mlp/linear has 3"):
        depth_of(params, "vlm")


def test_prune_checkpoint_writes_slices_and_composes_the_record(tmp_path):
    params = toys.params(toys.architecture())
    write_params(tmp_path / "full", params)
    prune_checkpoint(read_spec(tmp_path / "full"), coupled_plan((0, 2, 3)), tmp_path / "once")
    again = PrunePlan.of(
        "pi0", {"vision": 2, "vlm": 3, "action": 3}, {"vlm": [0, 2], "action": [0, 2]}, coupled=(("vlm", "action"),)
    )
    prune_checkpoint(read_spec(tmp_path / "once"), again, tmp_path / "twice")
    spec = read_spec(tmp_path / "twice")
    wanted = flatten(apply_plan(params, coupled_plan((0, 3))))
    for path, leaf in flatten(read_params(spec)).items():
        np.testing.assert_array_equal(leaf, wanted[path], err_msg=path)
    assert spec.plan_record is not None
    assert spec.plan_record["plan"]["towers"]["vlm"] == {"depth": 4, "keep": [0, 3]}
    assert len(spec.plan_record["steps"]) == 2


def test_every_leaf_of_the_expert_belongs_to_its_tower():
    arch = toys.architecture()
    found = {path: stack_of(STACKS, path) for path in flatten(abstract_params(arch)) if "/layers/" in path}
    expert = {path for path, stack in found.items() if stack is not None and stack.tower == "action"}
    assert expert == {path for path in found if any(part.endswith("_1") for part in path.split("/"))}
