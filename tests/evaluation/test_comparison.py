"""Two policies over the same episodes: a table of pairs, intervals that hold what they promise, pages side by side."""

import itertools
import json
import math

import numpy as np
import pytest
from PIL import Image
from scipy.optimize import minimize_scalar
from simulated_gym import serving

from clp_jax.cli import main
from clp_jax.errors import InputError
from clp_jax.evaluation.comparison import compare
from clp_jax.evaluation.statistics import paired_difference, sign_test

FLAGS = ("--env", "simulated_gym:Walk", "--tasks", "a", "b", "--episodes", "3", "--processes", "1", "--filmed", "2")


def evaluate(out, *words):
    return main(["evaluate", *FLAGS, "--out", str(out), *words])


def results(**tasks):
    rows = {
        task: {"per_episode": [{"number": n, "success": success} for n, success in enumerate(outcomes)]}
        for task, outcomes in tasks.items()
    }
    return {"tasks": rows}


def test_pairs_are_episodes_that_both_played():
    found = compare(results(a=[True, True, False, False], b=[True]), results(a=[True, False, True], c=[True]))
    row = found["tasks"]["a"]
    assert (row["pairs"], row["first"], row["second"], row["only_first"], row["only_second"]) == (3, 2, 2, 1, 1)
    assert (row["low"], row["high"]) == paired_difference(1, 1, 3)[1:] and row["p"] == 1
    assert list(found["tasks"]) == ["a"] and found["all"] == row


@pytest.mark.parametrize(("only_first", "only_second", "pairs"), [(5, 1, 20), (0, 3, 12), (2, 2, 40), (30, 4, 50)])
def test_the_interval_is_that_of_the_score_test(only_first, only_second, pairs):
    """At both limits the likeliest rates with this difference give a score of 1.96, found here without a formula."""
    rate, low, high = paired_difference(only_first, only_second, pairs)
    assert rate == (only_first - only_second) / pairs
    same = pairs - only_first - only_second
    for limit in (low, high):

        def unlikely(second, limit=limit):
            chances = np.array([second + limit, second, 1 - 2 * second - limit])
            return -np.sum(np.array([only_first, only_second, same]) * np.log(chances))

        least, most = max(0.0, -limit), (1 - limit) / 2
        second = minimize_scalar(unlikely, bounds=(least, most), method="bounded", options={"xatol": 1e-12}).x
        score = (rate - limit) / math.sqrt((2 * second + limit - limit**2) / pairs)
        assert abs(score) == pytest.approx(1.959964, abs=1e-3)


def test_the_interval_is_in_order_and_turns_with_the_policies():
    for pairs in (1, 2, 7):
        for first, second in itertools.product(range(pairs + 1), repeat=2):
            if first + second > pairs:
                continue
            rate, low, high = paired_difference(first, second, pairs)
            assert -1 <= low <= rate <= high <= 1 and high - low > 0.1
            assert paired_difference(second, first, pairs) == pytest.approx((-rate, -high, -low), abs=1e-7)
    assert paired_difference(0, 0, 20).high == pytest.approx(1.959964**2 / (20 + 1.959964**2), abs=1e-6)
    assert sign_test(0, 6) == pytest.approx(2 / 2**6)


@pytest.mark.parametrize("counts", [(3, 2, 4), (-1, 0, 2), (0, 0, 0)])
def test_impossible_pairs_are_refused(counts):
    with pytest.raises(InputError, match="cannot be"):
        paired_difference(*counts)


def test_a_second_policy_meets_the_same_episodes(tmp_path, capsys):
    out = tmp_path / "found"
    with serving(0.3) as good, serving(-0.3) as bad:
        assert evaluate(out, "--server", good, "--against", bad) == 0
        told = capsys.readouterr().out
        found = json.loads((out / "comparison.json").read_text())
        assert found["all"]["only_first"] == 6 and found["all"]["difference"] == 1 and found["against"] == bad
        assert f"first: {good}; second: {bad}" in told and "+100%" in told and "…" not in told
        with Image.open(out / "a-against.png") as both, Image.open(out / "a.png") as one:
            pages = np.asarray(both), np.asarray(one)
            assert both.size == (one.width, 2 * one.height)
        assert np.array_equal(pages[0][:96], pages[1][:96]) and not np.array_equal(pages[0][96:192], pages[1][96:192])

        again = tmp_path / "again"
        assert evaluate(again, "--server", bad, "--against", str(out)) == 0
        assert json.loads((again / "comparison.json").read_text())["all"]["only_second"] == 6
        assert evaluate(out, "--server", good, "--against", bad, "--resume") == 0


def test_other_episodes_are_not_compared(tmp_path, capsys):
    out = tmp_path / "found"
    with serving(0.3) as server:
        assert evaluate(out, "--server", server) == 0
        assert evaluate(tmp_path / "other", "--server", server, "--against", str(out), "--seed", "4") == 2
        assert "is of other episodes: seed was 1, is 4. Give the same flags" in capsys.readouterr().err
        assert evaluate(tmp_path / "other", "--server", server, "--against", str(out), "--tasks", "c") == 2
        assert "has other tasks: a, b. Give some of them" in capsys.readouterr().err
        assert evaluate(tmp_path / "other", "--server", server, "--against", "127.0.0.1:9") == 2
        assert "no policy answers at ws://127.0.0.1:9" in capsys.readouterr().err
        assert evaluate(tmp_path / "other", "--server", server, "--against", str(tmp_path)) == 2
        capsys.readouterr()
        (out / "results.json").unlink()
        assert evaluate(tmp_path / "other", "--server", server, "--against", str(out)) == 2
        assert "is an unfinished evaluation; go on with its --resume first" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
