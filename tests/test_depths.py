"""``clp finetune --depths``: cuts of one model that take turns, from their choice to the step that is cut out."""

import dataclasses
import functools
import json
import re
import shutil

import family_cases
import jax
import numpy as np
import optax
import pytest
import toys
import tyro
from safetensors_folders import GROOT
from served import rows

from clp_jax import sharding
from clp_jax.analysis import Analysis
from clp_jax.checkpoint import read_params, read_spec, write_params
from clp_jax.checkpoint.safetensors.folder import read_folder
from clp_jax.cli import main
from clp_jax.commands import serve
from clp_jax.commands.depths_flags import trained_cut
from clp_jax.commands.serve import Serve
from clp_jax.cuts import WHOLE, cut_of, smaller
from clp_jax.data import arrange
from clp_jax.errors import InputError
from clp_jax.models import Gates
from clp_jax.models.towers import Tower
from clp_jax.plan import PrunePlan
from clp_jax.planning import Depth, choose, choose_nested
from clp_jax.prune import apply_plan
from clp_jax.report.tables import compact
from clp_jax.selection import Evidence
from clp_jax.sensitivity import make_loss
from clp_jax.similarity import batches
from clp_jax.training import StepSettings, make_state, train_step
from clp_jax.training.held_out import held_out_loss
from clp_jax.trees import flatten

pytestmark = pytest.mark.slow

