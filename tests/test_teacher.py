"""``clp finetune --teacher``: a full model beside a pruned one, from its checks to its saved steps."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from clp_jax import sharding
from clp_jax.checkpoint import fingerprint, read_params, read_spec, write_params
from clp_jax.cli import main
from clp_jax.commands.teacher_flags import _check_conventions, _check_statistics
from clp_jax.data.dataset import open_dataset
from clp_jax.errors import InputError
from clp_jax.flops import forward_flops
from clp_jax.models import Lengths, abstract_params
from clp_jax.operations import count_operations
from clp_jax.plan import PrunePlan
from clp_jax.processing import norm_stats
from clp_jax.processing.conventions import Conventions
from clp_jax.processing.norm_stats import NormStats
from clp_jax.training import OptimizerSettings, StepSettings, make_optimizer, make_state, train_step
from clp_jax.training.program import build_program
from clp_jax.training.teaching import Teaching, check_teacher, same_blocks
from clp_jax.training.throughput import step_flops
from clp_jax.trees import flatten

pytestmark = pytest.mark.slow

ARCH = toys.architecture()
SHORT = ARCH.with_depths({"vlm": 3, "action": 3})
KEPT = (0, 1, 3)
FAST = ("--peak-lr", "1e-2", "--warmup-steps", "1", "--log-every", "1", "--no-augment", "--keep-period", "None")
LENGTHS = Lengths(toys.HORIZON, toys.PROMPT)
HELD = ("--holdout-ratio", "0.3", "--evaluate-every", "0", "--freeze", "PaliGemma/.*")
TAUGHT = ("--teacher-weight", "0.25", "--teacher-states", "0.5", *HELD)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A toy model, the same without block 2, another of its size, and 24 observations."""
    folder = tmp_path_factory.mktemp("teacher")
    write_params(folder / "full", toys.params(ARCH))
    write_params(folder / "other", toys.params(ARCH, seed=1))
    assert main(["prune", "--checkpoint", str(folder / "full"), "--out", str(folder / "p"), "--keep", "0,1,3"]) == 0
    np.savez(folder / "data.npz", **toys.data(ARCH, 24).arrays)
    return folder


def words(inputs, out, *flags, checkpoint="p", teacher="full") -> list[str]:
    paths = ["--checkpoint", inputs / checkpoint, "--data", inputs / "data.npz", "--out", out, "--batch-size", "8"]
    taught_by = [] if teacher is None else ["--teacher", inputs / teacher]
    return [str(word) for word in ("finetune", *paths, *taught_by, *FAST, *flags)]


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "run"
    assert main(words(inputs, out, *TAUGHT, "--steps", "4")) == 0
    return out


def entries(run) -> list[dict]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [entry for entry in found if "loss" in entry]


# The run.


def test_both_parts_are_logged_and_recorded_and_the_teacher_is_not_saved(inputs, finished):
    for entry in entries(finished):
        parts = 0.75 * entry["task_loss"] + 0.25 * entry["teacher_loss"] + 0.5 * entry["states_loss"]
        assert entry["loss"] == pytest.approx(parts, rel=1e-5)
        assert min(entry["task_loss"], entry["teacher_loss"], entry["states_loss"]) > 0
    assert entries(finished)[-1]["teacher_loss"] < entries(finished)[0]["teacher_loss"]
    saved = flatten(read_params(read_spec(finished / "3")))
    assert {path: x.shape for path, x in saved.items()} == shapes_of(SHORT)
    step = json.loads((finished / "3" / "clp.json").read_text())["steps"][-1]
    assert step["teacher_fingerprint"] == fingerprint(read_spec(inputs / "full"))
    assert (step["config"]["teacher_weight"], step["config"]["teacher_states"]) == (0.25, 0.5)


def shapes_of(arch):
    return {path: leaf.shape for path, leaf in flatten(abstract_params(arch)).items()}


def test_a_taught_run_resumes_to_the_same_bits(inputs, finished, tmp_path):
    (tmp_path / "full").symlink_to(inputs / "full")  # another place, the same teacher
    for steps in ("2", "4"):
        argv = words(inputs, tmp_path / "run", *TAUGHT, "--steps", steps, "--resume", teacher=tmp_path / "full")
        assert main(argv) == 0
    assert [e["loss"] for e in entries(tmp_path / "run")] == [e["loss"] for e in entries(finished)]
    one, other = (flatten(read_params(read_spec(folder / "3"))) for folder in (tmp_path / "run", finished))
    for path, leaf in one.items():
        np.testing.assert_array_equal(leaf, other[path], err_msg=path)


