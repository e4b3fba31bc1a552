"""The commands through their real main, on a toy checkpoint: outputs, refusals, and what is left behind."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
import toys

from clp_jax.analysis import Analysis
from clp_jax.checkpoint import read_params, read_spec, write_params
from clp_jax.cli import main
from clp_jax.commands import analyse as analyse_command
from clp_jax.commands import measuring
from clp_jax.errors import InputError
from clp_jax.loading import read_architecture
from clp_jax.models import Shape, Tower
from clp_jax.plan import PrunePlan
from clp_jax.trees import flatten

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A toy π0 checkpoint with assets, a data file, and one analysis of them (the slow part, shared)."""
    folder, arch = tmp_path_factory.mktemp("inputs"), toys.architecture()
    (folder / "stats" / "robot").mkdir(parents=True)
    (folder / "stats" / "robot" / "norm_stats.json").write_text("{}")
    write_params(folder / "full", toys.params(arch), assets=folder / "stats")
    np.savez(folder / "data.npz", **toys.data(arch, 16).arrays)
    words = ["analyse", "--checkpoint", str(folder / "full"), "--data", str(folder / "data.npz"), "--keep-layers", "2"]
    assert main([*words, "--out", str(folder / "analysis")]) == 0
    return folder


def prune(inputs, out, *flags):
    return main(["prune", "--checkpoint", str(inputs / "full"), "--out", str(out), *map(str, flags)])


def test_analysis_folder_holds_everything(inputs):
    found = {path.name for path in (inputs / "analysis").iterdir()}
    assert {"similarity.npz", "plan.json", "findings.json", "config.json", "report.html"} <= found
    assert {"cka_vlm.png", "cka_action.png"} <= found
    findings = json.loads((inputs / "analysis" / "findings.json").read_text())
    assert {c["criterion"] for c in findings["choices"]} >= {"clp", "jumps", "gateprobe", "first"}
    assert all(np.isfinite(c["loss"]) for c in findings["choices"])
    assert "held-out" in findings["loss_data"]


def test_analysis_is_read_back_as_it_was(inputs):
    analysis = Analysis.load(inputs / "analysis" / "similarity.npz")
    again = inputs / "again.npz"
    analysis.save(again)
    first, second = np.load(inputs / "analysis" / "similarity.npz"), np.load(again)
    assert first.files == second.files
    for key in first.files:
        np.testing.assert_array_equal(first[key], second[key])


def test_keep_writes_exactly_those_slices_and_carries_assets(inputs, tmp_path):
    assert prune(inputs, tmp_path / "p", "--keep", "0,3") == 0
    full, small = (flatten(read_params(read_spec(f))) for f in (inputs / "full", tmp_path / "p"))
    for path, leaf in full.items():
        wanted = leaf[[0, 3]] if path.startswith("PaliGemma/llm/layers/") else leaf
        np.testing.assert_array_equal(small[path], wanted, err_msg=path)
    assert (tmp_path / "p" / "assets" / "robot" / "norm_stats.json").read_text() == "{}"
    record = json.loads((tmp_path / "p" / "clp.json").read_text())
    assert record["plan"]["towers"]["action"] == {"depth": 4, "keep": [0, 3]}
    assert record["steps"][0]["config"]["keep"] == "0,3"
    assert record["versions"]["jax"] == jax.__version__


def test_edited_plan_is_followed(inputs, tmp_path):
    plan = json.loads((inputs / "analysis" / "plan.json").read_text())
    for tower in ("vlm", "action"):
        plan["towers"][tower]["keep"] = [1, 2]
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    assert prune(inputs, tmp_path / "p", "--plan", tmp_path / "plan.json") == 0
    assert PrunePlan.from_json(read_spec(tmp_path / "p").plan_record["plan"]).removed("vlm") == (0, 3)


