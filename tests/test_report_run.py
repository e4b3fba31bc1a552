"""The page of a fine-tuning on made-up logs: what it says, and what it does with runs and reports that are gone."""

import json
import re
from pathlib import Path

import pytest
from etils import epath
from pages import Page, assert_self_contained, svgs

from clp_jax.errors import InputError
from clp_jax.history import REPORT, REPORT_KEY
from clp_jax.plan import PrunePlan
from clp_jax.provenance import extend_record, training_record
from clp_jax.report.run import read_run, run_before, write_run_report

WHOLE = PrunePlan.of("pi0", {"vlm": 4, "action": 4}, coupled=(("vlm", "action"),))
CUT = PrunePlan.of(
    "pi0", {"vlm": 4, "action": 4}, {"vlm": [0, 1, 3], "action": [0, 1, 3]}, coupled=(("vlm", "action"),)
)
DATA = "a" * 8


def entry(steps: int = 100, data: str = DATA, **config) -> dict:
    flags = {"steps": steps, "batch_size": 8, "data": ["demonstrations"], "seed": 42, **config}
    return {"source": "CKPT", "source_fingerprint": "f", "data_fingerprint": data, "config": flags}


def whole_record(**changes) -> dict:
    return training_record(None, WHOLE, entry(**changes), {"step": 99}).to_json()


def cut_record(source: Path | str = "FULL", report: str | None = None, **changes) -> dict:
    pruned = extend_record(
        None,
        CUT,
        source=str(source),
        source_fingerprint="f",
        config={REPORT_KEY: report},
        calibration=None,
        healed={"observations": 64, "blocks": [{"ridges": {"mlp": 0.1}}], "loss": {"pruned": 2, "healed": 1}},
    )
    return training_record(pruned.to_json(), CUT, entry(**changes), {"step": 99}).to_json()


