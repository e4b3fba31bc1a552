"""What every family must hold to, proven on a small model of every kind."""

import ast
import contextlib
import functools
import json
import logging
import re
import shutil
from pathlib import Path

import family_cases as cases
import jax
import numpy as np
import pytest
from checkpoints import RECORDED, assert_bit_equal
from groot_recordings import GOLDEN as GROOT
from recordings import GOLDEN
from smolvla_recordings import GOLDEN as SMOLVLA

import clp_jax
from clp_jax.checkpoint import read_spec, write_params
from clp_jax.errors import InputError
from clp_jax.flops import parameter_count
from clp_jax.loading import load_model
from clp_jax.models import (
    FAMILIES,
    Architecture,
    Family,
    Gates,
    Lengths,
    abstract_params,
    family_of,
    family_of_tree,
    stack_of,
)
from clp_jax.plan import compose
from clp_jax.planning import plan_of_blocks
from clp_jax.prune import apply_plan, prune_checkpoint
from clp_jax.prune_folder import prune_folder
from clp_jax.sensitivity import make_loss
from clp_jax.similarity import CalibrationBatch
from clp_jax.training.teaching import Teaching, same_blocks, taught_loss
from clp_jax.trees import flatten, unflatten

KINDS = [kind for family in FAMILIES.values() for kind in family.KINDS]
GROUPS = [(kind, group) for kind in KINDS for group in cases.architecture(kind).groups]
RELEASED = [(family, name) for family in FAMILIES for name in FAMILIES[family].RELEASED]

SAME = 2e-5
"""Relative to the largest value: float32 sums of another order."""

NOTHING, NO_SLOPE = 1e-6, 1e-5
"""Differences of numbers near 1 that a program computes twice in float32, and gradients of their squares."""

OPTIONAL = {"LEROBOT", "NVIDIA", "zero_tensors", "torch_config", "why_no_torch"}
"""Names that only the targets of a family ask for."""

COUNTED = {
    "smolvla": json.loads((SMOLVLA / "param_tree_smolvla.json").read_text())["total"],
    "gr00t-n1.5": json.loads((GROOT / "param_tree.json").read_text())["totals"]["all"],
    **{name.replace("_", "-"): n for name, n in json.loads((GOLDEN / "param_counts.json").read_text()).items()},
}


def assert_same(ours, theirs):
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=SAME * max(1.0, np.abs(theirs).max()))


def kept(arch, removed):
    return {name: [i for i in range(arch.depths[name]) if i not in gone] for name, gone in removed.items()}


def depths_after(plan):
    return {name: len(tower.keep) for name, tower in plan.towers.items()}


# Names


@pytest.mark.parametrize("name", FAMILIES)
def test_family_has_every_name_of_the_protocol(name):
    assert isinstance(FAMILIES[name], Family)
    assert FAMILIES[name].__name__ == f"clp_jax.models.{name}"
    assert set(FAMILIES[name].TITLES) == set(FAMILIES[name].KINDS)


@pytest.mark.parametrize("name", FAMILIES)
def test_targets_come_with_what_they_ask_for(name):
    family = FAMILIES[name]
    assert hasattr(family, "LEROBOT") or "lerobot" not in family.TARGETS
    assert hasattr(family, "NVIDIA") or "groot" not in family.TARGETS
    for needed in ("why_no_torch", "zero_tensors", "torch_config"):
        assert hasattr(family, needed) or "openpi-pytorch" not in family.TARGETS


def test_nothing_is_asked_of_a_family_that_the_protocol_does_not_promise():
    promised = set(Family.__protocol_attrs__) if hasattr(Family, "__protocol_attrs__") else set(dir(Family))
    promised |= set(Family.__annotations__) | OPTIONAL
    root, asked = Path(clp_jax.__file__).parent, set()
    for file in root.rglob("*.py"):
        if "safetensors" in file.parts or file.name == "family.py":
            continue  # a StoredFamily there
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and re.match(r"family(?:_of\w*\([^()]*\))?$", ast.unparse(node.value)):
                asked.add((str(file.relative_to(root)), node.attr))
    assert asked
    assert {(file, name) for file, name in asked if name not in promised} == set()