@pytest.mark.slow
def test_cuts_are_compared_by_what_healing_leaves(inputs, tmp_path, capsys):
    data = ["--data", str(inputs / "data.npz"), "--keep-layers", "2", "--heal", "--criterion", "healed"]
    words = ["analyse", "--checkpoint", str(inputs / "full"), *data, "--compare", "first", "random"]
    assert main([*words, "--out", str(tmp_path / "a")]) == 0
    assert "loss, healed" in capsys.readouterr().out
    findings = json.loads((tmp_path / "a" / "findings.json").read_text())
    healed = {choice["criterion"]: choice["healed_loss"] for choice in findings["choices"]}
    assert list(healed) == ["healed", "first", "random"]
    assert healed["healed"] == min(healed.values())
    assert any("held-out observations alone" in warning for warning in findings["warnings"])
    plan = json.loads((tmp_path / "a" / "plan.json").read_text())
    tried = plan["scores"]["vlm+action"]["tried"]
    assert tried[0]["loss"] == healed["healed"] and tried[0]["removed"] == plan["scores"]["vlm+action"]["removed"]
    assert healed["first"] == next(cut["loss"] for cut in tried if cut["removed"] == [2, 3])
    stay = plan["towers"]["action"]["keep"]
    assert {one["block"] for one in findings["healing"] if one["tower"] == "action"} <= set(stay)
    page = (tmp_path / "a" / "report.html").read_text()
    assert "What healing would leave" in page and "cuts that were healed, best first" in page
    assert page.count("<tr") > len(findings["healing"]) + len(tried)
    assert any("gateprobe" in cut["by"] for cut in tried), "who proposes does not depend on what is compared"
    assert prune(inputs, tmp_path / "p", *data) == 0
    assert PrunePlan.from_json(read_spec(tmp_path / "p").plan_record["plan"]).towers["action"].keep == tuple(stay)


def test_the_criterion_healed_is_refused_without_healing(inputs, tmp_path, capsys):
    words = ["analyse", "--checkpoint", str(inputs / "full"), "--data", str(inputs / "data.npz")]
    for flags in (("--criterion", "healed"), ("--compare", "healed")):
        assert main([*words, "--out", str(tmp_path / "a"), *flags]) == 2
        assert "give --heal, too" in capsys.readouterr().err


