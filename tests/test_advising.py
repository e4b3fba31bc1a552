"""`clp advise`: the candidates, which of them go on, which depth is advised, and small runs of all that."""

import dataclasses
import io
import json
import math

import family_cases as cases
import numpy as np
import pytest
import toys
from etils import epath
from pages import Page, assert_self_contained
from rich.console import Console

from clp_jax import cli
from clp_jax.advising import Candidate, Trial, candidates_of, halve, judge, trials
from clp_jax.advising.costs import Cost
from clp_jax.advising.halving import mean_loss
from clp_jax.checkpoint import write_params
from clp_jax.commands import advise, advise_record, advise_runs
from clp_jax.commands.advise_output import show
from clp_jax.errors import InputError
from clp_jax.outputs import check_own
from clp_jax.plan import PrunePlan

pytestmark = pytest.mark.slow

DEPTHS = {"vlm": 4, "action": 4}


def plan(keep):
    return PrunePlan.of("pi0", DEPTHS, {"vlm": keep, "action": keep}, coupled=(("vlm", "action"),))


WHOLE = PrunePlan.of("pi0", DEPTHS, coupled=(("vlm", "action"),))


def test_criteria_that_choose_the_same_blocks_are_one_candidate():
    chosen = {("3", "a"): [0, 1, 2], ("3", "b"): [0, 1, 2], ("2", "a"): [0, 1], ("2", "b"): [0, 3]}
    found = candidates_of(WHOLE, ["3", "2"], ["a", "b"], [1e-4, 2e-4], lambda *key: plan(chosen[key]))
    assert [one.name for one in found] == [
        *("full-0.0001", "full-0.0002", "3-a-0.0001", "3-a-0.0002"),
        *("2-a-0.0001", "2-a-0.0002", "2-b-0.0001", "2-b-0.0002"),
    ]
    assert found[2].criteria == ("a", "b") and found[0].criteria == ()


def test_a_depth_that_removes_nothing_is_the_whole_model():
    chosen = {"4": [0, 1, 2, 3], "3": [0, 1, 2]}
    found = candidates_of(WHOLE, ["4", "3"], ["a", "b"], [1e-4], lambda depth, _: plan(chosen[depth]))
    assert [one.name for one in found] == ["full-0.0001", "3-a-0.0001"]


def test_a_candidate_is_read_as_it_was_written():
    one = Candidate("3", plan([0, 1, 3]), ("a", "b"), 1e-4)
    assert Candidate.from_json(json.loads(json.dumps(one.to_json()))) == one


def candidate(depth, rate):
    return Candidate(depth, WHOLE, (), rate)


def test_the_better_half_of_each_depth_goes_on():
    candidates = [candidate(depth, rate) for depth in ("full", "9") for rate in (1.0, 2.0, 3.0)]
    asked = []

    def measure(one, rung):
        asked.append((one.depth, one.peak_lr, rung))
        # All of depth 9 are worse than all of the whole model, and still the best of them reaches the end.
        loss = one.peak_lr + (10 if one.depth == "9" else 0)
        return Trial(one.name, rung, 2**rung, (loss, math.nan if one.peak_lr == 3.0 else loss))

    found = list(halve(candidates, 3, measure, [1.0, 1.0]))
    assert [(trial.candidate, trial.rung) for trial in found] == [(f"{ask[0]}-{ask[1]:g}", ask[2]) for ask in asked]
    at = {rung: [ask[:2] for ask in asked if ask[2] == rung] for rung in range(3)}
    assert at[0] == [(depth, rate) for depth in ("full", "9") for rate in (1.0, 2.0, 3.0)]
    assert at[1] == [("full", 1.0), ("full", 2.0), ("9", 1.0), ("9", 2.0)]
    assert at[2] == [("full", 1.0), ("9", 1.0)]


def test_a_depth_that_has_one_candidate_left_is_trained_in_the_last_rung_alone():
    candidates = [candidate("full", 1.0), *(candidate("9", rate) for rate in (1.0, 2.0, 3.0))]
    found = halve(candidates, 4, diverging("9-3"), [1.0, 1.0])
    assert [(trial.candidate, trial.rung) for trial in found] == [
        *(("9-1", 0), ("9-2", 0), ("9-3", 0), ("9-1", 1), ("9-2", 1)),
        *(("full-1", 3), ("9-1", 3)),
    ]


def test_a_loss_that_is_no_number_is_never_the_best():
    assert mean_loss((1.0, math.nan), (1.0, 1.0)) == math.inf
    assert mean_loss((1.0, 4.0), (2.0, 1.0)) == 2.0


