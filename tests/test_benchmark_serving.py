"""The serving benchmark on toys: what it counts, and what it refuses."""

import json

import pytest
import toys
from rich.console import Console
from served import loaded, params

from clp_jax.benchmarks import serving
from clp_jax.cli import main
from clp_jax.commands import benchmark


@pytest.mark.slow
def test_both_are_served_and_measured(monkeypatch):
    model = loaded(toys.architecture(), params(toys.architecture()))
    monkeypatch.setattr(serving, "load_model", lambda _: model)
    policy = serving._policy(model, max_batch=1)
    monkeypatch.setattr(serving, "_policy", lambda *_: policy)  # both are one: compiled once
    result = serving.run("small", "full", clients=(1, 2), rounds=1, seconds=0.3, max_batch=1)
    assert result["models"]["pruned"]["depth"] == {"vision": 2, "vlm": 4, "action": 4}
    for name in ("pruned", "full"):
        for count in ("1", "2"):
            measured = result["models"][name]["clients"][count]
            assert measured["requests"] >= int(count)
            assert 0 < measured["p50_ms"] <= measured["p99_ms"]
            assert measured["requests_per_second"] > 0
    assert result["conditions"]["action_horizon"] == 50
    console = Console(record=True, width=120)
    serving.show(result, console)
    assert "requests/s" in console.export_text()


def test_serving_needs_two_checkpoints(capsys):
    assert main(["benchmark", "--part", "serving"]) == 2
    assert "give --checkpoint and --against" in capsys.readouterr().err


def test_the_numbers_of_a_benchmark_are_printed_as_json(monkeypatch, capsys):
    rows = {"overhead": 0.05, "model": "π0"}
    monkeypatch.setattr(benchmark.analysis_overhead, "run", lambda: rows)
    monkeypatch.setattr(benchmark.analysis_overhead, "show", lambda result, console: console.print("a table"))
    assert main(["benchmark", "--part", "analysis", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == rows
