"""A healed cut against fits that are made by hand, and what is written of it."""

import json
import math
import re
import shutil

import family_cases as cases
import jax
import numpy as np
import pytest
import toys
from checkpoints import assert_bit_equal, write_example_data
from safetensors_folders import GROOT, SMOLVLA

from clp_jax import cli, example
from clp_jax.analysis import loss_of
from clp_jax.checkpoint import read_params, read_spec
from clp_jax.commands import prune as prune_command
from clp_jax.commands import prune_choice
from clp_jax.data import CalibrationData, hold_out
from clp_jax.errors import InputError
from clp_jax.healing import Work, heal, repairs_of, sums_step, with_draws
from clp_jax.loading import LoadedModel, load_model, read_architecture
from clp_jax.models import Gates, family_of, stack_of
from clp_jax.plan import PrunePlan
from clp_jax.planning import plan_of_blocks
from clp_jax.provenance import healing
from clp_jax.prune import Changes, apply_plan, prune_checkpoint
from clp_jax.sharding import make_mesh
from clp_jax.trees import flatten

pytestmark = pytest.mark.slow


def toy(kind="pi0", **leaves):
    """A toy whose blocks change the stream little by little, as those of trained models do."""
    arch = toys.architecture(kind)
    flat = flatten(toys.params(arch))
    for path, leaf in flat.items():
        if any(re.fullmatch(write.kernel, path) for write in family_of(arch).WRITES):
            flat[path] = leaf * np.float32(0.3)
    params = toys.unflatten(flat | leaves)
    return loaded(arch, params)


def loaded(arch, params):
    """A model that is in no checkpoint."""
    return LoadedModel(read_spec(example.CHECKPOINT), arch, jax.tree.map(jax.numpy.asarray, params), make_mesh())


def plan_of(model, keep):
    return plan_of_blocks(model.architecture, keep)


@pytest.fixture(scope="module")
def healed():
    model = toy()
    plan = plan_of(model, [0, 2])
    data = toys.data(model.architecture, 96), toys.data(model.architecture, 32, seed=1)
    return model, plan, data, fitted(model, plan, *data, batch_size=32)


def fitted(*case, **settings):
    """All fits. (What `heal` adds is the loss, which says nothing about models that were never trained.)"""
    work = Work(*case, **settings)
    for fit in work.fits:
        work.fit(*fit)
    return work


def test_blocks_are_named_with_why_they_stay_as_they_are():
    arch = toys.architecture()
    plan = PrunePlan.of(
        "pi0", arch.depths, {"vision": [1], "vlm": [1, 3], "action": [1, 3]}, coupled=(("vlm", "action"),)
    )
    assert [(one.tower, one.block, one.removed, one.why_not) for one in repairs_of(arch, plan)] == [
        ("vision", None, (0,), "this tower is not healed"),
        ("vlm", 1, (2,), None),
        ("vlm", 3, (), "nothing compares with the state behind it"),
        ("action", 1, (2,), None),
        ("action", 3, (), None),
    ]
    assert [one.target for one in repairs_of(arch, plan)[1:]] == [3, 4, 3, 4]
    deepest = plan_of_blocks(arch, [0, 1])
    assert [(one.block, one.why_not is None) for one in repairs_of(arch, deepest)] == [(1, False), (1, True)]
    # What comes before the first gap sees what it always saw.
    assert [one.block for one in repairs_of(arch, plan_of_blocks(arch, [0, 1, 3]))] == [1, 3, 1, 3]


