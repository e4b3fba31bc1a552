"""``clp inspect`` through the real main: every stored form, comparisons both ways, and what it refuses."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
from safetensors_folders import GOLDEN, GROOT, SMOLVLA, WEIGHTS

from clp_jax import history
from clp_jax.checkpoint import fingerprint, read_params, read_spec, write_params
from clp_jax.checkpoint.orbax.spec import read_spec as read_step
from clp_jax.checkpoint.safetensors.folder import read_folder
from clp_jax.cli import main
from clp_jax.comparing import compare
from clp_jax.history import length_of, steps_of
from clp_jax.inspecting import inspect_checkpoint
from clp_jax.loading import load_model
from clp_jax.plan import PrunePlan
from clp_jax.provenance import extend_record, healing, training_record
from clp_jax.prune import prune_checkpoint
from clp_jax.prune_folder import prune_folder
from clp_jax.trees import flatten, unflatten

PI0 = GOLDEN / "ckpt" / "pi0_trained" / "1"
PI0_KEPT = (0, 1, 2, 5, 9, 17)
SMOLVLA_KEPT = (0, 1, 4, 5, 8, 11)
GROOT_KEPT = (0, 3, 8, 9)


@pytest.fixture(scope="module")
def cuts(tmp_path_factory):
    """A cut of every recorded checkpoint, by the name of its family."""
    folder = tmp_path_factory.mktemp("cuts")
    towers = ("vlm", "action")
    spec = read_step(PI0)
    plan = PrunePlan.of("pi0", dict.fromkeys(towers, 18), dict.fromkeys(towers, PI0_KEPT), coupled=(towers,))
    prune_checkpoint(spec, plan, folder / "pi0", config={"data": "some/set"})
    for name, source, keep in (
        ("smolvla", SMOLVLA, dict.fromkeys(towers, SMOLVLA_KEPT)),
        ("groot", GROOT, {"dit": GROOT_KEPT}),
    ):
        spec = read_folder(source)
        coupled = tuple(group for group in spec.groups if len(group) > 1)
        prune_folder(spec, PrunePlan.of(spec.kind, spec.depths, keep, coupled=coupled), folder / name)
    return folder


def said(capsys, *words, code=0):
    """What is printed, as one line; wrapping is not a promise."""
    capsys.readouterr()
    assert main(["inspect", *map(str, words)]) == code
    return " ".join(capsys.readouterr().out.split())


def parsed(capsys, *words, code=0):
    capsys.readouterr()
    assert main(["inspect", *map(str, words), "--json"]) == code
    return json.loads(capsys.readouterr().out)


def refused(capsys, *words):
    """The one line on stderr."""
    capsys.readouterr()
    assert main(["inspect", *map(str, words)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    return captured.err


def towers(found):
    return {part["name"]: part for part in found["parts"] if part["name"] is not None}


def test_an_openpi_step_is_described(capsys):
    found = parsed(capsys, PI0)
    tree = flatten(read_step(PI0).tree)
    assert found["kind"] == "pi0" and found["form"] == "Orbax, step 1, names as training writes them"
    assert {name: part["depth"] for name, part in towers(found).items()} == {"vision": 3, "vlm": 18, "action": 18}
    assert towers(found)["vlm"]["cut_with"] == ["action"] and towers(found)["vision"]["cut_with"] == []
    assert found["parameters"] == sum(leaf.size for leaf in tree.values())
    assert found["parameters"] == sum(part["parameters"] for part in found["parts"])
    assert found["bytes"] == sum(leaf.size * leaf.dtype.itemsize for leaf in tree.values())
    assert found["arrays"] == len(tree) == sum(found["dtypes"].values())
    assert (found["action_horizon"], found["max_token_len"], found["action_dim"]) == (50, 48, 32)
    assert found["cameras"] == ["base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"]
    (statistics,) = found["statistics"]
    assert statistics["dimensions"] == {"state": 8, "actions": 7} and statistics["problem"] is None
    assert found["fingerprint"] == fingerprint(read_spec(PI0))
    assert found["history"] == [] and found["train_state"] is False and found["not_read"] is None
    assert "against" not in found


def test_adapters_and_released_names_are_told(capsys):
    found = parsed(capsys, GOLDEN / "ckpt" / "pi0_lora_trained" / "1")
    assert found["adapters"] == 20 and 0 < found["adapter_parameters"] < found["parameters"]
    assert set(found["dtypes"]) == {"float32", "bfloat16"}
    assert "names as released" in parsed(capsys, GOLDEN / "ckpt" / "pi0_released")["form"]


@pytest.mark.slow
def test_policy_folders_are_described(capsys):
    smolvla = parsed(capsys, SMOLVLA)
    assert (smolvla["kind"], smolvla["files"], smolvla["form"]) == ("smolvla", 1, "safetensors, a single file")
    assert towers(smolvla)["vlm"]["period"] == 2 and towers(smolvla)["vision"]["period"] == 1
    assert (smolvla["action_horizon"], smolvla["max_token_len"]) == (7, 24)
    assert [entry["dimensions"] for entry in smolvla["statistics"]] == [{"action": 8, "observation.state": 6}] * 2
    groot = parsed(capsys, GROOT)
    assert {name: part["depth"] for name, part in towers(groot).items()} == {"vision": 3, "llm": 12, "vl": 4, "dit": 16}
    assert groot["kind"] == "groot_n15" and towers(groot)["dit"]["period"] == 2 and groot["statistics"] == []


@pytest.mark.slow
def test_what_cannot_be_read_is_said_and_the_rest_shown(capsys, cuts):
    found = parsed(capsys, cuts / "smolvla")
    assert "--vlm-config" in found["not_read"] and found["action_horizon"] is None and found["cameras"] is None
    assert towers(found)["vlm"]["depth"] == 6 and towers(found)["vlm"]["period"] == 2
    assert "not read: lengths, cameras and dimensions: the sizes of the VLM" in said(capsys, cuts / "smolvla")
    whole = parsed(capsys, cuts / "smolvla", "--vlm-config", GOLDEN / "smolvla" / "vlm")
    assert whole["not_read"] is None and whole["action_horizon"] == 7
    assert "nowhere" in refused(capsys, cuts / "smolvla", "--vlm-config", cuts / "nowhere")


@pytest.mark.slow
def test_the_tables_say_what_was_done(capsys, cuts):
    text = said(capsys, cuts / "pi0")
    assert "\N{HORIZONTAL ELLIPSIS}" not in text, "a number is cut off on a terminal of 80 columns"
    assert "6 of 18" in text and "π0 (pi0)" in text and "state 8, actions 7" in text
    assert "vlm and action without blocks 3, 4, 6 to 8, 10 to 16, chosen by manual on some/set" in text
    (step,) = parsed(capsys, cuts / "pi0")["history"]
    assert step["source_fingerprint"] == fingerprint(read_spec(PI0)) and step["data"] == "some/set"
    vlm = towers(parsed(capsys, cuts / "pi0"))["vlm"]
    assert vlm["original_depth"] == 18 and vlm["kept"] == list(PI0_KEPT) and len(vlm["removed"]) == 12


@pytest.mark.parametrize(
    ("flags", "calibration", "chosen_on"),
    [
        ({"data": ["pushes"], "keep": "0,2"}, None, None),
        ({"data": ["pushes"], "analysis": "analysis"}, {"observations": 9}, None),
        ({"data": ["pushes", "pulls"]}, {"observations": 9}, "pushes + pulls"),
    ],
    ids=["keep", "analysis", "data"],
)
def test_data_that_healed_a_cut_are_not_said_to_have_chosen_it(flags, calibration, chosen_on):
    plan = PrunePlan.of("toy", {"llm": 3}, {"llm": [0, 2]})
    healed = {"observations": 4, "blocks": []}
    given = {"source": "s", "source_fingerprint": "f", "config": flags, "calibration": calibration}
    (step,) = steps_of(extend_record(None, plan, healed=healed, **given).to_json())
    assert (step.data, step.healed_on) == (chosen_on, " + ".join(flags["data"]))
    assert healing(healed, step.healed_on) == f"healed, 0 of 0 blocks on 4 observations of {step.healed_on}"
    (step,) = steps_of(extend_record(None, plan, **given).to_json())
    assert (step.data, step.healed_on) == (" + ".join(flags["data"]), None)


@pytest.mark.parametrize(
    ("training", "length"),
    [({"step": 999}, "1,000 of 30,000 steps"), ({"step": 29999}, "30,000 steps"), ({}, "at most 30,000 steps")],
)
def test_a_step_is_said_to_have_had_the_steps_that_were_done(training, length):
    """Also when it is cut, where the record no longer says where the run stood."""
    plan = PrunePlan.of("toy", {"llm": 3})
    trained = training_record(None, plan, {"source": "s", "config": {"steps": 30_000}}, training).to_json()
    cut = extend_record(trained, plan, source="s", source_fingerprint="f", config={}, calibration=None).to_json()
    assert [length_of(steps_of(record)[0]) for record in (trained, cut)] == [length, length]


@pytest.mark.slow
def test_fine_tuning_is_told(capsys, cuts, tmp_path):
    record = json.loads((cuts / "pi0" / "clp.json").read_text())
    config = {"data": "my/robot", "steps": 3000}
    trained = {"command": "finetune", "source": "x", "source_fingerprint": fingerprint(read_spec(cuts / "pi0"))}
    record["steps"].append(trained | {"config": config, "data_fingerprint": "y"})
    record["steps"][0]["healed"] = {"observations": 4, "blocks": [{"ridges": {}}, {"ridges": {"mlp": 0.1}}]}
    params = flatten(read_params(read_step(cuts / "pi0")))
    params["PaliGemma/llm/layers/mlp/linear"][2] += 1
    write_params(tmp_path / "7", unflatten(params), record=record)
    (tmp_path / "7" / "train_state").mkdir()
    found = parsed(capsys, tmp_path / "7")
    assert (found["history"][1]["steps_asked"], found["history"][1]["data"]) == (3000, "my/robot")
    assert found["train_state"] is True
    assert "2. fine-tuned from x for at most 3,000 steps on my/robot" in said(capsys, tmp_path / "7")
    against = parsed(capsys, tmp_path / "7", "--against", PI0, "--values", code=1)["against"]
    assert against["cut"]["healed"] is against["cut"]["trained"] is True
    assert against["cut"]["blocks"]["vlm"] == list(PI0_KEPT)
    assert against["values"]["different"] == ["PaliGemma/llm/layers/mlp/linear"]
    assert against["values"]["block_faults"] == {"vlm": [2]}
    text = said(capsys, tmp_path / "7", "--against", PI0, "--values", code=1)
    assert "and healed and trained since" in text and "vlm: what was block 2 of" in text


@pytest.mark.parametrize("source", [PI0, SMOLVLA, GROOT], ids=["pi0", "smolvla", "groot"])
def test_a_copy_is_the_same(capsys, tmp_path, source):
    shutil.copytree(source, tmp_path / "copy")
    found = parsed(capsys, tmp_path / "copy", "--against", source, "--values")["against"]
    assert found["same_structure"] and found["same_content"] and found["differences"] == [] and found["cut"] is None
    assert found["values"]["compared"] > 0 and found["values"]["different"] == []
    assert found["beside"] == {}
    assert "--values compares every bit" in said(capsys, tmp_path / "copy", "--against", source)
    assert "It is a copy of" in said(capsys, tmp_path / "copy", "--against", source, "--values")


def test_where_orbax_wrote_a_step_is_no_difference(capsys, tmp_path):
    """Its marker names the folder, so all steps of a run would differ."""
    steps = [shutil.copytree(PI0, tmp_path / name) for name in ("9", "19")]
    for step in steps:
        (step / "assets").mkdir(exist_ok=True)
        (step / "assets/commit_success.txt").write_text(f"Checkpoint commit was successful to {step}")
    assert parsed(capsys, steps[0], "--against", steps[1])["against"]["beside"] == {}


@pytest.mark.parametrize("values", [(), ("--values",)], ids=["names", "values"])
def test_statistics_and_configurations_beside_the_arrays_are_compared(capsys, tmp_path, values):
    """Fingerprints are of the arrays alone."""
    step, other = (shutil.copytree(PI0, tmp_path / name) for name in ("one", "two"))
    for folder, mean in ((step, 0.0), (other, 5.0)):
        stats = {"norm_stats": {name: {"mean": [mean], "std": [1.0]} for name in ("state", "actions")}}
        (folder / "assets" / "robot").mkdir(parents=True)
        (folder / "assets" / "robot" / "norm_stats.json").write_text(json.dumps(stats))
    text = said(capsys, step, "--against", other, *values, code=1)
    assert "assets/robot/norm_stats.json differs" in text and "copy of" not in text
    shutil.rmtree(step / "assets" / "robot")
    assert f"assets/robot/norm_stats.json is only in {other}" in said(capsys, step, "--against", other, *values, code=1)
    policy, changed = (shutil.copytree(SMOLVLA, tmp_path / name) for name in ("policy", "changed"))
    (changed / "README.md").write_text("for people")
    (changed / "optimizer.pt").write_bytes(b"of a training")
    assert parsed(capsys, policy, "--against", changed, *values)["against"]["beside"] == {}
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps(config | {"chunk_size": config["chunk_size"] - 1}))
    found = parsed(capsys, policy, "--against", changed, *values, code=1)["against"]
    assert found["beside"] == {"config.json": "differs"} and found["same_structure"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "source", "keep"),
    [
        ("pi0", PI0, {"vlm": PI0_KEPT, "action": PI0_KEPT}),
        ("smolvla", SMOLVLA, {"vlm": SMOLVLA_KEPT, "action": SMOLVLA_KEPT}),
        ("groot", GROOT, {"dit": GROOT_KEPT}),
    ],
    ids=["pi0", "smolvla", "groot"],
)
def test_a_cut_is_recognised_from_both_sides(capsys, cuts, name, source, keep):
    for first, second, is_source in ((cuts / name, source, True), (source, cuts / name, False)):
        found = parsed(capsys, first, "--against", second, "--values", code=1)["against"]
        assert not found["same_structure"] and found["differences"]
        assert found["cut"] == {
            "other_is_source": is_source,
            "blocks": {tower: list(blocks) for tower, blocks in keep.items()},
            "healed": False,
            "trained": False,
        }
        values = found["values"]
        assert not any(values[key] for key in ("different", "only_here", "only_there", "block_faults"))
        text = said(capsys, first, "--against", second, "--values", code=1)
        assert "every kept block equals its block of" in text and "bit for bit" in text


@pytest.mark.slow
def test_one_changed_bit_of_a_cut_is_found_in_its_block(capsys, cuts, tmp_path):
    shutil.copytree(cuts / "smolvla", tmp_path / "cut")
    spec = read_folder(cuts / "smolvla")
    name = "model.vlm_with_expert.lm_expert.layers.3.mlp.up_proj.weight"
    tensor, data = spec.tensors[name], bytearray((tmp_path / "cut" / WEIGHTS).read_bytes())
    data[spec.shards[WEIGHTS].data + tensor.begin + tensor.size // 2] ^= 1
    (tmp_path / "cut" / WEIGHTS).write_bytes(data)
    found = parsed(capsys, tmp_path / "cut", "--against", SMOLVLA, "--values", code=1)["against"]["values"]
    assert found["different"] == [name] and found["block_faults"] == {"action": [3]}
    same = parsed(capsys, tmp_path / "cut", "--against", cuts / "smolvla")["against"]
    assert same["same_structure"] and same["values"] is None
    assert parsed(capsys, tmp_path / "cut", "--against", cuts / "smolvla", "--values", code=1)


def test_dtypes_are_compared(capsys, tmp_path):
    params = flatten(read_params(read_step(PI0)))
    bias = params["action_in_proj/bias"]
    params["action_in_proj/bias"] = bias.astype(jax.numpy.bfloat16)
    write_params(tmp_path / "c", unflatten(params))
    found = parsed(capsys, tmp_path / "c", "--against", PI0, "--values", code=1)["against"]
    length = list(bias.shape)
    assert found["differences"] == [f"action_in_proj/bias: expected float32{length}, got bfloat16{length}"]
    assert found["values"]["different"] == ["action_in_proj/bias"]


def test_nan_of_the_same_bits_is_equal(tmp_path):
    for name in ("a", "b"):
        shutil.copytree(SMOLVLA, tmp_path / name)
        spec = read_folder(SMOLVLA)
        data = bytearray((SMOLVLA / WEIGHTS).read_bytes())
        begin = spec.shards[WEIGHTS].data
        data[begin : begin + 4] = b"\xff\xff\xff\x7f"
        (tmp_path / name / WEIGHTS).write_bytes(data)
    found = compare(read_spec(tmp_path / "a"), read_spec(tmp_path / "b"), values=True)
    assert found.same and found.values is not None and found.values.equal


@pytest.mark.slow
def test_a_policy_folder_and_a_step_of_ours_are_compared_in_the_models_names(capsys, tmp_path):
    model = load_model(SMOLVLA, dtype="float32")
    (tmp_path / "assets" / "policy").mkdir(parents=True)
    for file in SMOLVLA.glob("*.json"):
        shutil.copy(file, tmp_path / "assets" / "policy")
    write_params(tmp_path / "1", jax.tree.map(np.asarray, model.params), assets=tmp_path / "assets")
    partly = parsed(capsys, tmp_path / "1")
    assert partly["kind"] == "smolvla" and partly["not_read"] and towers(partly)["vlm"]["period"] == 2
    assert towers(partly)["action"]["cut_with"] == ["vlm"] and towers(partly)["action"]["depth"] == 12
    found = parsed(capsys, tmp_path / "1", "--against", SMOLVLA, "--values", "--vlm-config", GOLDEN / "smolvla" / "vlm")
    assert found["against"]["names"] == "model" and found["against"]["values"]["different"] == []


def test_bad_input_is_one_line(capsys, tmp_path, cuts):
    assert "there is no checkpoint at" in refused(capsys, tmp_path / "nowhere")
    assert "is not an Orbax checkpoint" in refused(capsys, tmp_path)
    assert "is a training run; give one of its steps" in refused(capsys, PI0.parent)
    assert "give the other with --against" in refused(capsys, PI0, "--values")
    assert "there is no checkpoint at" in refused(capsys, PI0, "--against", tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["pi0", "groot"])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda record: "{", "clp.json is no valid JSON"),
        (lambda record: [1], "object"),
        (lambda record: {}, "lacks 'schema'"),
        (lambda record: record | {"schema": 7}, r"schema 7, this version of clp_jax reads 1; install a later one"),
        (lambda record: record | {"schema": 0}, "is damaged: it has schema 0"),
        (lambda record: record | {"schema": "1"}, "schema must be"),
        (lambda record: {k: v for k, v in record.items() if k != "steps"}, "lacks 'steps'"),
        (lambda record: record | {"steps": 3}, "steps must be"),
        (lambda record: record | {"steps": ["x"]}, "step 0 must be"),
        (lambda record: record | {"steps": [{}]}, "lacks 'command'"),
        (lambda record: record | {"steps": [{"command": "prune", "config": 3}]}, "config of step 0 must be"),
        (lambda record: record | {"plan": {"schema": 1}}, "the plan"),
        (lambda record: record | {"plan": None}, "the plan must be"),
    ],
)
def test_a_damaged_record_is_refused_in_one_line(capsys, tmp_path, cuts, name, change, reason):
    shutil.copytree(cuts / name, tmp_path / "cut")
    file = tmp_path / "cut" / "clp.json"
    changed = change(json.loads(file.read_text()))
    file.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    assert re.search(reason, refused(capsys, tmp_path / "cut"))


def test_a_record_of_another_checkpoint_is_refused(capsys, tmp_path, cuts):
    shutil.copytree(PI0, tmp_path / "1")
    shutil.copy(cuts / "pi0" / "clp.json", tmp_path / "1")
    assert "says that tower 'vlm' has 6 blocks, but the weights hold 18" in refused(capsys, tmp_path / "1")


def test_damaged_statistics_are_told_and_do_not_hide_the_rest(tmp_path):
    shutil.copytree(PI0, tmp_path / "1")
    (file,) = (tmp_path / "1" / "assets").rglob("norm_stats.json")
    file.write_text("{}")
    (statistics,) = inspect_checkpoint(tmp_path / "1").statistics
    assert statistics.dimensions == {} and "no norm_stats.json of openpi" in (statistics.problem or "")


def test_a_page_that_cannot_be_reached_is_not_found(monkeypatch):
    def unreachable(self):
        raise ImportError("Please install gcsfs")

    monkeypatch.setattr(type(history.epath.Path("report.html")), "exists", unreachable)
    assert not history._is_there("report.html")
