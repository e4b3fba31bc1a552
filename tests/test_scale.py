"""Plans for slices that are not here, tried on eight fake CPU devices: the same code with another compiler."""

import dataclasses
import json
import math
import re
import shutil
import sys

import jax
import jax.numpy as jnp
import pytest
import toys
from safetensors_folders import SMOLVLA

from clp_jax import cli, example, sharding
from clp_jax.errors import InputError
from clp_jax.flops import forward_flops, parameter_count
from clp_jax.models import Lengths, abstract_params, smolvla
from clp_jax.models.pi0 import PI0
from clp_jax.operations import count_operations
from clp_jax.scale import hlo, topologies
from clp_jax.scale.chips import CHIPS, interconnect
from clp_jax.scale.forecast import Forecast, forecast, smallest
from clp_jax.scale.programs import Workload, programs
from clp_jax.trees import flatten

pytestmark = pytest.mark.slow

CPU8 = topologies.parse("cpu:8")
DEPTH = toys.DEPTH
BATCH, PROMPT, HORIZON = 16, 5, 4


@pytest.fixture(scope="module")
def arch():
    """Wide enough for every matrix to divide over eight devices; depth 4, which no other axis has."""
    toy = dataclasses.replace(toys.architecture(), skip_dead=True)
    return dataclasses.replace(
        toy,
        vision=dataclasses.replace(toy.vision, depth=3, width=32, mlp_dim=64),
        vlm=dataclasses.replace(toy.vlm, width=64, mlp_dim=96),
        action=dataclasses.replace(toy.action, width=32, mlp_dim=64),
        vocab_size=24,
    )


@pytest.fixture(scope="module")
def split_everything():
    """openpi's rule leaves small parameters whole: without the limit, a toy is split like a full-size model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "_MIN_SHARDED_BYTES", 256)
        yield


def program_of(arch, task="finetune", **settings):
    workload = Workload(
        task=task, batch_size=BATCH, augment=False, action_horizon=HORIZON, prompt_length=PROMPT, **settings
    )
    return programs(workload, arch, abstract_params(arch), sharding.make_mesh(8))[0]()


@pytest.fixture(scope="module")
def step(arch, split_everything):
    program = program_of(arch)
    return program, program.traced.lower().compile()


@pytest.fixture(scope="module")
def text(step):
    return step[1].as_text()


def stacks(arch):
    """One layer's elements of every stacked parameter of the language stack and the encoder."""
    shapes = flatten(abstract_params(arch)).items()
    return {path: leaf.size // leaf.shape[0] for path, leaf in shapes if re.search("layers/|encoderblock/", path)}


# The training step as it is compiled for eight devices, parameters split over all.


def test_no_more_than_one_layer_of_a_stack_is_ever_gathered(arch, text):
    largest = max(stacks(arch).values())
    for one in hlo.collectives(text):
        if one.kind == "all-gather":
            assert max(hlo.size_of(one.result)) <= 4 * largest, one


def test_parameters_are_gathered_inside_the_scans(arch, text):
    """Where each layer's gathering can run while the layer before it computes; twice, for blocks are recomputed."""
    runs = [one.times for one in hlo.collectives(text) if one.kind == "all-gather"]
    assert runs.count(DEPTH) >= 2 * 7  # the matrices of the two experts
    assert runs.count(arch.vision.depth) >= 2 * 6


def test_no_device_holds_the_activations_of_others(arch, text):
    """The states of the whole batch, with the tokens of an image, of the prefix or of both."""
    tokens = arch.vision.num_tokens
    prefix = 3 * tokens + PROMPT
    whole = rf"\[(?:\d+,)?{3 * BATCH},{tokens},|\[{BATCH},8,8,3\]"
    whole += rf"|\[(?:\d+,)?{BATCH},(?:{prefix}|{prefix + HORIZON + 1}),"
    mine = rf"\[(?:\d+,)?{3 * BATCH // 8},{tokens},"
    assert re.search(mine, text)
    assert not re.findall(whole, text)


def test_without_pinned_rows_the_partitioner_gathers_activations(arch, split_everything, monkeypatch):
    """What the test above protects from: a pass left to XLA."""
    from clp_jax.models.layers import siglip
    from clp_jax.models.pi0 import flow, gemma

    for module in (gemma, flow, siglip):
        monkeypatch.setattr(module, "pinned", lambda tree, rows: tree)
    text = program_of(arch, task="infer", num_steps=1).traced.lower().compile().as_text()
    assert re.findall(rf"\[(?:\d+,)?{3 * BATCH},{arch.vision.num_tokens},", text)


def test_the_state_is_donated(step):
    program, compiled = step
    memory = compiled.memory_analysis()
    state = sum(size for name, size in program.held.items() if name != "inputs")
    assert memory.alias_size_in_bytes >= 0.99 * state
    assert "input_output_alias" in compiled.as_text().splitlines()[0]


def test_held_memory_is_what_the_compiler_counts(step):
    program, compiled = step
    assert sum(program.held.values()) == compiled.memory_analysis().argument_size_in_bytes
    assert program.held["optimiser"] == pytest.approx(2 * program.held["parameters"], rel=0.01)


# Counting.


def test_operations_agree_with_the_formula(arch):
    program = program_of(arch, task="infer", num_steps=1)
    counted = count_operations(program.traced.jaxpr, program.is_weight)
    formula = BATCH * forward_flops(arch, Lengths(HORIZON, PROMPT), cameras=3)
    # Prefix queries see no suffix keys here.
    assert counted.flops == pytest.approx(formula, rel=0.03)
    weights = sum(leaf.size for path, leaf in flatten(abstract_params(arch)).items() if leaf.ndim > 1)
    assert 0.8 < counted.weight_bytes / (4 * weights) < 1.1


def test_a_training_step_is_forward_backward_and_forward_again(arch, step):
    program, _ = step
    counted = count_operations(program.traced.jaxpr, program.is_weight).flops
    assert 3.6 < counted / (BATCH * forward_flops(arch, Lengths(HORIZON, PROMPT), cameras=3)) < 4.1


def test_collectives_in_nested_loops_are_multiplied():
    mesh = sharding.make_mesh(8)
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))

    def body(x, _):
        inner, _ = jax.lax.scan(lambda y, _: (jnp.sin(y + y.sum()), None), x, None, length=3)
        return inner, None

    program = jax.jit(lambda x: jax.lax.scan(body, x, None, length=5)[0], in_shardings=rows, out_shardings=rows)
    compiled = program.lower(jax.ShapeDtypeStruct((16, 4), jnp.float32)).compile()
    found = [one for one in hlo.collectives(compiled.as_text()) if one.kind == "all-reduce"]
    assert [(one.times, one.payload, one.group) for one in found] == [(15, 4, 8)]
    assert found[0].sent == 2 * 7 / 8 * 4