def test_healing_brings_the_stream_closer_and_changes_only_the_last_weights(healed):
    model, plan, _, work = healed
    found = [(one.tower, one.block, one.removed) for one in work.repairs]
    assert found == [(tower, block, (block + 1,)) for tower in ("vlm", "action") for block in (0, 2)]
    assert [one.why_not is None for one in work.repairs] == [True, False, True, True]
    assert all(one.after < 0.95 * one.before for one in work.repairs if one.why_not is None)
    cut = flatten(apply_plan(model.params, plan))
    assert set(work.changed) == {write.kernel for write in family_of(model.architecture).WRITES}
    for path, leaf in flatten(work.params).items():
        assert (leaf.shape, leaf.dtype) == (cut[path].shape, cut[path].dtype)
        np.testing.assert_array_equal(leaf, work.changed.get(path, cut[path]))
    # The VLM's block before the end of the stack is not read: it stays to the bit.
    for path in ("PaliGemma/llm/layers/mlp/linear", "PaliGemma/llm/layers/attn/attn_vec_einsum/w"):
        np.testing.assert_array_equal(work.changed[path][1], cut[path][1])
        assert (work.changed[path][0] != cut[path][0]).any()


def test_what_was_fitted_can_be_undone():
    model = toy()
    data = toys.data(model.architecture, 16), toys.data(model.architecture, 8, seed=1)
    sums_step.cache_clear()
    work = fitted(model, plan_of(model, [0, 2, 3]), *data, batch_size=16)
    assert sums_step.cache_info().currsize == 2  # a program for each branch, whichever towers are fitted
    cut = work.loss()
    work.undo()
    assert work.loss() != cut and not work.changed
    assert all(one.why_not and not one.ridges for one in work.repairs)
    np.testing.assert_array_equal([one.after for one in work.repairs], [one.before for one in work.repairs])


def test_the_first_fit_is_the_one_made_by_hand(healed):
    """The attention of block 0 in the VLM, from states and features of whole forward passes, by NumPy in float64."""
    model, plan, (data, _), work = healed
    family, arch = family_of(model.architecture), model.architecture
    cut = apply_plan(model.params, plan)
    inputs = {k: v for k, v in with_draws(arch, data, 4).arrays.items() if k != "episode_index"}
    full = family.forward(family.build(arch), model.params, inputs, gates=Gates(), capture=True)[1]["vlm"]
    smaller = arch.with_depths({"vlm": 2, "action": 2})
    small = family.forward(family.build(smaller), cut, inputs, gates=Gates(), capture="writes")[1]["vlm"]
    valid = np.asarray(small.valid)
    x = np.asarray(small.writes["attention"].x[0], np.float64)[valid]
    error = np.asarray(full.states[2] - small.states[1], np.float64)[valid]
    ridge = next(one.ridges["attention"] for one in work.repairs if one.tower == "vlm")
    gram = x.T @ x
    change = np.linalg.solve(gram + ridge * np.diag(np.diag(gram)), x.T @ error)
    path = "PaliGemma/llm/layers/attn/attn_vec_einsum/w"
    ours = (np.asarray(work.changed[path])[0] - np.asarray(flatten(cut)[path])[0]).reshape(change.shape)
    np.testing.assert_allclose(ours, change, atol=1e-3 * np.abs(change).max())


def test_a_block_that_does_nothing_leaves_nothing_to_heal():
    idle = {}
    for path, leaf in flatten(toys.params(toys.architecture())).items():
        if any(re.fullmatch(write.kernel, path) for write in family_of(toys.architecture()).WRITES):
            leaf[1] = 0
            idle[path] = leaf
    model = toy(**idle)
    data = toys.data(model.architecture, 8), toys.data(model.architecture, 8, seed=1)
    found = heal(model, plan_of(model, [0, 2, 3]), *data, batch_size=8)
    assert not found.changes.leaves and found.healed == found.pruned
    assert all(one.before < 1e-6 for one in found.repairs if not math.isnan(one.before))
    assert sum(not math.isnan(one.before) for one in found.repairs) == 5


def test_healing_that_makes_the_loss_worse_is_not_done(monkeypatch):
    model = toy()
    data = toys.data(model.architecture, 8), toys.data(model.architecture, 8, seed=1)
    losses = iter([1.0, 2.0, 2.5])
    monkeypatch.setattr(Work, "loss", lambda self, **_: next(losses))
    found = heal(model, plan_of(model, [0, 2, 3]), *data, batch_size=8)
    assert (found.full, found.pruned, found.healed, found.won_back) == (1.0, 2.0, 2.0, 0.0)
    assert not found.changes.leaves and all(one.why_not for one in found.repairs)
    assert sum("worse on held-out" in (one.why_not or "") for one in found.repairs) == 5