@pytest.mark.parametrize(
    ("teacher", "weight", "complaint"),
    [
        ("other", "0.25", "teacher_fingerprint was"),
        ("full", "0.5", "teacher_weight was 0.25, is 0.5"),
        (None, None, "teacher_fingerprint was"),
    ],
)
def test_a_run_does_not_go_on_with_another_teacher(inputs, finished, capsys, teacher, weight, complaint):
    flags = (*HELD, "--steps", "5", "--resume")
    flags += () if weight is None else ("--teacher-weight", weight, "--teacher-states", "0.5")
    assert complaint in refusal(capsys, words(inputs, finished, *flags, teacher=teacher))


def refusal(capsys, argv: list[str]) -> str:
    assert main(argv) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("teacher", "flags", "complaint"),
    [
        (None, ("--teacher-weight", "0.5"), "--teacher-weight is for --teacher"),
        (None, ("--teacher-states", "0.5"), "--teacher-states is for --teacher"),
        ("full", ("--teacher-weight", "1.5"), "at least 0 and at most 1"),
        ("full", ("--teacher-weight", "nan"), "at least 0 and at most 1"),
        ("full", ("--teacher-states", "-1"), "give at least 0"),
        ("full", ("--teacher-weight", "0"), "no say"),
        ("nowhere", (), "nowhere"),
    ],
)
def test_bad_flags_are_one_line_and_leave_nothing(inputs, tmp_path, capsys, teacher, flags, complaint):
    argv = words(inputs, tmp_path / "run", "--steps", "2", *flags, teacher=teacher)
    assert complaint in refusal(capsys, argv)
    assert not (tmp_path / "run").exists()


def test_states_need_the_record_of_the_cut(inputs, tmp_path, capsys):
    write_params(tmp_path / "unrecorded", read_params(read_spec(inputs / "p")))
    argv = words(inputs, tmp_path / "run", *TAUGHT, "--steps", "2", checkpoint=tmp_path / "unrecorded")
    assert "has no clp.json that says it" in refusal(capsys, argv)


# What fits.


def test_the_blocks_are_found_through_both_records():
    def record(keep):
        return {"plan": PrunePlan.of("pi0", {"vlm": 4, "action": 4}, {"vlm": keep, "action": keep}).to_json()}

    def blocks(student, teacher):
        one, other = (ARCH.with_depths(dict.fromkeys(("vlm", "action"), len(keep))) for keep in (student, teacher))
        return dict(same_blocks(one, other, record(student), record(teacher)))

    assert blocks([0, 3], [0, 1, 2, 3]) == {"vlm": (0, 3), "action": (0, 3)}
    assert blocks([0, 3], [0, 2, 3]) == {"vlm": (0, 2), "action": (0, 2)}
    assert dict(same_blocks(ARCH, ARCH, None, None)) == {"vlm": (0, 1, 2, 3), "action": (0, 1, 2, 3)}
    with pytest.raises(InputError, match="no block 1 of the original's"):
        blocks([0, 1], [0, 2, 3])


@pytest.mark.parametrize(
    ("change", "states", "complaint"),
    [
        ({"kind": "pi05"}, 0.0, "--teacher is a π0.5, the checkpoint a π0"),
        ({"action_dim": 7}, 0.0, r"its actions is \(4, 7\), the checkpoint's \(4, 6\)"),
        ({"vocab_size": 24}, 0.0, "its vocabulary is 24, the checkpoint's 23"),
        ({"vlm": dataclasses.replace(toys.VLM, width=24)}, 0.0, None),
        ({"vlm": dataclasses.replace(toys.VLM, width=24)}, 1.0, r"its state of tower vlm is \(2, 17, 24\)"),
    ],
)
def test_the_teacher_must_answer_as_the_model_does(change, states, complaint):
    teaching = Teaching(architecture=dataclasses.replace(ARCH, **change), states=states)
    if complaint is None:
        check_teacher(SHORT, teaching, LENGTHS)
        return
    with pytest.raises(InputError, match=complaint):
        check_teacher(SHORT, teaching, LENGTHS)


LOW, HIGH = np.array([-2.0, -1.1]), np.array([2.0, 3.1])
STATS = NormStats(np.array([0.0, 1.0]), np.array([1.0, 2.0]), LOW, HIGH)


@pytest.fixture
def of_run(inputs):
    """Data of a run with statistics and conventions."""
    data = open_dataset(inputs / "data.npz", ARCH)
    used = Conventions(None, 4, 5, state_in_prompt=False, asset_id="here")
    return dataclasses.replace(data, norm_stats={"actions": STATS}, asset_id="here", conventions=used)


