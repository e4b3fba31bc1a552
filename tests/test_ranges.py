"""A number outside of its flag's range is refused before anything is read."""

import dataclasses
import importlib
import typing

import pytest

from clp_jax.cli import COMMANDS, main
from clp_jax.commands.ranges import RANGES, check_ranges


def flags_of(command: str):
    """Fields of a command that may be numbers."""
    module = importlib.import_module(f"clp_jax.commands.{command.replace('-', '_')}")
    config = getattr(module, command.title().replace("-", ""))
    kinds = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        if {int, float} & {kinds[field.name], *typing.get_args(kinds[field.name])}:
            yield field


@pytest.mark.parametrize("command", COMMANDS)
def test_every_number_has_a_range_and_the_default_is_in_it(command):
    fields = list(flags_of(command))
    assert [field.name for field in fields if field.name not in RANGES] == []
    given = {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}
    check_ranges(dataclasses.make_dataclass("Config", given)(**given))


REFUSED = {
    ("finetune", "--peak-lr", "-1"): "--peak-lr is -1.0; give a number above 0.",
    ("finetune", "--peak-lr", "nan"): "--peak-lr is nan; give a number above 0.",
    ("finetune", "--weight-decay", "inf"): "--weight-decay is inf; give at least 0.",
    ("finetune", "--ema-decay", "1.5"): "--ema-decay is 1.5; give at least 0 and below 1.",
    ("finetune", "--keep-period", "0"): "--keep-period is 0; give at least 1.",
    ("finetune", "--weights", "1", "-2"): "--weights is -2.0; give a number above 0.",
    ("finetune", "--seed", "-1"): "--seed is -1; give at least 0 and below 4294967296.",
    ("serve", "--action-horizon", "1000000000"): "--action-horizon is 1000000000; give at least 1 and at most 16384.",
    ("prune", "--threshold", "nan"): "--threshold is nan; give a finite number.",
    ("prune", "--max-samples", "3"): "--max-samples is 3; give at least 4.",
    ("serve", "--port", "99999"): "--port is 99999; give at least 0 and below 65536.",
}


@pytest.mark.parametrize("words", REFUSED, ids=" ".join)
def test_a_number_outside_of_its_range_is_refused_before_anything_is_read(words, tmp_path, capsys):
    command, *flags = words
    needed = {"finetune": ["--data", "absent", "--out", str(tmp_path / "out"), "--steps", "1"]}
    needed["prune"] = ["--data", "absent", "--out", str(tmp_path / "out")]
    assert main([command, "--checkpoint", "absent", *needed.get(command, []), *flags]) == 2
    assert capsys.readouterr().err == f"error: {REFUSED[words]}\n"
    assert not list(tmp_path.iterdir())