def run(folder: Path, record: dict, *, seconds: float = 0.5, scale: float = 1.0) -> Path:
    """A run whose step 99 is saved, with a log of a hundred steps."""
    step = folder / "99"
    step.mkdir(parents=True)
    (step / "clp.json").write_text(json.dumps(record))
    lines = []
    for number in [*range(0, 100, 10), 99]:
        values = {"loss": scale / (1 + number), "grad_norm": 1.0, "learning_rate": 1e-4, "step_seconds": seconds}
        values["data_seconds"] = seconds / 10
        lines.append({"step": number, **values})
        if number % 20 == 0 and number:
            held = {"held_out_loss": scale * (0.1 if number == 60 else 0.2), "held_out_seconds": 2.0}
            lines += [{"step": number, **held}, {"step": number, "save_seconds": 1.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 99, "lo')
    return folder


def page(folder: Path, record: dict, other: Path | None = None) -> str:
    write_run_report(folder, record, None if other is None else read_run(other))
    return (folder / REPORT).read_text(encoding="utf-8")


def test_the_page_says_how_far_a_run_is_and_what_was_done(tmp_path):
    record = cut_record(note="<script>")
    text = page(run(tmp_path / "<run>", record), record)
    assert_self_contained(text)
    assert len(svgs(text)) == 5
    for part in (
        "<b>100 of 100 steps</b>",
        "<p>4 <i>→</i> <b>3</b></p>",
        "<p>0.2000 <i>→</i> <b>0.2000</b></p>",
        "lowest 0.1 after step 60",
        "median, 16 observations a second",
        "vlm+action: without 2",
        "Healed, 1 of 1 blocks on 64 observations, held-out loss",
        "Fine-tuned from <code>CKPT</code> on <code>demonstrations</code> for 100 steps.",
    ):
        assert part in text
    assert "<script>" not in text
    assert "<run>" not in text
    rows = Page(text).tables["readings"]
    assert [cells[0] for _, cells in rows] == ["20", "40", "60", "80"]
    assert [marked for marked, _ in rows] == [False, False, True, False]
    assert rows[0][1][1] == "0:00:10"  # 21 steps of half a second
    assert [cells for _, cells in Page(text).tables["time"]] == [
        ["training steps", "0:00:50", "100.0%"],
        ["of these, waiting for data", "0:00:05", "10.0%"],
        ["held-out losses", "0:00:08", "16.0%"],
        ["saving, before training goes on", "0:00:04", "8.0%"],
    ]


def test_another_run_is_shown_behind_with_the_ratio_of_losses_and_times(tmp_path):
    full = run(tmp_path / "full", whole_record(), seconds=1.0, scale=2.0)
    record = cut_record()
    text = page(run(tmp_path / "run", record), record, full)
    assert "<p>1.00 <i>→</i> <b>0.500 s</b></p>" in text
    assert "full (all blocks) to this run: 0.50 times" in text
    assert Page(text).tables["readings"][0][1][3:] == ["0.4000", "0.5000"]
    assert '<a href="../full">full (all blocks)</a>' in text
    assert "do not compare" not in text


@pytest.mark.parametrize("change", [{"data": "b" * 8}, {"holdout_data": "elsewhere"}, {"seed": 1}])
def test_losses_on_other_observations_are_not_compared_silently(tmp_path, change):
    full = run(tmp_path / "full", whole_record(**change))
    record = cut_record(full / "99" / "params")
    text = page(run(tmp_path / "run", record), record, full)
    assert "The held-out losses do not compare" in text
    assert run_before(record) is None


def test_the_run_that_was_pruned_is_found_where_its_data_are_the_same(tmp_path):
    full = run(tmp_path / "full", whole_record())
    found = run_before(cut_record(full / "99" / "params"))
    assert found is not None
    assert found.folder == epath.Path(full)
    assert run_before(cut_record(tmp_path / "gone" / "99" / "params")) is None
    assert run_before(whole_record()) is None


def test_a_run_that_goes_while_another_is_trained_stays_as_it_was(tmp_path):
    full = run(tmp_path / "full", whole_record())
    other, record = read_run(full), cut_record()
    (full / "metrics.jsonl").unlink()
    write_run_report(run(tmp_path / "run", record), record, other)
    assert "full (all blocks): held out" in (tmp_path / "run" / REPORT).read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_report_behind_the_plan_is_linked_where_it_is(tmp_path):
    report = tmp_path / "my analysis" / REPORT
    record = cut_record(report=str(report))
    folder = run(tmp_path / "run", record)
    assert f"Report behind the choice (not found, it was at <code>{report}</code>)" in page(folder, record)
    report.parent.mkdir()
    report.write_text("")
    href = re.findall(r'<a href="([^"]*)">Report behind the choice</a>', page(folder, record))
    assert href == ["../my%20analysis/report.html"]


def test_a_run_without_numbers_has_a_page(tmp_path):
    record = whole_record()
    folder = tmp_path / "run"
    folder.mkdir()
    text = page(folder, record)
    assert_self_contained(text)
    assert "<b>0 of 100 steps</b>" in text


def test_shares_of_the_time_are_not_told_before_a_step_was_measured(tmp_path):
    record = whole_record()
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 0, "loss": 1.0}\n{"step": 1, "save_seconds": 3.0}\n')
    assert "Where the time went" not in page(folder, record)


def test_settings_that_are_zero_or_off_are_shown(tmp_path):
    record = whole_record(seed=0, augment=False, weights=[], wandb=None)
    shown = page(run(tmp_path / "run", record), record).rpartition("Settings and versions")[2]
    assert "<dt>seed</dt><dd>0</dd>" in shown
    assert "<dt>augment</dt><dd>False</dd>" in shown
    assert "weights" not in shown
    assert "wandb" not in shown


def test_a_run_before_that_has_no_log_yet_is_left_out(tmp_path):
    full = run(tmp_path / "full", whole_record())
    (full / "metrics.jsonl").write_text("")
    assert run_before(cut_record(full / "99" / "params")) is None


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="no run of clp finetune"):
        read_run(tmp_path)


def test_the_lowest_of_many_held_out_losses_is_among_those_shown(tmp_path):
    record = cut_record()
    folder = run(tmp_path / "run", record)
    lines = [{"step": step, "held_out_loss": 0.0123 if step == 31 else 0.5} for step in range(1, 100)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = page(folder, record)
    rows = re.findall(r"<tr[^>]*>.*?</tr>", text[text.index("<h2>Held-out loss</h2>") :], re.DOTALL)
    assert sum("0.0123" in row for row in rows) == 1