@pytest.mark.parametrize("kind", ["pi05", "pi0_fast", "smolvla", "groot_n15"])
def test_every_family_is_healed(kind):
    arch = cases.architecture(kind)
    params = flatten(cases.params(arch))
    for path, leaf in params.items():
        if any(re.fullmatch(write.kernel, path) for write in family_of(arch).WRITES):
            params[path] = leaf * np.float32(0.3)
    model = loaded(arch, toys.unflatten(params))
    group = max(arch.groups, key=lambda group: len(group) + (group[0] == "dit"))
    tower = next(tower for tower in arch.towers if tower.name == group[0])
    gone = range(tower.period, 2 * tower.period)
    keep = {name: [b for b in range(arch.depths[name]) if b not in gone] for name in group}
    plan = PrunePlan.of(arch.kind, arch.depths, keep, coupled=arch.coupled)
    arrays = cases.inputs(arch, 48)
    data = [CalibrationData({k: x[i] for k, x in arrays.items()}, "made up") for i in (slice(36), slice(36, 48))]
    work = fitted(model, plan, *data, batch_size=12)
    assert {one.tower for one in work.repairs} == set(group)
    assert all(one.after < one.before for one in work.repairs if one.removed and one.why_not is None)
    assert any(one.ridges for one in work.repairs)
    stacks = family_of(arch).STACKS
    assert {stack_of(stacks, path).tower for path in work.changed} <= set(group)