def test_json_is_all_of_standard_output(inputs, tmp_path, capsys):
    words = ["--checkpoint", str(inputs / "full"), "--json", "--out"]
    measured = ["--data", str(inputs / "data.npz"), "--keep-layers", "2", "--compare", "clp"]
    assert main(["analyse", *words, str(tmp_path / "a"), *measured]) == 0
    findings = json.loads(capsys.readouterr().out)
    assert findings == json.loads((tmp_path / "a" / "findings.json").read_text())
    assert main(["prune", *words, str(tmp_path / "p"), "--analysis", str(tmp_path / "a")]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["removed"]["vlm"] == findings["choices"][0]["removed"]["vlm"]
    assert told["report"] == str(tmp_path / "a" / "report.html")
    assert told["parameters"]["after"] < told["parameters"]["before"]


@pytest.mark.parametrize("flags", [("--plan", "plan.json"), ("--analysis", "")])
def test_the_page_behind_a_plan_is_told_recorded_and_missed(inputs, tmp_path, capsys, flags):
    folder = tmp_path / "analysis"
    shutil.copytree(inputs / "analysis", folder)
    assert prune(inputs, tmp_path / "p", flags[0], folder / flags[1]) == 0
    assert f"Report behind the choice: {folder / 'report.html'}" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "p"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["reports"] == {str(folder / "report.html"): True}
    folder.rename(tmp_path / "elsewhere")
    assert main(["inspect", str(tmp_path / "p")]) == 0
    assert "not found, it was at" in capsys.readouterr().out
    assert prune(inputs, tmp_path / "q", "--keep", "0,1") == 0
    assert "Report" not in capsys.readouterr().out


def test_analysis_gives_other_depths_and_criteria_without_a_forward_pass(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr("clp_jax.commands.prune.load", lambda *_: pytest.fail("the model was loaded"))
    flags = ("--analysis", inputs / "analysis", "--keep-layers", 3, "--criterion", "jumps")
    assert prune(inputs, tmp_path / "p", *flags) == 0
    record = read_spec(tmp_path / "p").plan_record
    assert record["plan"]["criterion"] == "jumps"
    assert len(record["plan"]["towers"]["vlm"]["keep"]) == 3
    assert record["steps"][0]["calibration"]["observations"] == 12


def test_the_paper_chooses_unless_the_depth_is_found_too():
    def rule(**flags):
        return analyse_command.DepthFlags(**flags).rule()

    assert rule(keep_layers=("2",)) == rule(keep_ratio=("0.5",)) == rule(threshold=0.9) == "clp"
    assert rule(auto=True) == rule() == "jumps"
    assert rule(auto=True, criterion="clp") == "clp"


def test_prune_from_data_equals_prune_from_its_analysis(inputs, tmp_path, capsys):
    assert prune(inputs, tmp_path / "p", "--data", inputs / "data.npz", "--keep-layers", 2) == 0
    assert "zero-shot loss on 4 held-out observations" in capsys.readouterr().out
    plan = PrunePlan.load(inputs / "analysis" / "plan.json")
    assert PrunePlan.from_json(read_spec(tmp_path / "p").plan_record["plan"]).towers == plan.towers


def test_pruning_a_pruned_checkpoint_composes(inputs, tmp_path):
    assert prune(inputs, tmp_path / "p", "--keep", "0,1,3") == 0
    words = ["prune", "--checkpoint", str(tmp_path / "p"), "--out", str(tmp_path / "q"), "--keep", "1,2"]
    assert main(words) == 0
    assert read_spec(tmp_path / "q").plan_record["plan"]["towers"]["vlm"]["keep"] == [1, 3]


REFUSED = {
    "give exactly one of --data, --analysis, --plan and --keep": (),
    "keep names block 4, but the blocks are numbered 0 to 3": ("--keep", "0,4"),
    "keep names block 1 after block 2": ("--keep", "2,1"),
    "is no list of block numbers": ("--keep", "first"),
    "already says which blocks stay": ("--keep", "0", "--keep-layers", "1"),
    "--keep already says which blocks stay; leave out": ("--keep", "0", "--keep-vision-layers", "1"),
    "leave out the depth and the criterion": ("--keep", "0", "--criterion", "first"),
    "--states and --estimator: --keep already says": ("--keep", "0", "--states", "rms", "--estimator", "debiased"),
    "--couple: --plan already says which blocks stay": ("--plan", "PLAN", "--couple", "min"),
    "--states: the plan of --analysis holds as it is": ("--analysis", "ANALYSIS", "--states", "rms"),
    "--max-observations, --holdout-ratio and --seed: --plan already says which blocks stay; leave them out": (
        *("--plan", "PLAN", "--max-observations", "9", "--seed", "3", "--holdout-ratio", "0.5"),
    ),
    "--action-horizon, --robot, --group-size, --groups-per-batch and --dtype: --keep already says": (
        *("--keep", "0", "--robot", "libero", "--action-horizon", "9", "--dtype", "float32"),
        *("--group-size", "3", "--groups-per-batch", "2"),
    ),
    "--samples: --keep already says": (
        *("--keep", "0", "--heal", "--data", "DATA", "--samples", "observations", "--holdout-ratio", "0.5"),
    ),
    "--group-size and --seed: --analysis was measured already; give them to clp analyse, or leave them out": (
        *("--analysis", "ANALYSIS", "--auto", "--group-size", "3", "--seed", "1"),
    ),
    "--holdout-ratio: --analysis was measured already": ("--analysis", "ANALYSIS", "--holdout-ratio", "0.5"),
    "--weights: --analysis was measured already": (
        *("--analysis", "ANALYSIS", "--keep-layers", "2", "--criterion", "random", "--seed", "1", "--weights", "1"),
    ),
    "--samples: --analysis was measured already": ("--analysis", "ANALYSIS", "--auto", "--samples", "observations"),
    "say how deep: --keep-layers": ("--analysis", "ANALYSIS", "--keep-vision-layers", "1"),
    "say how deep": ("--data", "DATA"),
    "cannot keep 5 of 4 blocks": ("--data", "DATA", "--keep-layers", "5"),
    "there is no criterion 'best'": ("--analysis", "ANALYSIS", "--keep-layers", "2", "--criterion", "best"),
    "gauss-newton": ("--analysis", "ANALYSIS", "--keep-layers", "2", "--criterion", "gauss-newton"),
    "'greedy' needs loss": ("--analysis", "ANALYSIS", "--keep-layers", "2", "--criterion", "greedy"),
    "'healed' compares cuts by what healing leaves of them: give --heal": (
        *("--data", "DATA", "--keep-layers", "2", "--criterion", "healed"),
    ),
    "--criterion chooses anew": ("--analysis", "ANALYSIS", "--criterion", "jumps"),
    "there is no data file": ("--data", "nowhere.npz", "--keep-layers", "2"),
    "--couple: cannot combine towers by 'nosuch'": (
        "--analysis",
        "ANALYSIS",
        "--keep-layers",
        "2",
        "--couple",
        "nosuch",
    ),
    "needs a measured image encoder": ("--analysis", "ANALYSIS", "--keep-layers", "2", "--keep-vision-layers", "1"),
    "give the folder that clp analyse wrote": (
        "--analysis",
        "nowhere",
        "--keep-layers",
        "2",
    ),
}


@pytest.mark.parametrize(
    ("out", "flags", "said"),
    [
        ("there", (), "exists already; choose another output folder or pass --overwrite"),
        ("there", ("--overwrite",), "only what clp prune wrote is replaced"),
        ("full", ("--overwrite",), "overlaps with the input"),
    ],
)
def test_an_output_that_cannot_be_is_said_before_the_analysis(inputs, tmp_path, capsys, monkeypatch, out, flags, said):
    monkeypatch.setattr("clp_jax.commands.prune.load", None)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine").touch()
    folder = inputs / "full" if out == "full" else tmp_path / out
    assert prune(inputs, folder, "--data", inputs / "data.npz", "--keep-layers", "2", "--heal", *flags) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("message", REFUSED)
def test_refusals_are_one_line_exit_2_and_no_folder(inputs, tmp_path, capsys, message):
    places = {"DATA": inputs / "data.npz", "ANALYSIS": inputs / "analysis", "PLAN": inputs / "analysis" / "plan.json"}
    assert prune(inputs, tmp_path / "p", *(places.get(flag, flag) for flag in REFUSED[message])) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert list(tmp_path.iterdir()) == []


def test_plan_of_another_kind_or_uncoupled_is_refused(inputs, tmp_path, capsys):
    for towers, kind, message in (
        ({"vlm": [0], "action": [0]}, "pi05", "plan is for a pi05 model"),
        ({"vlm": [0, 1], "action": [0, 2]}, "pi0", "share one stack"),
    ):
        plan = PrunePlan.of(kind, {"vlm": 4, "action": 4}, towers)
        plan.save(tmp_path / "plan.json")
        assert prune(inputs, tmp_path / "p", "--plan", tmp_path / "plan.json") == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "p").exists()


def test_analysis_of_another_checkpoint_is_refused(inputs, tmp_path, capsys):
    write_params(tmp_path / "other", toys.params(toys.architecture(), seed=1))
    words = ["prune", "--checkpoint", str(tmp_path / "other"), "--analysis", str(inputs / "analysis")]
    assert main([*words, "--out", str(tmp_path / "p")]) == 2
    assert "whose content differs" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["analyse", "prune"])