ARCH = toys.architecture()
FAST = ("--peak-lr", "1e-2", "--warmup-steps", "1", "--log-every", "1", "--no-augment", "--keep-period", "None")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A toy model of 4 blocks, its analysis, another model, and 24 observations."""
    folder = tmp_path_factory.mktemp("depths")
    np.savez(folder / "data.npz", **toys.data(ARCH, 24).arrays)
    for name, seed in (("model", 0), ("other", 1)):
        write_params(folder / name, toys.params(ARCH, seed=seed))
    argv = ["analyse", "--checkpoint", folder / "model", "--data", folder / "data.npz", "--out", folder / "analysis"]
    assert main([str(word) for word in (*argv, "--keep-layers", "2")]) == 0
    return folder


def words(inputs, out, *flags, checkpoint="model", analysis="analysis") -> list[str]:
    paths = ["--checkpoint", inputs / checkpoint, "--data", inputs / "data.npz", "--out", out, "--batch-size", "8"]
    chosen_by = [] if analysis is None else ["--analysis", inputs / analysis]
    held = ["--holdout-ratio", "0.3", "--evaluate-every", "1"]
    return [str(word) for word in ("finetune", *paths, *chosen_by, *held, *FAST, *flags)]


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "run"
    assert main(words(inputs, out, "--depths", "4", "3", "2", "--steps", "4")) == 0
    return out


def cuts(run) -> list[PrunePlan]:
    step = json.loads((run / "3" / "clp.json").read_text())["steps"][-1]
    return [PrunePlan.from_json(plan) for plan in step["cuts"]]


def entries(run, key: str) -> list[float]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [entry[key] for entry in found if key in entry]


def refusal(capsys, argv: list[str]) -> str:
    assert main(argv) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


# The run.


def test_cuts_are_nested_recorded_and_judged(inputs, finished):
    three, two = (plan.towers["vlm"].keep for plan in cuts(finished))
    assert len(three) == 3
    assert len(two) == 2
    assert set(two) < set(three)
    assert [plan.towers["action"].keep for plan in cuts(finished)] == [three, two]
    losses = [entries(finished, key)[-1] for key in ("held_out_loss", "held_out_loss_at_3", "held_out_loss_at_2")]
    assert len(set(losses)) == 3


def test_the_page_shows_the_losses_of_all_depths(finished):
    page = (finished / "report.html").read_text()
    assert "in turn with its cut to vlm 3; action 3, in turn with its cut to vlm 2; action 2" in page
    for name in ("held_out_loss_at_3", "held_out_loss_at_2"):
        assert f"<td>{compact(entries(finished, name)[-1])}</td>" in page


def test_inspect_names_the_depths(finished, capsys):
    assert main(["inspect", str(finished / "3")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "in turn with vlm and action of 3 blocks; in turn with vlm and action of 2 blocks" in said


@pytest.mark.parametrize("cuts", [5, [5], [{}]])
def test_damaged_cuts_are_one_line(finished, tmp_path, capsys, cuts):
    copy = tmp_path / "3"
    shutil.copytree(finished / "3", copy)
    record = json.loads((copy / "clp.json").read_text())
    record["steps"][-1]["cuts"] = cuts
    (copy / "clp.json").write_text(json.dumps(record))
    argv = ["prune", "--checkpoint", str(copy), "--keep-layers", "2", "--out", str(tmp_path / "two")]
    assert "clp.json is damaged" in refusal(capsys, argv)


@pytest.mark.parametrize(
    ("towers", "complaint"),
    [
        ({"vlm": {"depth": 18, "keep": [0, 1]}}, "a 'vlm' tower of 18 blocks, but the model's has 4"),
        ({"vlm": {"depth": 4, "keep": [0, 1]}}, "must keep the same blocks"),
        ({"vision": {"depth": 2, "keep": [0, 1]}}, "trained no cut of this depth"),
    ],
)
def test_cuts_of_another_model_are_one_line(towers, complaint):
    plan = PrunePlan.of(ARCH.kind, ARCH.depths).to_json() | {"towers": towers, "coupled": []}
    with pytest.raises(InputError, match=complaint):
        trained_cut([PrunePlan.from_json(plan)], Depth(keep_layers=2), ARCH, flag="depths", otherwise="none")


def test_a_number_for_several_towers_is_told_how_to_write_it():
    shape = read_folder(GROOT).shape
    with pytest.raises(InputError, match=re.escape("of which tower; write --depths llm=...,dit=...,vl=....")):
        trained_cut([], Depth(keep_layers=2), shape, flag="depths", otherwise="none")


def test_a_trained_cut_comes_out_without_data(inputs, finished, tmp_path):
    assert (
        main(["prune", "--checkpoint", str(finished / "3"), "--keep-layers", "2", "--out", str(tmp_path / "two")]) == 0
    )
    whole, small = (read_params(read_spec(path)) for path in (finished / "3", tmp_path / "two"))
    expected = flatten(apply_plan(whole, cuts(finished)[1]))
    for path, leaf in flatten(small).items():
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)


def test_a_trained_cut_is_healed_and_data_alone_chooses_anew_and_says_so(inputs, finished, tmp_path, capsys):
    data = ["--data", str(inputs / "data.npz"), "--holdout-ratio", "0.3"]
    argv = ["prune", "--checkpoint", str(finished / "3"), "--keep-layers", "2", *data]
    assert main([*argv, "--heal", "--out", str(tmp_path / "healed")]) == 0
    assert "chooses blocks anew" not in capsys.readouterr().out
    plan = PrunePlan.from_json(json.loads((tmp_path / "healed" / "clp.json").read_text())["plan"])
    assert plan.towers == cuts(finished)[1].towers
    assert main([*argv, "--out", str(tmp_path / "anew")]) == 0
    assert "--data chooses blocks anew" in capsys.readouterr().out
    argv[4] = "1"
    assert "say with --criterion how to choose others" in refusal(
        capsys, [*argv, "--heal", "--out", str(tmp_path / "x")]
    )
    assert main([*argv, "--heal", "--criterion", "clp", "--out", str(tmp_path / "one")]) == 0


def test_a_depth_that_was_not_trained_is_refused(inputs, finished, tmp_path, capsys):
    argv = ["prune", "--checkpoint", str(finished / "3"), "--keep-layers", "1", "--out", str(tmp_path / "one")]
    assert "trained no cut of this depth, only 3 and 2" in refusal(capsys, argv)
    argv[4] = "2"
    assert "trained no cut of this depth" in refusal(capsys, [*argv, "--keep-vision-layers", "1"])
    assert "leave out --criterion" in refusal(capsys, [*argv, "--criterion", "first"])
    by_ratio = [*argv[:3], "--keep-ratio", "0.5", *argv[5:]]
    assert "or --keep-layers alone for a depth that this step was trained at" in refusal(capsys, by_ratio)
    argv[2] = str(inputs / "model")
    assert "give one of --data, --analysis, --plan and --keep" in refusal(capsys, argv)


def make_policy(checkpoint, *flags):
    config = tyro.cli(Serve, args=["--checkpoint", str(checkpoint), "--max-token-len", "5", "--max-batch", "1", *flags])
    return serve.make_policy(config, read_spec(checkpoint))


def test_a_trained_cut_is_served_as_if_it_had_been_cut_out(finished, tmp_path):
    argv = ["prune", "--checkpoint", str(finished / "3"), "--keep-layers", "2", "--out", str(tmp_path / "two")]
    assert main(argv) == 0
    several, alone = make_policy(finished / "3", "--depths", "2", "4"), make_policy(tmp_path / "two")
    request = rows(1)[0] | {"noise": np.zeros((toys.HORIZON, 6), np.float32)}
    one, other, whole = several.infer(request), alone.infer(request), several.infer(request | {"keep_layers": 4})
    np.testing.assert_allclose(one["actions"], other["actions"], rtol=1e-5, atol=1e-6)
    assert (one["keep_layers"], whole["keep_layers"]) == ("2", "4")
    assert np.abs(whole["actions"] - one["actions"]).max() > 1e-4


@pytest.mark.parametrize(
    ("checkpoint", "depths", "complaint"),
    [
        ("step", ("1",), "trained no cut of this depth, only 4 and 3 and 2: take one of these, or cut this one"),
        ("step", ("2", "2"), "names a depth twice"),
        ("step", ("two",), "--depths two cannot be read"),
        ("step", ("vision=1",), "--depths: there is no tower 'vision'"),
        ("model", ("2",), "was not trained at several depths"),
    ],
)
def test_depths_that_cannot_be_served_are_said(inputs, finished, checkpoint, depths, complaint):
    folder = {"step": finished / "3", "model": inputs / "model"}[checkpoint]
    with pytest.raises(InputError, match=complaint):
        make_policy(folder, "--depths", *depths)


def test_a_cut_of_a_step_is_no_longer_trained_at_several_depths(finished, tmp_path, capsys):
    argv = ["prune", "--checkpoint", str(finished / "3"), "--keep-layers", "3", "--out", str(tmp_path / "three")]
    assert main(argv) == 0
    again = ["prune", "--checkpoint", str(tmp_path / "three"), "--keep-layers", "2", "--out", str(tmp_path / "two")]
    assert "give one of --data" in refusal(capsys, again)


def test_a_run_resumes_to_the_same_bits_in_the_same_turn(inputs, finished, tmp_path):
    for steps in ("2", "4"):  # so that the second part begins with the third depth
        assert main(words(inputs, tmp_path / "run", "--depths", "4", "3", "2", "--steps", steps, "--resume")) == 0
    assert entries(tmp_path / "run", "loss") == entries(finished, "loss")
    one, other = (flatten(read_params(read_spec(folder / "3"))) for folder in (tmp_path / "run", finished))
    for path, leaf in one.items():
        np.testing.assert_array_equal(leaf, other[path], err_msg=path)


@pytest.mark.parametrize(
    ("flags", "given", "complaint"),
    [
        (("--depths", "2"), {"analysis": None}, "--depths and --analysis go together"),
        ((), {}, "--depths and --analysis go together"),
        (("--depths", "2"), {"checkpoint": "other"}, "analyse this checkpoint."),
        (("--depths", "4"), {}, "is the whole model alone"),
        (("--depths", "2", "2"), {}, "one must keep more blocks"),
        (("--depths", "5"), {}, "5"),
        (("--depths", "two"), {}, "--depths two cannot be read"),
        (("--depths", "llm=2"), {}, "--depths: there is no tower 'llm'"),
        (("--depths", "2", "--teacher", "model"), {}, "--depths and --teacher"),
    ],
)
def test_what_cannot_be_meant_is_said(inputs, tmp_path, capsys, flags, given, complaint):
    flags = [str(inputs / word) if word == "model" else word for word in flags]
    assert complaint in refusal(capsys, words(inputs, tmp_path / "run", *flags, "--steps", "1", **given))
    assert not (tmp_path / "run").exists()


def test_a_run_does_not_go_on_with_other_cuts(inputs, finished, capsys):
    said = refusal(capsys, words(inputs, finished, "--depths", "3", "--steps", "5", "--resume"))
    assert "cuts was vlm" in said and "_about" not in said


# The step.


@pytest.mark.parametrize(("kind", "others"), [("pi0", (WHOLE,)), ("groot_n15", ())])
def test_a_step_trains_one_cut_as_if_it_were_alone(kind, others):
    arch = family_cases.architecture(kind)
    keep = {name: [0, 3] for group in arch.groups for name in group if name != "vision"}
    plan = PrunePlan.of(arch.kind, arch.depths, keep, coupled=arch.coupled)
    batch = {k: x for k, x in family_cases.inputs(arch).items() if k not in ("noise", "time")}
    cut = cut_of(plan)
    tx = optax.sgd(0.1)  # AdamW would make steps of the rounding of gradients that are zero
    key = jax.random.key(7)

    def after(architecture, params, turns, number):
        settings = StepSettings(augment=False, ema_decay=None, cuts=turns)
        state = make_state(params, tx, frozen=frozenset(), ema=False)
        state = dataclasses.replace(state, step=np.int32(number))
        step = jax.jit(functools.partial(train_step, architecture, tx, settings))
        return step(key, state, batch)

    whole = family_cases.params(arch)
    state, info = after(arch, whole, (*others, cut), 1)
    alone, expected = after(smaller(arch, cut), apply_plan(whole, plan), (WHOLE,), 1)
    np.testing.assert_allclose(info["loss"], expected["loss"], rtol=1e-6)
    np.testing.assert_allclose(info["grad_norm"], expected["grad_norm"], rtol=1e-5)
    for path, leaf in flatten(apply_plan(state.params, plan)).items():
        np.testing.assert_allclose(leaf, flatten(alone.params)[path], rtol=1e-4, atol=1e-6, err_msg=path)
    gone = {name: tower.removed for name, tower in plan.towers.items() if tower.removed}
    rest = PrunePlan.of(arch.kind, arch.depths, gone)
    untouched = flatten(apply_plan(whole, rest))
    moved = flatten(apply_plan(state.params, rest))
    stacked = [path for path in moved if moved[path].shape != flatten(state.params)[path].shape]
    assert stacked
    for path in stacked:
        np.testing.assert_array_equal(moved[path], untouched[path], err_msg=path)


def test_losses_of_cuts_are_those_of_the_cut_models():
    data, mesh, params = toys.data(ARCH, 6), sharding.make_mesh(1), toys.params(ARCH)
    plan = PrunePlan.of(ARCH.kind, ARCH.depths, {"vlm": [0, 2], "action": [0, 2]}, coupled=ARCH.coupled)
    evaluate = held_out_loss(ARCH, {0: (1.0, data)}, mesh, batch_size=8, cuts=(WHOLE, cut_of(plan)))
    assert evaluate is not None
    found = evaluate(params)
    size = jax.device_count()
    fixed = list(batches(data, arrange(data.episodes, 1), size, mesh))
    alone = make_loss(smaller(ARCH, cut_of(plan)), apply_plan(params, plan), fixed)(Gates())
    assert found["held_out_loss_at_2"] == pytest.approx(alone, rel=1e-6)
    assert found["held_out_loss"] != pytest.approx(alone, rel=1e-3)


# The choice.


@pytest.fixture
def analysis(monkeypatch):
    """Of 4 blocks: the best two to keep are 0 and 3, the best three alone would be 0, 1 and 2."""
    damage = np.full((5, 5), 9.0)
    np.fill_diagonal(damage, 0)
    for (start, end), cost in {(0, 1): 1.0, (1, 2): 0.5, (2, 3): 0.4, (3, 4): 0.2, (1, 3): 0.1}.items():
        damage[start, end] = damage[end, start] = cost
    evidence = Evidence(4, 1 - damage, damage)
    monkeypatch.setattr(Analysis, "evidence", lambda *_, **__: evidence)
    return Analysis("pi0", (Tower("vlm", 4), Tower("action", 4)), (("vlm", "action"),), {}, {}, {})


def kept(plans: list[PrunePlan]) -> list[tuple[int, ...]]:
    return [plan.towers["vlm"].keep for plan in plans]


def test_every_cut_lies_in_the_next_larger(analysis):
    assert kept([choose(analysis, "jumps", Depth(keep_layers=3))]) == [(0, 1, 2)]
    found = choose_nested(analysis, "jumps", [Depth(keep_layers=n) for n in (2, 4, 3)])
    assert kept(found) == [(0, 1, 2, 3), (0, 1, 3), (0, 3)]


def test_depths_that_do_not_lie_in_each_other_are_refused(analysis):
    with pytest.raises(InputError, match="of two depths"):
        choose_nested(analysis, "jumps", [Depth(keep_layers=2), Depth(keep_ratio=0.5)])