def trained(inputs, tmp_path, *, horizon=4, stats=STATS):
    """A teacher with a record of its training."""
    assets = tmp_path / "assets"
    norm_stats.save(assets / "there", {"actions": stats})
    norm_stats.save(assets / "elsewhere", {"actions": dataclasses.replace(STATS, mean=STATS.mean + 1)})
    write_params(tmp_path / "teacher", toys.params(ARCH), assets=assets)
    conventions = Conventions(None, horizon, 5, state_in_prompt=False, asset_id="there").to_json()
    step = {"command": "finetune", "conventions": conventions, "config": {}}
    plan = json.loads((inputs / "p" / "clp.json").read_text())["plan"]
    record = {"schema": 1, "kind": "pi0", "plan": plan, "steps": [step]}
    (tmp_path / "teacher" / "clp.json").write_text(json.dumps(record))
    return read_spec(tmp_path / "teacher")


def test_conventions_and_statistics_that_agree_need_no_word(inputs, tmp_path, of_run):
    stored = dataclasses.replace(STATS, q01=LOW.astype(np.float32).astype(np.float64))
    spec = trained(inputs, tmp_path, stats=stored)
    assert _check_conventions(spec, of_run) is None
    assert _check_statistics(spec, ARCH, of_run) is None


def test_other_conventions_and_statistics_are_refused(inputs, tmp_path, of_run):
    spec = trained(inputs, tmp_path, horizon=8, stats=dataclasses.replace(STATS, q99=HIGH + np.array([0, 0.1])))
    with pytest.raises(InputError, match=r"action_horizon is 8 by its clp.json, 4 in this run"):
        _check_conventions(spec, of_run)
    with pytest.raises(InputError, match=r"q99 of actions, dimension 1, is 3.2, 3.1 in this run"):
        _check_statistics(spec, ARCH, of_run)


def test_what_cannot_be_compared_is_said(inputs, of_run):
    spec = read_spec(inputs / "full")
    assert "nothing says" in str(_check_conventions(spec, of_run))
    assert "has none" in str(_check_statistics(spec, ARCH, of_run))


# The step.


TX = make_optimizer(OptimizerSettings())


def batch(observations=4):
    arrays = toys.data(ARCH, observations).arrays
    return {key: x for key, x in arrays.items() if key not in ("noise", "time", "episode_index")}


def counted(teaching, draws):
    """Operations of a step's matrix products."""
    settings = StepSettings(ema_decay=None, augment=False, action_samples=draws, teaching=teaching)
    step = jax.jit(functools.partial(train_step, SHORT, TX, settings))
    traced = step.trace(
        jax.random.key(0),
        make_state(toys.params(SHORT), TX),
        batch(),
        teacher=None if teaching is None else toys.params(ARCH),
    )
    return count_operations(traced.jaxpr, [False] * len(jax.tree.leaves(traced.jaxpr.in_avals))).flops


def test_a_teacher_costs_one_forward_pass_whose_prefix_serves_all_draws():
    added = counted(Teaching(architecture=ARCH), 8) - counted(None, 8)
    one = 4 * forward_flops(ARCH, LENGTHS, cameras=3, action_samples=8)
    assert added == pytest.approx(one, rel=0.05)
    flops = functools.partial(step_flops, SHORT, 1.0, LENGTHS, cameras=3, action_samples=8)
    assert 4 * (flops(teacher=ARCH) - flops()) == one


def test_the_teacher_is_split_like_the_model_and_kept_in_the_dtype_of_activations(monkeypatch):
    monkeypatch.setattr(sharding, "_MIN_SHARDED_BYTES", 0)
    teacher = dataclasses.replace(ARCH, dtype="bfloat16")
    settings, mesh = StepSettings(teaching=Teaching(architecture=teacher)), sharding.make_mesh(4)
    rules = ((".*/mlp/linear", None),)
    program = build_program(SHORT, OptimizerSettings(), settings, None, 0, mesh, rules)
    assert program.teacher is not None
    ours, theirs = flatten(program.abstract.params), flatten(program.teacher)
    assert ours.keys() == theirs.keys()
    for path, leaf in theirs.items():
        assert leaf.dtype == jnp.bfloat16
        assert leaf.sharding == ours[path].sharding, path
    assert not theirs["PaliGemma/llm/layers/mlp/gating_einsum"].sharding.is_fully_replicated