def test_nan_weights_are_refused_by_name(inputs, tmp_path, capsys, command):
    params = jax.tree.map(np.copy, toys.params(toys.architecture()))
    params["PaliGemma"]["llm"]["layers"]["mlp"]["linear"][0, 0, 0] = np.nan
    write_params(tmp_path / "nan", params, allow_nonfinite=True)
    words = [command, "--checkpoint", str(tmp_path / "nan"), "--out", str(tmp_path / "p")]
    more = ["--keep", "0"] if command == "prune" else ["--data", str(inputs / "data.npz"), "--keep-layers", "2"]
    assert main([*words, *more]) == 2
    assert "PaliGemma/llm/layers/mlp/linear" in capsys.readouterr().err.replace(".", "/")
    assert not (tmp_path / "p").exists()


def test_existing_output_is_kept_without_overwrite(inputs, tmp_path, capsys):
    assert prune(inputs, tmp_path / "p", "--keep", "0,3") == 0
    assert prune(inputs, tmp_path / "p", "--keep", "0") == 2
    assert "exists" in capsys.readouterr().err
    assert len(read_spec(tmp_path / "p").plan_record["plan"]["towers"]["vlm"]["keep"]) == 2
    assert prune(inputs, tmp_path / "p", "--keep", "0", "--overwrite") == 0


def test_foreign_tree_lists_what_differs(inputs, tmp_path, capsys):
    params = toys.params(toys.architecture())
    params["value_head"] = {"kernel": np.zeros((2, 2), np.float32)}
    write_params(tmp_path / "foreign", params)
    assert main(["prune", "--checkpoint", str(tmp_path / "foreign"), "--keep", "0", "--out", str(tmp_path / "p")]) == 2
    assert "value_head/kernel: expected nothing" in capsys.readouterr().err