# The command


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The embedded example without four blocks: a model that was trained, so that its loss means something."""
    folder = tmp_path_factory.mktemp("healed")
    write_example_data(folder / "data.npz", 96)
    flags = ["prune", "--checkpoint", example.CHECKPOINT, "--keep", "0,1,2,3,4,5,6,7,8,9,10,11,16,17", "--out"]
    assert cli.main([*flags, str(folder / "cut")]) == 0
    settings = ["--heal", "--data", str(folder / "data.npz"), "--groups-per-batch", "6"]
    assert cli.main([*flags, str(folder / "healed"), *settings]) == 0
    return folder


def test_a_healed_checkpoint_differs_from_the_cut_one_in_what_was_healed_alone(written):
    cut, healed = (flatten(read_params(read_spec(written / name))) for name in ("cut", "healed"))
    assert {path for path in cut if cut[path].tobytes() != healed[path].tobytes()} == {
        write.kernel for write in family_of(toys.architecture()).WRITES
    }
    assert all((leaf.shape, leaf.dtype) == (healed[path].shape, healed[path].dtype) for path, leaf in cut.items())
    record = json.loads((written / "healed" / "clp.json").read_text())["steps"][-1]["healed"]
    losses = record["loss"]
    assert losses["healed"] - losses["full"] < 0.8 * (losses["pruned"] - losses["full"])
    assert [one["removed"] for one in record["blocks"]] == 2 * [[12, 13, 14, 15], [], []]
    assert cli.main(["inspect", str(written / "healed"), "--verify"]) == 0


def test_a_healed_checkpoint_is_the_model_whose_loss_was_recorded(written):
    model = load_model(str(written / "healed"))
    record = json.loads((written / "healed" / "clp.json").read_text())["steps"][-1]["healed"]
    data = example.observations(96)
    _, rows = hold_out(data.episodes, 0.25, seed=0)
    assert loss_of(model, data.take(rows))(Gates()) == pytest.approx(record["loss"]["healed"], rel=1e-5)


def test_healing_needs_data_and_episodes_to_hold_out(written, tmp_path, capsys, monkeypatch):
    flags = ["prune", "--checkpoint", example.CHECKPOINT, "--keep", "0,1,2", "--heal", "--out", str(tmp_path / "out")]
    assert cli.main(flags) == 2
    assert "--heal needs observations" in capsys.readouterr().err
    with monkeypatch.context() as unread:
        unread.setattr(prune_command, "load_to_heal", None)  # said before the model and its data are read
        other = PrunePlan.of("pi0", {"vlm": 4, "action": 4}, {name: [0, 3] for name in ("vlm", "action")})
        other.save(tmp_path / "other.json")
        keeps_all = ["--keep", ",".join(map(str, range(18)))]
        for stated, wrong in (
            (keeps_all, "nothing to heal"),
            (["--plan", str(tmp_path / "other.json")], "tower of 4 blocks"),
        ):
            assert cli.main([*flags[:3], *stated, *flags[5:], "--data", str(written / "data.npz")]) == 2
            assert wrong in capsys.readouterr().err
    monkeypatch.setattr(prune_choice, "measure", None)  # said before an analysis of minutes
    flags = [*flags[:3], "--keep-layers", "3", *flags[5:], "--data", str(written / "data.npz")]
    assert cli.main([*flags, "--holdout-ratio", "0"]) == 2
    assert "--heal chooses by episodes that are held out" in capsys.readouterr().err
    assert cli.main([*flags, "--max-observations", "1"]) == 2
    assert "all of --max-observations 1 would be held out" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("folder", "vlm", "tower"), [(SMOLVLA, "vlm", "action"), (GROOT, "eagle", "dit")], ids=["smolvla", "groot"]
)
def test_folders_of_safetensors_take_healed_leaves_into_their_own_files(folder, vlm, tower, tmp_path):
    spec, vlm_config = read_spec(str(folder)), str(folder.parent / vlm)
    arch = read_architecture(spec, vlm_config=vlm_config)
    group = next(group for group in arch.groups if tower in group)
    keep = {name: [b for b in range(arch.depths[name]) if b not in (2, 3)] for name in group}
    plan = PrunePlan.of(arch.kind, arch.depths, keep, coupled=arch.coupled)
    prune_checkpoint(spec, plan, tmp_path / "cut")
    plain = flatten(load_model(str(tmp_path / "cut"), vlm_config=vlm_config).params)
    last = [write.kernel for write in family_of(arch).WRITES if write.tower == tower]
    leaves = {p: np.asarray(x) * 2 for p, x in plain.items() if any(re.fullmatch(kernel, p) for kernel in last)}
    assert len(leaves) == 4  # attention and feed-forward of both kinds of blocks
    smaller = arch.with_depths({name: len(blocks) for name, blocks in keep.items()})
    prune_checkpoint(spec, plan, tmp_path / "healed", changes=Changes(smaller, leaves, {"blocks": []}))
    assert {p.name for p in (tmp_path / "cut").iterdir()} == {p.name for p in (tmp_path / "healed").iterdir()}
    read = flatten(load_model(str(tmp_path / "healed"), vlm_config=vlm_config).params)
    assert_bit_equal(*(toys.unflatten(tree) for tree in (plain | leaves, read)))
    assert cli.main(["inspect", str(tmp_path / "healed"), "--verify"]) == 0
    wrong = {path: leaf[:1] for path, leaf in leaves.items()}
    with pytest.raises(InputError, match="of the healed model"):
        prune_checkpoint(spec, plan, tmp_path / "wrong", changes=Changes(smaller, wrong, {}))
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize("healed", [[], {"blocks": {}}, {"blocks": [3]}, {"loss": []}, {"loss": {"pruned": "much"}}])
def test_a_damaged_record_of_healing_is_named(written, tmp_path, healed, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(written / "healed", copy)
    record = json.loads((copy / "clp.json").read_text())
    record["steps"][-1]["healed"] = healed
    (copy / "clp.json").write_text(json.dumps(record))
    code, said = cli.main(["inspect", str(copy)]), capsys.readouterr()
    assert (code == 2 and "clp.json is damaged" in said.err) or healed == []


def test_inspect_says_what_was_healed(written, capsys):
    assert cli.main(["inspect", str(written / "healed"), "--json"]) == 0
    (step,) = [step for step in json.loads(capsys.readouterr().out)["history"] if step["command"] == "prune"]
    assert healing(step["healed"]).startswith("healed, 5 of 6 blocks on 56 observations, held-out loss")