# Sizes


@pytest.mark.parametrize(("family", "name"), RELEASED)
def test_released_model_has_as_many_parameters_as_upstream(family, name):
    architecture = FAMILIES[family].RELEASED[name]
    assert isinstance(architecture, Architecture)
    assert parameter_count(architecture) == COUNTED[name]
    tree = abstract_params(architecture)
    assert family_of_tree(tree) is family_of(architecture) is FAMILIES[family]


@pytest.mark.parametrize(("family", "name"), RELEASED)
def test_stacks_cover_every_block_of_every_tower_once(family, name):
    architecture = FAMILIES[family].RELEASED[name]
    seen: dict[str, dict[str, list[int]]] = {tower.name: {} for tower in architecture.towers}
    for path, leaf in flatten(abstract_params(architecture)).items():
        stack = stack_of(FAMILIES[family].STACKS, path)
        if stack is not None:
            alike = re.sub(r"/(?:even|odd|cross|self)/", "/*/", path)
            seen[stack.tower].setdefault(alike, []).extend(stack.blocks(leaf.shape[0]))
    for tower in architecture.towers:
        assert seen[tower.name], tower.name
        for path, blocks in seen[tower.name].items():
            assert sorted(blocks) == list(range(tower.depth)), path


@pytest.mark.parametrize(("family", "name"), RELEASED)
def test_towers_groups_and_depths_agree(family, name):
    architecture = FAMILIES[family].RELEASED[name]
    names = [tower.name for tower in architecture.towers]
    assert architecture.depths == {tower.name: tower.depth for tower in architecture.towers}
    assert sorted(tower for group in architecture.groups for tower in group) == sorted(names)
    assert architecture.coupled == tuple(group for group in architecture.groups if len(group) > 1)
    shorter = architecture.with_depths(dict.fromkeys(names, 2))
    assert shorter.depths == dict.fromkeys(names, 2)
    assert shorter.with_depths(architecture.depths) == architecture
    for tower in shorter.towers + architecture.towers:
        assert all(0 <= state <= tower.depth for state in tower.incomparable)
        assert all(0 <= block < tower.depth for block in tower.protected)


# Cuts


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "group"), GROUPS)
def test_gate_zero_is_a_branch_that_writes_nothing(kind, group):
    arch, arrays = cases.architecture(kind), cases.inputs(cases.architecture(kind))
    removed = cases.removal(arch, group)
    gated, _, gated_loss = cases.run(arch)(cases.params(arch), arrays, cases.gates(arch, removed))
    silent, _, silent_loss = cases.run(arch)(zeroed(arch, removed), arrays, cases.gates(arch))
    assert_same(silent, gated)
    assert_same(silent_loss.each, gated_loss.each)
    assert not np.allclose(gated, cases.whole(kind)[0], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_gate_zero_is_the_pruned_model(kind):
    """Of all groups at once, each without other blocks: one program more, and no tower can pass for another."""
    arch, arrays = cases.architecture(kind), cases.inputs(cases.architecture(kind))
    removed = {tower: gone for group in arch.groups for tower, gone in cases.removal(arch, group).items()}
    plan = plan_of_blocks(arch, kept(arch, removed))
    gated, _, gated_loss = cases.run(arch)(cases.params(arch), arrays, cases.gates(arch, removed))
    shorter = arch.with_depths(depths_after(plan))
    pruned = apply_plan(cases.params(arch), plan)
    output, _, loss = cases.run(shorter)(pruned, arrays, cases.gates(shorter))
    assert_same(gated, output)
    assert_same(gated_loss.each, loss.each)


def zeroed(arch, removed):
    leaves = {}
    for path, leaf in flatten(cases.params(arch)).items():
        stack = stack_of(family_of(arch).STACKS, path)
        if stack is not None and any(re.fullmatch(pattern, path) for pattern in cases.WRITERS):
            gone = [block in removed.get(stack.tower, ()) for block in stack.blocks(len(leaf))]
            leaves[path] = leaf * (1 - np.reshape(gone, (-1, *(1 for _ in leaf.shape[1:]))).astype(leaf.dtype))
        else:
            leaves[path] = leaf
    return unflatten(leaves)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "name"), RELEASED)