def test_unknown_criterion_to_compare_is_refused_before_the_model_is_read(inputs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(analyse_command, "load", lambda *_: pytest.fail("the model was loaded"))
    words = ["analyse", "--checkpoint", str(inputs / "full"), "--data", str(inputs / "data.npz")]
    assert main([*words, "--out", str(tmp_path / "a"), "--compare", "best"]) == 2
    assert "--compare best is no criterion" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["analyse", "prune"])
def test_towers_are_joined_in_a_way_that_there_is_before_the_data_are_read(
    inputs, tmp_path, capsys, monkeypatch, command
):
    monkeypatch.setattr(measuring, "open_data", lambda *_, **__: pytest.fail("the data were opened"))
    words = [command, "--checkpoint", str(inputs / "full"), "--data", str(inputs / "data.npz"), "--keep-layers", "2"]
    assert main([*words, "--out", str(tmp_path / "a"), "--couple", "nosuch"]) == 2
    said = capsys.readouterr().err
    assert said.endswith("--couple: cannot combine towers by 'nosuch'; give 'mean', 'min' or one of vlm, action.\n")
    assert said.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "flags", "said"),
    [
        ("analyse", ("--keep-vision-layers", "1"), "needs a measured image encoder: give --vision, too."),
        ("prune", ("--keep-vision-layers", "1"), "needs a measured image encoder: give --vision, too."),
        ("prune", ("--vision",), "--vision: no block of the image encoder goes"),
    ],
)
def test_the_image_encoder_is_measured_where_it_is_cut_and_only_there(
    inputs, tmp_path, capsys, monkeypatch, command, flags, said
):
    monkeypatch.setattr(measuring, "open_data", lambda *_, **__: pytest.fail("the data were opened"))
    words = [command, "--checkpoint", str(inputs / "full"), "--data", str(inputs / "data.npz"), "--keep-layers", "2"]
    assert main([*words, *flags, "--out", str(tmp_path / "a")]) == 2
    assert said in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_towers_that_are_cut_on_their_own_are_not_joined():
    alone = Shape("pi0", (Tower("vlm", 4), Tower("action", 2)), (("vlm",), ("action",)))
    measuring.check_couple(measuring.MeasureFlags(), alone)
    with pytest.raises(InputError, match="--couple: no towers of a pi0 model must keep the same blocks"):
        measuring.check_couple(measuring.MeasureFlags(couple="min"), alone)


@pytest.mark.parametrize("name", ["a[/bold]b", "run[1]", "[red]"])
def test_brackets_in_a_users_name_are_text(inputs, tmp_path, capsys, name):
    words = ["prune", "--checkpoint", str(inputs / "full"), "--keep", "0,1", "--out", str(tmp_path / name)]
    assert main(words) == 0
    assert name in capsys.readouterr().out.replace("\n", "")
    assert main([*words, "--overwrite"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == [name.partition("/")[0]]


@pytest.mark.slow
def test_the_demo_of_healing_wins_back_most_of_what_its_cut_costs(tmp_path, capsys):
    assert main(["demo", "--heal", "--no-rollouts", "--out", str(tmp_path / "demo")]) == 0
    said = capsys.readouterr().out.replace("\n", " ")
    full, cut, healed = map(float, re.search(r"full ([\d.]+), cut ([\d.]+), healed ([\d.]+)", said).groups())
    assert full < healed < full + 0.2 * (cut - full)
    kept = {name: read_architecture(read_spec(str(tmp_path / "demo" / name))) for name in ("cut", "healed")}
    assert kept["cut"] == kept["healed"] == kept["cut"].with_depths({"vlm": 12, "action": 12})


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--heal", "--steps", "5", "--keep-layers", "6"), "--keep-layers and --steps: --heal has blocks of its own"),
        (("--no-rollouts", "--episodes", "3"), "--episodes: --no-rollouts leaves out what it counts"),
    ],
)
def test_flags_that_a_demo_does_not_read_are_refused(tmp_path, capsys, flags, said):
    assert main(["demo", *flags, "--out", str(tmp_path / "demo")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def test_a_demo_replaces_only_a_demo(tmp_path, capsys):
    (tmp_path / "analysis").mkdir()
    (tmp_path / "analysis" / "thesis.tex").write_text("mine")
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert "was written by something else" in capsys.readouterr().err
    assert (tmp_path / "analysis" / "thesis.tex").exists()