GROUPS = "channel_id=7, replica_groups=mesh['axis_0'=16,'axis_1'=1] {'axis_0'}, dimensions={0}"
ARRAY = "bf16[64,64]{1,0:T(8,128)(2,1)S(1)}"
PAIR = "(bf16[2,8]{1,0}, bf16[2,8]{1,0}, u32[]{:S(2)}, u32[]{:S(2)})"
TPU_TEXT = f"""HloModule step

%start.1 (p: bf16[4,64]) -> (bf16[4,64], bf16[64,64]) {{
  %all-gather.1 = {ARRAY} all-gather(%p), {GROUPS}
  ROOT %call.1 = (bf16[4,64]{{1,0}}, {ARRAY}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}}

%async_collective_fusion.1 (p: bf16[4,64]) -> bf16[64,64] {{
  ROOT %all-gather.2 = {ARRAY} all-gather(%p), {GROUPS}
}}

%body.1 (s: (u32[], bf16[4,64])) -> (u32[], bf16[4,64]) {{
  %fusion.1 = (bf16[4,64]{{1,0}}, {ARRAY}) fusion(%x), kind=kOutput, calls=%start.1
  %fusion.2 = {ARRAY} fusion(%x), kind=kOutput, calls=%async_collective_fusion.1
  %permute.1 = {PAIR} collective-permute-start(%x), channel_id=9, source_target_pairs={{{{0,1}},{{1,0}}}}
}}

%condition.1 (s: (u32[], bf16[4,64])) -> pred[] {{
  %constant.1 = u32[] constant(8)
  ROOT %compare.1 = pred[] compare(%i, %constant.1), direction=LT
}}

ENTRY %main (p: bf16[4,64]) -> bf16[4,64] {{
  ROOT %while.1 = (u32[]{{:T(128)}}, bf16[4,64]{{1,0:T(8,128)}}) while(%t), condition=%condition.1, body=%body.1
}}
"""


def test_an_asynchronous_collective_of_a_tpu_counts_once():
    gather, permute = sorted(hlo.collectives(TPU_TEXT), key=lambda one: one.kind)
    assert (gather.kind, gather.payload, gather.group, gather.times) == ("all-gather", 64 * 64 * 2, 16, 8)
    assert (permute.kind, permute.payload, permute.sent, permute.times) == ("collective-permute", 32, 32.0, 8)