def test_two_cuts_are_their_composition(family, name):
    architecture = FAMILIES[family].RELEASED[name].with_depths(dict.fromkeys(FAMILIES[family].RELEASED[name].depths, 8))
    tree = abstract_params(architecture)
    numbered = {  # every row says which block it is
        path: np.asarray(stack.blocks(leaf.shape[0])) if (stack := stack_of(FAMILIES[family].STACKS, path)) else leaf
        for path, leaf in flatten(tree).items()
    }
    first = plan_of_blocks(architecture, {name: [0, 1, 2, 5, 6, 7] for name in architecture.depths})
    shorter = architecture.with_depths(depths_after(first))
    then = plan_of_blocks(shorter, {name: [0, 3, 4, 5] for name in architecture.depths})
    twice = flatten(apply_plan(apply_plan(unflatten(numbered), first), then))
    once = flatten(apply_plan(unflatten(numbered), compose(first, then)))
    for path, leaf in twice.items():
        assert np.array_equal(leaf, once[path]) if isinstance(leaf, np.ndarray) else leaf is once[path], path
    found = flatten(apply_plan(apply_plan(tree, first), then))
    expected = flatten(abstract_params(shorter.with_depths(depths_after(then))))
    assert {path: leaf.shape for path, leaf in found.items()} == {path: leaf.shape for path, leaf in expected.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_that_leaves_blocks_at_places_of_another_kind_is_refused(kind):
    arch = cases.architecture(kind)
    alternating = [tower for tower in arch.towers if tower.period > 1]
    assert bool(alternating) == any(stack.step > 1 for stack in family_of(arch).STACKS)
    for tower in alternating:
        with pytest.raises(InputError, match="cannot take place"):
            plan_of_blocks(arch, {tower.name: [0, 2, 3]})


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_other_gates_compile_nothing(kind):
    """One program is the loss of every set of blocks; each removal changes it, so none was ignored."""
    arch, arrays = cases.architecture(kind), cases.inputs(cases.architecture(kind))
    loss = make_loss(arch, cases.params(arch), [CalibrationBatch(arrays, np.ones(cases.BATCH, bool))])
    whole = loss(Gates(cases.gates(arch)))
    with compilations() as compiled:
        others = [loss(Gates(cases.gates(arch, cases.removal(arch, group)))) for group in arch.groups]
    assert compiled == []
    assert np.isfinite(others).all()
    assert len({whole, *others}) == 1 + len(others)


@contextlib.contextmanager
def compilations():
    """Names of the programs that are compiled meanwhile."""
    names = []

    class Listening(logging.Handler):
        def emit(self, record):
            if record.getMessage().startswith("Compiling"):
                names.append(record.getMessage().split()[1])

    handler, logger = Listening(), logging.getLogger("jax")
    logger.addHandler(handler)
    try:
        with jax.log_compiles():
            yield names
    finally:
        logger.removeHandler(handler)


# Inputs, losses, samples


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_finite_and_states_are_those_of_the_towers(kind):
    arch = cases.architecture(kind)
    output, states, loss = cases.whole(kind)
    assert np.isfinite(output).all()
    assert loss.each.shape == loss.weight.shape == (cases.BATCH,)
    assert np.isfinite(loss.each).all()
    assert (loss.weight > 0).all()
    assert states.keys() == arch.depths.keys()
    for tower in arch.towers:
        streams, valid, _ = states[tower.name]
        assert streams.shape[:3] == (tower.depth + 1, *valid.shape)
        assert valid.any(axis=1).all()
        assert np.isfinite(streams).all()


@pytest.mark.parametrize("kind", KINDS)
def test_observations_of_zeros_are_finite(kind):
    arch = cases.architecture(kind)
    zeros = {key: np.zeros_like(array) for key, array in cases.inputs(arch).items()}
    output, _, loss = cases.run(arch)(cases.params(arch), zeros, cases.gates(arch))
    assert np.isfinite(output).all()
    assert np.isfinite(loss.each).all()


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_the_error_make_the_loss(kind):
    arch, (output, _, loss) = cases.architecture(kind), cases.whole(kind)
    arrays = cases.inputs(arch)
    weights = family_of(arch).error_weights(arch, arrays)
    if "actions" not in arrays:
        assert weights is None
        return
    # The target is noise minus action where time runs to the action, action minus noise where it runs from the noise.
    errors = [np.square(output - sign * (arrays["noise"] - arrays["actions"])) for sign in (1, -1)]
    found = [np.sum(np.asarray(weights) * error, axis=(1, 2)) for error in errors]
    assert any(np.allclose(each, loss.each, rtol=1e-5) for each in found)
    assert np.allclose(np.sum(weights, axis=(1, 2)), 1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_sample_has_the_shape_of_a_chunk(kind):
    arch, family = cases.architecture(kind), family_of(cases.architecture(kind))
    arrays = cases.inputs(arch)
    assert family.num_steps(arch) >= 1 or family.why_no_actions(arch)
    if family.why_no_actions(arch) is not None:
        assert "actions" not in arrays
        return
    model = family.build(arch)
    observation = {key: array for key, array in arrays.items() if key not in ("actions", "time", "noise")}
    sample = functools.partial(family.sample, model, num_steps=cases.STEPS, gates={})
    actions = jax.jit(lambda params, inputs, noise: sample(params, inputs, noise=noise))(
        cases.params(arch), observation, arrays["noise"]
    )
    assert actions.shape == (cases.BATCH, *arrays["actions"].shape[1:])
    assert actions.dtype == np.float32
    assert np.isfinite(actions).all()


@pytest.mark.parametrize("kind", KINDS)
def test_fixed_draw_is_fixed_and_starts_alike_for_more_observations(kind):
    arch, family = cases.architecture(kind), family_of(cases.architecture(kind))
    few, again, more = (family.fixed_draw(arch, cases.inputs(arch, batch)) for batch in (2, 2, 5))
    assert few.keys() == more.keys()
    for key, array in few.items():
        assert np.array_equal(array, again[key])
        assert np.array_equal(array, more[key][:2]), key


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_draw_follows_its_key(kind):
    arch, family = cases.architecture(kind), family_of(cases.architecture(kind))
    arrays = cases.inputs(arch)
    draw = jax.jit(lambda key: family.draw(arch, key, arrays)[0])
    one, same, other = (draw(jax.random.key(seed)) for seed in (0, 0, 1))
    for key in family.fixed_draw(arch, arrays):
        assert one[key].shape == arrays[key].shape
        assert np.array_equal(one[key], same[key])
        assert not np.array_equal(one[key], other[key])


# Teaching


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_learns_nothing_from_itself(kind):
    arch, family = cases.architecture(kind), family_of(cases.architecture(kind))
    undrawn = {key: x for key, x in cases.inputs(arch).items() if key not in ("noise", "time")}
    inputs, _ = family.draw(arch, jax.random.key(3), undrawn)  # what is left out at random included
    teaching = Teaching(architecture=arch, weight=1.0, states=1.0, blocks=same_blocks(arch, arch, None, None))
    params = cases.params(arch)

    def loss(student):
        whole, parts = taught_loss(teaching, arch, None, student, params, inputs)
        return whole.each.mean(), parts

    gradient, parts = jax.jit(jax.grad(loss, has_aux=True))(params)
    assert parts["task_loss"].each.min() > 1e-3
    assert np.abs(parts["teacher_loss"].each).max() < NOTHING
    assert np.abs(parts["states_loss"].each).max() < NOTHING
    assert max(np.abs(leaf).max() for leaf in flatten(gradient).values()) < NO_SLOPE


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_pruned_model_is_taught_by_the_difference_of_two_passes(kind):
    arch, arrays = cases.architecture(kind), cases.inputs(cases.architecture(kind))
    family, params = family_of(arch), cases.params(arch)
    removed = {tower: gone for group in arch.groups for tower, gone in cases.removal(arch, group).items()}
    plan = plan_of_blocks(arch, kept(arch, removed))
    shorter, pruned = arch.with_depths(depths_after(plan)), apply_plan(params, plan)
    output, states, loss = cases.run(shorter)(pruned, arrays, cases.gates(shorter))
    wanted, known, _ = cases.whole(kind)
    blocks = same_blocks(shorter, arch, {"plan": plan.to_json()}, None)
    teaching = Teaching(architecture=arch, weight=0.25, states=2.0, blocks=blocks)
    whole, parts = jax.jit(functools.partial(taught_loss, teaching, shorter, None))(pruned, params, arrays)

    weights = family.error_weights(shorter, arrays)
    if weights is None:
        ours, theirs = (np.asarray(jax.nn.log_softmax(x), np.float64) for x in (output, wanted))
        counted = arrays["token_loss_mask"][:, 1:]
        apart = (np.exp(theirs) * (theirs - ours)).sum(-1).mean(-1, where=counted)
    else:
        apart = np.sum(np.asarray(weights) * np.square(np.asarray(output) - wanted), axis=(1, 2))
    np.testing.assert_allclose(parts["teacher_loss"].each, apart, rtol=1e-4)
    np.testing.assert_allclose(parts["task_loss"].each, loss.each, rtol=1e-4)
    assert np.array_equal(whole.weight, loss.weight)
    of_states = np.mean([relative_difference(arch, name, states, known, kept) for name, kept in blocks], axis=0)
    np.testing.assert_allclose(parts["states_loss"].each, of_states, rtol=1e-4)
    np.testing.assert_allclose(whole.each, 0.75 * loss.each + 0.25 * apart + 2 * of_states, rtol=1e-4)


def relative_difference(arch, name, states, known, blocks):
    """Mean over blocks and real tokens of the squared difference of normalised streams, by observation."""
    tower = next(tower for tower in arch.towers if tower.name == name)
    found = []
    for own, block in enumerate(blocks):
        x, y = np.asarray(states[name].states[own + 1]), np.asarray(known[name].states[block + 1])
        x, y = (one / np.sqrt(np.mean(one**2, axis=-1, keepdims=True)) for one in (x, y))
        if block + 1 not in tower.incomparable:
            found.append(np.mean(np.mean((x - y) ** 2, axis=-1), axis=1, where=np.asarray(states[name].valid)))
    return np.mean(found, axis=0)


# Robots


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "pi0_fast"])
def test_a_robots_observation_becomes_what_the_model_reads_and_its_actions_come_back(kind):
    pytest.importorskip("tokenizers")
    processing, rng = cases.processing(kind), np.random.default_rng(2)
    arch, family = processing.architecture, family_of(processing.architecture)
    state, actions = np.array([0.1, 0.2, 6.0]), np.linspace([-1.0, 0.0, 5.0], [1.0, 0.5, 9.0], 4)
    size = (arch.vision.image_size, arch.vision.image_size, 3)
    images = {camera: rng.integers(0, 256, size).astype(np.uint8) for camera in processing.cameras}
    found = processing.inputs(state=state, images=images, prompt="push", actions=actions)
    lengths = Lengths(processing.action_horizon, processing.max_token_len)
    described = family.inputs(arch, lengths, processing.cameras)
    assert found.keys() == described.keys()
    for key, leaf in described.items():
        assert found[key].dtype == leaf.dtype, key
        assert key.startswith("image/") or found[key].shape == leaf.shape, key
    assert 0 < processing.prompt_tokens("push", 3) <= processing.max_token_len
    back = processing.outputs(found["actions"], state=state)
    np.testing.assert_allclose(back, actions, atol=1e-5)
    few = processing.inputs(state=state, images=images, prompt="push")
    assert found.keys() - few.keys() <= family.OF_LOSSES


