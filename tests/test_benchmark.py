"""The flags of the benchmarks: each part refuses those that it does not read, before it measures."""

import dataclasses
from typing import get_args, get_type_hints

import pytest

from clp_jax.cli import main
from clp_jax.commands import benchmark

PARTS = get_args(get_type_hints(benchmark.Benchmark)["part"])
MODEL = {"lora_scale": ("2",), "vlm_config": ("V",), "embodiment": ("E",), "cameras": ("C",)}
OF_CHECKPOINTS = {"checkpoint", "against", *MODEL}
VALUES = {
    **dict.fromkeys(("checkpoint", "against", "data", "scratch"), ("nowhere",)),
    "workers": ("7",),
    "shape": ("2", "4", "4"),
    **MODEL,
}
"""A value of each flag that some part does not read."""
READ = {
    "cka": {"shape"},
    "checkpoint": {"scratch"},
    "analysis": set(),
    "depth": OF_CHECKPOINTS,
    "serving": OF_CHECKPOINTS,
    "action-samples": set(),
    "full-size": {"scratch"},
    "loader": {"data", "workers"},
}
"""Of those, the flags that a part does read."""


@pytest.fixture(autouse=True)
def unmeasured(monkeypatch):
    monkeypatch.setattr(benchmark, "_measured", lambda *_: {})


def test_every_part_and_flag_is_tried_here():
    assert set(PARTS) == READ.keys()
    fields = {field.name for field in dataclasses.fields(benchmark.Benchmark)}
    assert fields == {"part", "out", "json", *VALUES}


@pytest.mark.parametrize("flag", VALUES)
@pytest.mark.parametrize("part", PARTS)
def test_flags_of_other_parts_are_refused(part, flag, tmp_path, capsys):
    typed = f"--{flag.replace('_', '-')}"
    words = ["benchmark", "--part", part, "--out", str(tmp_path / "out.json"), typed, *VALUES[flag]]
    if flag in MODEL and flag in READ[part]:
        words += ["--checkpoint", "nowhere", "--against", "nowhere"]
    code, said = main(words), capsys.readouterr().err
    if flag in READ[part]:
        assert (code, said) == (0, "")
    else:
        assert (code, said) == (2, f"error: {typed}: nothing in --part {part} depends on it; leave it out.\n")
    assert (tmp_path / "out.json").exists() == (code == 0)


def test_flags_of_checkpoints_are_refused_without_any(capsys):
    assert main(["benchmark", "--part", "depth", "--lora-scale", "2", "--cameras", "a", "b"]) == 2
    assert capsys.readouterr().err == (
        "error: --lora-scale and --cameras: nothing in the small random model depends on them; give --checkpoint and "
        "--against, too, or leave them out.\n"
    )


def test_flags_of_several_other_parts_are_one_line(capsys):
    flags = "--shape 2 4 4 --data /nosuch --workers 7 --lora-scale 2 --against /nosuch --scratch /nosuch"
    assert main(["benchmark", "--part", "cka", *flags.split()]) == 2
    said = "error: --lora-scale, --against, --data, --workers and --scratch: nothing in --part cka depends on them; "
    assert capsys.readouterr().err == f"{said}leave them out.\n"


@pytest.mark.parametrize("place", ["no/numbers.json", "taken", "taken/numbers.json"])
def test_a_file_that_could_not_be_written_is_refused_before_anything_is_measured(tmp_path, monkeypatch, capsys, place):
    monkeypatch.setattr(benchmark, "_measured", lambda *_: pytest.fail("it was measured"))
    (tmp_path / "taken").write_text("")
    assert main(["benchmark", "--part", "cka", "--out", str(tmp_path / place)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "choose another --out" in said
