"""A folder is pruned by a plan, and its record says how it came to be."""

import dataclasses
import json

import pytest
from safetensors_folders import GROOT, GROOT_PRUNED, SMOLVLA, WEIGHTS, groot_keep, tensors_of

from clp_jax.checkpoint.safetensors.folder import fingerprint_folder, read_folder
from clp_jax.errors import InputError
from clp_jax.plan import PrunePlan
from clp_jax.prune_folder import prune_folder


def plan_of(spec, keep) -> PrunePlan:
    return PrunePlan.of(spec.kind, spec.depths, keep, coupled=tuple(g for g in spec.groups if len(g) > 1))


def test_the_record_says_what_was_done(tmp_path):
    spec = read_folder(GROOT)
    prune_folder(spec, plan_of(spec, groot_keep()), tmp_path / "out", config={"seed": 3}, calibration={"episodes": 2})
    assert tensors_of(tmp_path / "out") == tensors_of(GROOT_PRUNED)
    record = json.loads((tmp_path / "out" / "clp.json").read_text())
    assert record["kind"] == "groot" and record["schema"] == 1
    (step,) = record["steps"]
    assert step["source"] == str(GROOT) and step["source_fingerprint"] == fingerprint_folder(spec)
    assert step["config"] == {"seed": 3} and step["calibration"] == {"episodes": 2}
    assert PrunePlan.from_json(record["plan"]) == plan_of(spec, groot_keep())
    assert read_folder(tmp_path / "out").plan_record == record


def test_plans_compose_when_a_pruned_folder_is_pruned_again(tmp_path):
    spec = read_folder(SMOLVLA)
    first = {name: [0, 1, 4, 5, 8, 11] for name in ("vlm", "action")}
    prune_folder(spec, plan_of(spec, first), tmp_path / "first")
    half = read_folder(tmp_path / "first")
    prune_folder(half, plan_of(half, {name: [0, 3, 4, 5] for name in first}), tmp_path / "second")
    prune_folder(spec, plan_of(spec, {name: [0, 5, 8, 11] for name in first}), tmp_path / "once")
    for name in (WEIGHTS, "config.json"):
        assert (tmp_path / "second" / name).read_bytes() == (tmp_path / "once" / name).read_bytes()
    twice, once = (json.loads((tmp_path / name / "clp.json").read_text()) for name in ("second", "once"))
    assert twice["plan"]["towers"] == once["plan"]["towers"] and twice["plan"]["coupled"] == once["plan"]["coupled"]
    assert [step["source"] for step in twice["steps"]] == [str(SMOLVLA), str(tmp_path / "first")]
    assert len(once["steps"]) == 1


def test_plans_that_do_not_fit(tmp_path):
    spec = read_folder(SMOLVLA)
    plan = plan_of(spec, {name: [0, 1] for name in ("vlm", "action")})
    with pytest.raises(InputError, match=r"the plan is for a smolvla model, .* is a groot"):
        prune_folder(read_folder(GROOT), plan, tmp_path / "out")
    prune_folder(spec, plan, tmp_path / "cut")
    with pytest.raises(InputError, match="for a 'vlm' tower of 12 blocks, but the model's has 2"):
        prune_folder(read_folder(tmp_path / "cut"), plan, tmp_path / "out")
    edited = dataclasses.replace(plan_of(spec, {name: [0, 2] for name in ("vlm", "action")}), coupled=())
    with pytest.raises(InputError, match="tower 'vlm': block 2 cannot take place 1"):
        prune_folder(spec, edited, tmp_path / "out")
    (tmp_path / "cut" / "clp.json").write_text('{"schema": 7}')
    again = read_folder(tmp_path / "cut")
    with pytest.raises(InputError, match="schema 7"):
        prune_folder(again, plan_of(again, {}), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["cut"]