# Stored forms

FOLDERS = {"smolvla": SMOLVLA, "groot": GROOT}


def stored_as_run(name, params, target):
    """The parameters as a run of ours keeps them, with the family's own files beside."""
    files = target.parent / f"{target.name}_files"
    shutil.copytree(FOLDERS[name] / "ckpt", files / "policy", ignore=shutil.ignore_patterns("model.safetensors"))
    for beside in ("vlm", "eagle"):
        if (FOLDERS[name] / beside).is_dir():
            shutil.copytree(FOLDERS[name] / beside, files / "policy" / beside)
    write_params(target, params, assets=files)
    return target


@pytest.mark.slow
@pytest.mark.parametrize("name", FOLDERS)
def test_both_stored_forms_are_the_same_model_and_are_cut_alike(name, tmp_path):
    folder = load_model(FOLDERS[name] / "ckpt", dtype="float32")
    run = load_model(stored_as_run(name, folder.params, tmp_path / "run"), dtype="float32")
    assert run.architecture == folder.architecture
    assert_bit_equal(folder.params, run.params)

    arch = folder.architecture
    group = arch.groups[0]
    plan = plan_of_blocks(arch, kept(arch, cases.removal(arch, group)))
    prune_folder(folder.spec, plan, tmp_path / "folder_cut")
    prune_checkpoint(run.spec, plan, tmp_path / "run_cut")
    expected = apply_plan(folder.params, plan)
    settings = {"vlm_config": FOLDERS[name] / ("vlm" if (FOLDERS[name] / "vlm").is_dir() else "eagle")}
    cut = load_model(tmp_path / "folder_cut", dtype="float32", **settings)
    assert cut.architecture == arch.with_depths(depths_after(plan))
    assert_bit_equal(expected, cut.params)
    assert_bit_equal(expected, load_model(tmp_path / "run_cut", dtype="float32").params)