# Slices.


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("v9:2x2", "of no known kind"),
        ("v5e:2x2x2", "no slice of v5e; write it as v5e:4x4"),
        ("v5p-5", "no slice; there are v5p-2, v5p-8, v5p-16"),
        ("cpu:x", "of no known kind"),
    ],
)
def test_unknown_slices_are_told(name, complaint):
    with pytest.raises(InputError, match=complaint):
        topologies.parse(name)


def test_without_the_tpu_compiler_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(InputError, match=r'pip install "jax\[tpu\]"'):
        topologies.devices_of(topologies.parse("v5e:2x2"))


def test_small_slices_have_fewer_links():
    chip = CHIPS["v5p"]
    assert interconnect(chip, (1, 1, 1)) == 0
    assert interconnect(chip, (2, 2, 1)) * 3 == interconnect(chip, (4, 4, 4)) == pytest.approx(600e9)


def test_the_smallest_slice_holds_all_programs():
    def entry(topology, chips, program, fits):
        return Forecast(topology, chips, 1, "m", program, fits=fits)

    plans = [entry("b", 8, "x", True), entry("b", 8, "y", True), entry("a", 4, "x", True), entry("a", 4, "y", False)]
    assert smallest(plans) == {"m": "b"}


def test_what_does_not_fit_is_not_compiled(arch):
    tiny = dataclasses.replace(CPU8, chip=dataclasses.replace(CPU8.chip, hbm=1000))
    found = forecast(program_of(arch, task="infer"), tiny, "m", 8)
    assert not found.fits
    assert found.free < 0
    assert "arguments alone" in found.problem


def test_lora_and_analysis_are_traced_at_full_size():
    """Nothing is compiled: the programs of the commands take shapes alone."""
    mesh, params = sharding.make_mesh(8), abstract_params(PI0)
    (lora,) = programs(Workload(task="lora", batch_size=8), PI0, params, mesh)
    held = lora().held
    assert held["optimiser"] < held["parameters"]
    similarity, gates = programs(Workload(task="analyse", batch_size=8), PI0, params, mesh)
    assert similarity().observations == gates().observations == 32


def test_healing_is_traced_at_full_size_beside_the_full_model():
    """The widest fit: the feed-forward of the VLM, of 16,384 channels, together with the action expert's."""
    mesh, params, half = sharding.make_mesh(8), abstract_params(PI0), PI0.with_depths({"vlm": 9, "action": 9})
    smaller = abstract_params(half)
    workload = Workload(task="heal", batch_size=8, cut_from=(PI0, params))
    sums, fit = (make() for make in programs(workload, half, smaller, mesh))
    assert sums.held["parameters"] == pytest.approx(4 * (parameter_count(PI0) + parameter_count(half)) / 8, rel=0.01)
    wide, narrow = 16_384, 4096
    floats = wide**2 + wide * 2048 + narrow**2 + narrow * 1024
    assert sums.held["sums"] == pytest.approx(4 * floats / 8, rel=0.01)
    assert fit.held["sums"] == pytest.approx(2 * 4 * (wide**2 + wide * 2048) / 8, rel=0.01)
    counted = count_operations(sums.traced.jaxpr, sums.is_weight)
    tokens = 8 * (3 * 256 + 48)
    exact = counted.products["float32", "HIGHEST"]
    draws = 8 * 4 * (50 + 1)
    assert exact == 2 * tokens * wide * (wide + 2048) + 2 * draws * narrow * (narrow + 1024)


# The command.


def test_the_command_writes_table_json_and_plot(tmp_path, capsys):
    words = f"plan-scale --checkpoint {example.CHECKPOINT} --topology cpu:8 --task infer --batch-size 1 --num-steps 1"
    assert cli.main([*words.split(), "--keep-layers", "2", "--out", str(tmp_path / "plan")]) == 0
    shown = capsys.readouterr().out
    assert "activations" in shown
    assert "18 blocks fits: cpu:8" in shown
    plan = json.loads((tmp_path / "plan/plan-scale.json").read_text())
    full, pruned = plan["forecasts"]
    memory = full["memory"]
    assert full["needed"] == sum(full["held"].values()) + full["activations"]
    assert (
        full["needed"]
        == memory["argument"] + memory["output"] - memory["alias"] + memory["temp"] + memory["generated_code"]
    )
    assert pruned["held"]["parameters"] < full["held"]["parameters"]
    assert pruned["flops"] < full["flops"]
    assert (tmp_path / "plan/plan-scale.png").stat().st_size > 10_000


def test_two_checkpoints_whose_folders_end_in_the_same_word_are_both_planned(tmp_path, capsys):
    one, other = tmp_path / "one/params", tmp_path / "other/params"
    for folder in (one, other):
        shutil.copytree(f"{example.CHECKPOINT}/params", folder)
    words = f"plan-scale --checkpoint {one} --against {other} --topology cpu:1 --task infer --batch-size 1 --json"
    assert cli.main([*words.split(), "--num-steps", "1"]) == 0
    planned = json.loads(capsys.readouterr().out)["smallest"]
    assert list(planned) == [f"{other}, 18 blocks", f"{one}, 18 blocks"]