def diverging(*names):
    """Measures candidates, of which these diverge."""
    return lambda one, rung: Trial(one.name, rung, 2**rung, (math.nan if one.name in names else one.peak_lr,) * 2)


def test_who_diverges_does_not_go_on():
    candidates = [candidate(depth, rate) for depth in ("full", "9", "6") for rate in (1.0, 2.0)]
    found = list(halve(candidates, 2, diverging("full-1", "9-1", "9-2"), [1.0, 1.0]))
    assert [trial.candidate for trial in found if trial.rung == 1] == ["full-2", "6-1"]


def test_a_depth_that_diverges_is_not_judged():
    candidates = {depth: candidate(depth, 1.0) for depth in ("full", "9", "6")}
    losses = {"full": (1.0, 2.0), "9": (math.nan, 2.0), "6": (1.0, 2.0)}
    trials = [Trial(depth, 0, 1, each) for depth, each in losses.items()]
    verdict = judge(candidates, trials, [1.0] * 2, {"full": 3.0, "9": 1.0, "6": 2.0}, tolerance=0.02)
    assert [place.candidate.depth for place in verdict.places] == ["full", "6"]
    assert verdict.best is verdict.places[1] and verdict.best.chosen == 1.0
    json.dumps([place.to_json() for place in verdict.places], allow_nan=False)


def test_without_a_whole_model_that_trains_there_is_nothing_to_advise():
    candidates = [candidate("full", 1.0), candidate("9", 1.0)]
    with pytest.raises(InputError, match="the whole model diverged with every learning rate"):
        list(halve(candidates, 1, diverging("full-1"), [1.0, 1.0]))


@pytest.mark.parametrize(("worse", "advised"), [(0.01, "6"), (0.05, "9"), (0.5, "9")])
def test_the_fastest_depth_within_the_tolerance_is_advised(worse, advised):
    rng = np.random.default_rng(0)
    full = 0.2 + 0.02 * rng.standard_normal(40)
    losses = {"full": full, "9": full * 1.005, "6": full * (1 + worse)}
    candidates = {depth: candidate(depth, 1.0) for depth in losses}
    trials = [Trial(depth, 2, 10, tuple(each)) for depth, each in losses.items()]
    verdict = judge(candidates, trials, [1.0] * 40, {"full": 3.0, "9": 2.0, "6": 1.0}, tolerance=0.02)
    assert verdict.best.candidate.depth == advised
    ratios = {place.candidate.depth: place.ratio for place in verdict.places}
    assert ratios == pytest.approx({"full": 1.0, "9": 1.005, "6": 1 + worse})
    # Every episode says the same, so there is no doubt: the interval is a point.
    assert verdict.best.chosen == 1.0 and np.ptp(verdict.places[2].interval) < 1e-9


def test_doubt_shows_in_the_interval_and_in_how_often_a_depth_is_advised():
    rng = np.random.default_rng(0)
    full = 0.2 + 0.05 * rng.standard_normal(10)
    noisy = full + 0.05 * rng.standard_normal(10)
    noisy += 1.02 * full.mean() - noisy.mean()  # just at the tolerance
    candidates = {depth: candidate(depth, 1.0) for depth in ("full", "9")}
    trials = [Trial("full", 0, 1, tuple(full)), Trial("9", 0, 1, tuple(noisy))]
    verdict = judge(candidates, trials, [1.0] * 10, {"full": 2.0, "9": 1.0}, tolerance=0.021)
    place = verdict.places[1]
    assert verdict.best is place and 0.3 < place.chosen < 0.7
    assert place.interval[0] < 0.95 and place.interval[1] > 1.05


def test_nothing_of_a_long_depth_is_cut_off_in_a_narrow_console():
    long = Candidate("llm=12+vl=3+dit=12", WHOLE, ("gauss-newton",), 1e-4)
    trials = [Trial(depth, 0, 1, (1.0, 1.0)) for depth in ("full", long.depth)]
    candidates = {"full": candidate("full", 1e-4), long.depth: long}
    verdict = judge(candidates, trials, [1.0] * 2, {"full": 2.0, long.depth: 1.0}, tolerance=0.02)
    costs = dict.fromkeys(candidates, Cost(1.0, 1.0, 1, 1))
    console = Console(width=80, record=True, file=io.StringIO())
    show(console, verdict, costs, "CKPT", "advice", 0.02)
    text = console.export_text()
    assert "\u2026" not in text
    assert "gauss" in text and "dit=12" in text