@pytest.mark.slow
def test_an_openpi_checkpoint_written_again_is_the_same_model(tmp_path):
    released = load_model(RECORDED / "pi0_released", dtype="float32")
    write_params(tmp_path / "run", released.params)
    again = load_model(tmp_path / "run", dtype="float32")
    assert again.architecture == released.architecture
    assert_bit_equal(released.params, again.params)
    arch = again.architecture
    plan = plan_of_blocks(arch, kept(arch, cases.removal(arch, arch.groups[0])))
    prune_checkpoint(read_spec(tmp_path / "run"), plan, tmp_path / "cut")
    assert_bit_equal(apply_plan(released.params, plan), load_model(tmp_path / "cut", dtype="float32").params)


# Healing


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_what_blocks_add_to_a_stream_is_their_writes_times_the_last_weights(kind):
    arch = cases.architecture(kind)
    family, params = family_of(arch), cases.params(arch)
    forward = jax.jit(lambda p, x: family.forward(family.build(arch), p, x, gates=Gates(), capture="writes")[1])
    towers, leaves = forward(params, cases.inputs(arch)), flatten(params)
    healed = {write.tower for write in family.WRITES} & set(arch.depths)
    assert healed == {tower.name for tower in arch.towers if not tower.optional}
    for name in healed:
        tower = towers[name]
        added = np.zeros_like(tower.states[1:])
        for write in (write for write in family.WRITES if write.tower == name):
            x, gate = tower.writes[write.branch]
            for path in (path for path in leaves if re.fullmatch(write.kernel, path)):
                bias = leaves.get(re.sub("/kernel$", "/bias", path)) if path.endswith("/kernel") else None
                for row, block in enumerate(stack_of(family.STACKS, path).blocks(len(leaves[path]))):
                    product = x[block] @ leaves[path][row].reshape(x.shape[-1], -1)
                    product = product if bias is None else product + bias[row]
                    added[block] += product if gate is None else product * gate[block]
        comparable = [i for i in range(arch.depths[name]) if i + 1 not in arch_tower(arch, name).incomparable]
        assert comparable
        assert_same(added[comparable], np.diff(tower.states, axis=0)[comparable])


def arch_tower(arch, name):
    return next(tower for tower in arch.towers if tower.name == name)