def test_a_folder_of_safetensors_files_is_planned_from_its_headers(tmp_path, capsys):
    words = f"plan-scale --checkpoint {SMOLVLA} --topology cpu:8 --task infer --batch-size 1 --num-steps 1"
    assert cli.main([*words.split(), "--keep-layers", "6", "--json", "--out", str(tmp_path / "plan")]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "plan/plan-scale.json").read_text())
    assert list(printed["smallest"].values()) == ["cpu:8", "cpu:8"]
    full, cut = printed["forecasts"]
    assert cut["held"]["parameters"] < full["held"]["parameters"]
    assert cut["flops"] < full["flops"]


def test_a_full_size_smolvla_is_traced_with_what_upstream_freezes():
    """Nothing is compiled. The expert alone is trained, so that the optimiser is smaller than the weights."""
    mesh = sharding.make_mesh(8)
    (step,) = programs(Workload(task="finetune", batch_size=8), smolvla.SMOLVLA, {}, mesh)
    held = step().held
    assert 0 < held["optimiser"] < held["parameters"]


def test_a_teacher_is_held_and_read_in_the_dtype_of_activations():
    mesh = sharding.make_mesh(8)
    student, teacher = PI0.with_depths({"vlm": 9, "action": 9}), PI0
    alone, taught = (
        programs(Workload(task="finetune", batch_size=8, teacher=one), student, {}, mesh)[0]()
        for one in (None, teacher)
    )
    sizes = [math.prod(leaf.shape) for leaf in flatten(abstract_params(teacher)).values()]
    assert alone.held["teacher"] == 0
    assert taught.held["teacher"] == pytest.approx(2 * sum(sizes) / 8, rel=0.01)
    assert taught.held["parameters"] == alone.held["parameters"]
    assert sum(taught.is_weight) == sum(alone.is_weight) + len(sizes)
    flops = [count_operations(one.traced.jaxpr, one.is_weight).flops for one in (alone, taught)]
    assert flops[1] - flops[0] == pytest.approx(8 * forward_flops(teacher, Lengths(50, 48), cameras=3), rel=0.02)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ("--topology cpu:8 --checkpoint pi0 --task infer --teacher pi0", "--teacher: nothing in --task infer depends"),
        (
            "--topology cpu:8 --checkpoint no --task infer --accumulate 4 --no-augment --ema-decay None",
            "--accumulate, --ema-decay and --no-augment: nothing in --task infer depends on them; leave them out.",
        ),
        (
            "--topology cpu:8 --checkpoint no --task analyse --num-steps 3 --remat none",
            "--remat and --num-steps: nothing in --task analyse depends on them",
        ),
        (
            "--topology cpu:8 --checkpoint no --group-size 3 --params-dtype bfloat16",
            "--params-dtype and --group-size: nothing in --task finetune depends on them",
        ),
        ("--topology cpu:8 --checkpoint no --task heal --group-size 3", "nothing in --task heal depends on it"),
        ("--topology cpu:8 --checkpoint pi0 --vlm-config x", "--vlm-config: the sizes of a released model are known"),
        ("--topology cpu:8 --checkpoint pi0 --batch-size 8 --teacher smolvla", "--teacher is a SmolVLA"),
        ("--topology v5e:1 --checkpoint pi0", "no slice of v5e"),
        ("--topology , --checkpoint pi0", "--topology names no slice"),
        ("--topology cpu:8 --checkpoint pi0-fast --task infer", "π0-FAST answers with tokens"),
        ("--topology cpu:8 --checkpoint pi0 --task heal", "give --keep-layers, or --against"),
        ("--topology cpu:8 --checkpoint smolvla --against pi0 --task heal", "give --keep-layers, or --against"),
        ("--topology cpu:8 --checkpoint pi0 --keep-layers 19", "numbers from 1 to 18"),
        ("--topology cpu:8 --checkpoint pi0 --batch-size 9", "not a multiple of 8"),
        ("--topology cpu:8 --checkpoint gr00t-n1.5 --keep-layers 4", "write --keep-layers llm=4+vl=4+dit=4"),
        ("--topology cpu:8 --checkpoint gr00t-n1.5 --keep-layers llm=6+vl=5+dit=8", "numbers from 1 to 4"),
    ],
)
def test_mistakes_are_one_line(flags, complaint, capsys):
    assert cli.main(["plan-scale", *flags.split()]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert complaint in error