@pytest.fixture(scope="module")
def unscheduled(tmp_path_factory):
    """Flags of a small run: a toy of four blocks and 24 observations of six episodes."""
    folder = tmp_path_factory.mktemp("advise")
    arch = toys.architecture()
    write_params(folder / "full", toys.params(arch))
    np.savez(folder / "data.npz", **toys.data(arch, 24).arrays | {"episode_index": np.repeat(np.arange(6), 4)})
    return [
        *("advise", "--checkpoint", str(folder / "full"), "--data", str(folder / "data.npz"), "--keep-layers", "2"),
        *("--criteria", "first", "--learning-rates", "1e-3", "--steps", "2", "--rungs", "2", "--batch-size", "8"),
        *("--ema-decay", "None", "--holdout-ratio", "0.5", "--evaluate-observations", "12"),
    ]


@pytest.fixture(scope="module")
def words(unscheduled):
    """The same with fixed steps of the schedule, so that costs and trials run the same programs."""
    return [*unscheduled, "--warmup-steps", "1", "--decay-steps", "10", "--decay-lr", "1e-4", "--tolerance", "0.004"]


def test_a_small_run_and_its_resumption(words, tmp_path, capsys, monkeypatch):
    out = tmp_path / "advice"
    assert cli.main([*words, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert (
        "Measuring a training step" in said
        and "the fastest within 0.4% of" in said
        and f"Report: {out}/report.html" in said
    )
    assert {path.name for path in out.iterdir()} == {
        *("advise.json", "trials.jsonl", "advice.json", "advice.png", "report.html", "plan.json", "clp-manifest.json")
    }
    found = json.loads((out / "advice.json").read_text())
    assert [place["depth"] for place in found["depths"]] == ["full", "2"]
    full, cut = found["depths"]
    assert cut["parameters"] < full["parameters"] and cut["state_bytes"] < full["state_bytes"]
    assert cut["steps"] == max(round(2 * full["step_seconds"] / cut["step_seconds"]), 1) and full["steps"] == 2
    lines = (out / "trials.jsonl").read_text().splitlines()
    assert [json.loads(line)["rung"] for line in lines] == [1, 1]  # two depths of one candidate, which waits
    page = (out / "report.html").read_text(encoding="utf-8")
    assert_self_contained(page)
    assert [cells[0] for _, cells in Page(page).tables["readings"]] == ["full", "2"]
    assert f"<h1>Advised depth: {found['advised']['depth']}</h1>" in page and "within 0.4% of" in page

    # As if killed while a file was written: --overwrite, which would begin anew, knows it as its own.
    for name in ("advise.json", "advice.json", "plan.json"):
        (out / f"{name}.partial").write_text("{")
    check_own(epath.Path(out), "clp advise", names=advise._NAMES)
    # As if killed while the last trial was written down: that trial runs again, with the same result.
    (out / "advice.json").unlink()
    (out / "trials.jsonl").write_text(lines[0] + "\n" + lines[1][:20])
    assert cli.main([*words, "--out", str(out)]) == 2
    assert "--resume" in capsys.readouterr().err
    assert cli.main([*words, "--out", str(out), "--resume", "--steps", "3"]) == 2
    assert "steps was 2, is 3" in capsys.readouterr().err
    # What was tried is judged: an analysis on another machine might choose other blocks under the same names.
    monkeypatch.setattr(advise, "measure", None)
    assert cli.main([*words, "--out", str(out), "--resume", "--json"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out) == found and "Measuring" not in told.err
    assert (out / "trials.jsonl").read_text().splitlines() == lines
    assert json.loads((out / "advice.json").read_text()) == found


ALONE = ("--keep-layers", "4", "--learning-rates", "1e-3", "3e-3", "--steps", "8")
"""The whole model alone, with two rates, so that the first of two rungs, of four steps, decides."""


def trials_in(out):
    lines = map(json.loads, (out / "trials.jsonl").read_text().splitlines())
    return {(trial["candidate"], trial["rung"]): (trial["steps"], trial["losses"]) for trial in lines}


def measure_no_costs(patch):
    """What a step takes is not measured: the whole model's steps do not depend on it."""
    patch.setattr(advise, "measure_costs", lambda models, *_: dict.fromkeys(models, Cost(1.0, 1.0, 1, 1)))


@pytest.fixture
def no_costs(monkeypatch):
    measure_no_costs(monkeypatch)


@pytest.fixture(scope="module")
def two_rungs(unscheduled, tmp_path_factory):
    """What ``ALONE`` comes to where nothing ends it."""
    out = tmp_path_factory.mktemp("two") / "advice"
    with pytest.MonkeyPatch.context() as patch:
        measure_no_costs(patch)
        assert cli.main([*unscheduled, *ALONE, "--out", str(out)]) == 0
    return out


@pytest.mark.usefixtures("no_costs")
def test_a_rung_is_a_run_of_its_own(unscheduled, two_rungs, tmp_path):
    """Its trial is that of a command that has this rung alone: no state and no schedule of another."""
    flags, found = [*unscheduled, *ALONE], trials_in(two_rungs)
    ((best, _),) = (key for key in found if key[1] == 1)
    for rung, steps in enumerate((4, 8)):
        out = tmp_path / str(steps)
        rate = best.removeprefix("full-")
        one = [*flags, "--rungs", "1", "--steps", str(steps), "--learning-rates", rate, "--out", str(out)]
        assert cli.main(one) == 0
        assert trials_in(out) == {(best, 0): found[best, rung]} and found[best, rung][0] == steps


@pytest.mark.parametrize("flag", [{}, {"warmup_steps": 3, "decay_steps": 50, "decay_lr": 1e-5}])
def test_the_schedule_is_of_a_runs_own_length_unless_flags_name_it(flag):
    for steps in (20, 40):
        config = dataclasses.replace(asked(), **flag)
        optimizer = advise_runs.run_of(config, 1e-3, cases.architecture("pi0"), steps).optimizer
        own = {"warmup_steps": steps // 10, "decay_steps": steps, "decay_lr": 1e-4}
        assert {name: getattr(optimizer, name) for name in own} == own | flag


def test_trials_have_no_average_unless_it_is_asked_for():
    arch = cases.architecture("pi0")
    for given, trial, cost in (({}, None, 0.99), ({"ema_decay": 0.9}, 0.9, 0.9), ({"ema_decay": None}, None, None)):
        config = dataclasses.replace(asked(), **given)
        assert advise_runs.trial_of(config, 1e-3, arch, 20).step.ema_decay == trial
        assert advise_runs.run_of(config, 1e-3, arch, 20).step.ema_decay == cost


@pytest.mark.usefixtures("no_costs")
def test_a_killed_command_goes_on_inside_a_rung_and_trains_no_other_again(
    unscheduled, two_rungs, tmp_path, monkeypatch
):
    flags = [*unscheduled, *ALONE, "--out"]
    out, runs = tmp_path / "killed", []

    def stopped(spec, architecture, data, run, saved, **others):
        """Training that a signal ends before the last step of the second run."""
        runs.append(sorted(path.name for path in (out / "runs").iterdir()))
        steps = run.steps - (len(runs) == 2)
        return train(spec, architecture, data, dataclasses.replace(run, steps=steps), saved, **others)

    train = trials.train
    monkeypatch.setattr(trials, "train", stopped)
    assert cli.main([*flags, str(out)]) == 0
    # Nothing is left of a rung that was measured.
    assert runs == [["full-0.001-rung-1"], ["full-0.003-rung-1"]]
    assert list(trials_in(out)) == [("full-0.001", 0)] and not (out / "advice.json").exists()
    assert cli.main([*flags, str(out), "--resume"]) == 0
    assert runs[1] == runs[2] and len(runs) == 4
    assert trials_in(out) == trials_in(two_rungs)


def test_a_learning_rate_that_diverges_ends_its_candidate_alone(words, tmp_path, capsys):
    flags = [*words, "--rungs", "1", "--learning-rates", "1e30", "1e-3", "--out", str(tmp_path / "advice")]
    assert cli.main(flags) == 0
    said = capsys.readouterr().out
    assert [line.split()[4] for line in said.splitlines() if line.endswith("diverged")] == [
        "full-1e+30",
        "2-first-1e+30",
    ]
    trials = (tmp_path / "advice" / "trials.jsonl").read_text()
    assert "NaN" not in trials and "[null, null, null]" in trials
    found = json.loads((tmp_path / "advice" / "advice.json").read_text())
    assert [place["peak_lr"] for place in found["depths"]] == [1e-3, 1e-3]
    assert cli.main([*flags, "--resume", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found
    assert (tmp_path / "advice" / "trials.jsonl").read_text() == trials


@pytest.mark.parametrize(
    ("kind", "depths"),
    [
        ("pi0", ["3", "2", "1"]),
        ("pi0_fast", ["3", "2", "1"]),
        ("smolvla", ["2"]),
        ("gr00t_n1_5", ["llm=3+vl=3+dit=2", "llm=2+vl=2+dit=2", "llm=1+vl=1+dit=2"]),
    ],
)
def test_depths_that_nobody_names_are_shares_of_the_blocks_that_may_go(kind, depths):
    assert list(advise._depths(asked(), cases.architecture(kind))) == depths


def test_a_depth_that_is_written_twice_is_tried_once():
    assert list(advise._depths(asked("4", "2", "04"), cases.architecture("pi0"))) == ["4", "2"]
    arch = cases.architecture("gr00t_n1_5")
    assert list(advise._depths(asked("llm=2+vl=2+dit=2", "dit=2+llm=2+vl=2"), arch)) == ["llm=2+vl=2+dit=2"]


def test_a_rule_of_what_does_not_decay_matches_something(words, tmp_path, capsys):
    assert cli.main([*words, "--out", str(tmp_path / "out"), "--not-decayed", "norm"]) == 2
    assert "--not-decayed 'norm' matches the name of no parameter" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--criteria", "healed", "jumps"), "healed is for models that are not fine-tuned"),
        (("--rungs", "3"), "--rungs 3 leave no step of --steps 2 for the first"),
        (("--warmup-steps", "2", "--decay-steps", "4"), "are more than the first rung's 1 steps"),
        (("--rungs", "1", "--warmup-steps", "2", "--decay-steps", "1"), "is reached before the warm-up"),
        (("--learning-rates", "1e-3", "1.0000001e-3"), "two that differ by less than a millionth"),
        (("--vision",), "--vision: no block of the image encoder goes"),
    ],
)
def test_what_no_rung_could_do_is_refused(unscheduled, tmp_path, capsys, flags, said):
    assert cli.main([*unscheduled, *flags, "--out", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_towers_that_cannot_be_joined_so_are_refused_and_leave_nothing(words, tmp_path, capsys):
    assert cli.main([*words, "--out", str(tmp_path / "out"), "--couple", "nosuch"]) == 2
    assert "--couple: cannot combine towers by 'nosuch'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def asked(*depths):
    return advise.Advise(checkpoint="full", data=("data.npz",), out="out", steps=2, keep_layers=depths)


def test_trials_of_a_version_that_trained_otherwise_are_not_gone_on_with(words, tmp_path, capsys):
    """That version's settings have no number, and its rungs went on from each other's state."""
    (tmp_path / "advise.json").write_text(json.dumps({"config": {}, "costs": {}}))
    assert cli.main([*words, "--out", str(tmp_path), "--resume"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "advise.json was begun by another version of clp advise" in said
    assert said.endswith("begin in another --out.\n")


@pytest.mark.parametrize("content", [{}, {"config": []}, {"config": {}, "costs": {"full": 1}}])
def test_damaged_settings_of_a_command_that_is_resumed_are_one_line(words, content, tmp_path, capsys):
    (tmp_path / "advise.json").write_text(json.dumps(content | {"schema": 2}))
    assert cli.main([*words, "--out", str(tmp_path), "--resume"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(InputError, match=r"advise.json cannot be read: .*; begin in another --out"):
        advise_record.known_costs(tmp_path)


@pytest.mark.parametrize("line", [b'{"candidate": "full-0.', b'{"candidate": "full-0.001"}'])
def test_a_damaged_trial_says_that_it_will_run_again_without_its_line(line):
    with pytest.raises(InputError, match=r"^trials, line 2 .*; remove the line, and the trial will run again$"):
        advise_record.read_trial(line, "trials, line 2")


def test_the_help_tells_which_observations_choose_blocks(capsys):
    assert cli.main(["advise", "--help"]) == 0
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "by which blocks are chosen, none of them held out; 256 if absent" in said
    assert "held-out ones included" not in said


def test_flags_that_do_not_fit_are_refused_before_anything_is_read(words, tmp_path, capsys, monkeypatch):
    flags = [*words, "--out", str(tmp_path / "out")]
    assert cli.main([*flags, "--keep-layers", "5"]) == 2
    assert "5" in capsys.readouterr().err
    assert cli.main([*flags, "--peak-lr", "1e-3"]) == 2
    assert "--learning-rates" in capsys.readouterr().err
    assert cli.main([*flags, "--holdout-ratio", "0.1"]) == 2
    assert "--holdout-ratio" in capsys.readouterr().err
    assert cli.main([*flags, "--evaluate-observations", "1"]) == 2
    assert "1 held-out episodes are measured" in (said := capsys.readouterr().err) and "--evaluate-observations" in said
    assert cli.main([*flags, "--criteria"]) == 2
    assert "--criteria" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert cli.main([*flags, "--out", "gs://bucket/advice"]) == 2
    assert "--out gs://bucket/advice is an address" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
