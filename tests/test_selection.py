"""Criteria: one contract for all of them, and for each the promise that is its own."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from clp_jax.errors import InputError
from clp_jax.selection import (
    CRITERIA,
    Evidence,
    GateEvidence,
    available,
    cka_interval,
    clp,
    combine,
    how_many,
    jump_table,
    jumps,
    knee,
    pool_size,
    select,
    stability,
)
from clp_jax.selection import gates as gates_module
from clp_jax.selection.feasible import all_sets, cheapest_set, count_sets, random_set
from clp_jax.selection.gates import gauss_newton, greedy
from clp_jax.selection.search import descend

# No deadline: the time of a single example says nothing on a busy machine.
property_test = settings(deadline=None, max_examples=50)

# Sums of up to 8 numbers of order 1, added in another order.
SUM_ATOL = 1e-12


def obeys_period(removed, period):
    """Whether every maximal run has a length divisible by the period, spelt out."""
    runs = [0]
    for block in range(max(removed, default=0) + 2):
        runs = [*runs[:-1], runs[-1] + 1] if block in removed else [*runs, 0]
    return all(run % period == 0 for run in runs)


def feasible_sets(depth, remove, period=1, protected=frozenset()):
    return [
        chosen
        for chosen in itertools.combinations(range(depth), remove)
        if obeys_period(chosen, period) and not protected & set(chosen)
    ]


def runs_of(removed):
    """Maximal runs as (first block, block after the last)."""
    starts = [block for block in removed if block - 1 not in removed]
    ends = [block + 1 for block in removed if block + 1 not in removed]
    return list(zip(starts, ends, strict=True))


def chain(adjacent):
    """A similarity matrix with these adjacent values; the rest plays no part in the adjacent criteria."""
    adjacent = np.asarray(adjacent, np.float64)
    return np.diag(adjacent, 1) + np.diag(adjacent, -1) + np.eye(len(adjacent) + 1)


def measured(depth=8, *, seed=0, period=1, protected=frozenset(), unread_last_state=False, flat=False):
    """Evidence with everything known; ``flat`` makes all blocks alike."""
    rng = np.random.default_rng(seed)

    def matrix():
        half = np.full((depth + 1, depth + 1), 0.5) if flat else rng.uniform(0.1, 0.9, (depth + 1, depth + 1))
        full = np.triu(half, 1) + np.triu(half, 1).T + np.eye(depth + 1)
        if unread_last_state:
            full[-1] = full[:, -1] = np.nan
        return full

    vector = np.full(depth, 0.5) if flat else rng.uniform(0.1, 0.9, depth)
    jacobian = np.eye(depth) if flat else rng.normal(size=(depth, depth))
    quadratic = jacobian.T @ jacobian
    return Evidence(
        depth,
        *(matrix() for _ in range(6)),
        gates=GateEvidence(vector, -vector, quadratic),
        loss=lambda gates: float(vector @ (1 - gates) + (1 - gates) @ quadratic @ (1 - gates)),
        healed_loss=lambda gates: float(vector @ (1 - gates)),
        period=period,
        protected=frozenset(protected),
    )


def everyone(values=tuple(CRITERIA)):
    return pytest.mark.parametrize("criterion", values)


# --- one contract for all criteria


@everyone()
@pytest.mark.parametrize("unread_last_state", [False, True])
@pytest.mark.parametrize(
    ("remove", "period", "protected"),
    [(0, 1, ()), (3, 1, ()), (3, 1, (2, 6)), (2, 2, ()), (4, 2, (0,)), (4, 4, (0,)), (6, 1, (0,))],
)
def test_criterion_removes_exactly_what_it_may(criterion, remove, period, protected, unread_last_state):
    evidence = measured(period=period, protected=protected, unread_last_state=unread_last_state)
    choice = select(criterion, evidence, remove=remove)
    assert len(choice.removed) == remove
    assert list(choice.keep) == sorted(set(range(8)) - set(choice.removed))
    assert list(choice.removed) == sorted(set(choice.removed))
    assert not set(choice.removed) & set(protected)
    assert obeys_period(choice.removed, period)
    assert choice.scores.shape == (8,)
    assert all(type(block) is int for block in choice.keep + choice.removed)
    json.dumps(choice.to_json(), allow_nan=False)


@everyone()
def test_criterion_is_deterministic(criterion):
    first, second = (select(criterion, measured(), remove=3, seed=5) for _ in range(2))
    assert first.removed == second.removed
    assert first.detail == second.detail
    np.testing.assert_array_equal(first.scores, second.scores)


@everyone(sorted(set(CRITERIA) - {"random"}))
def test_criterion_breaks_ties_alike_whatever_the_seed(criterion):
    choices = {select(criterion, measured(flat=True, period=2), remove=4, seed=seed).removed for seed in range(3)}
    assert len(choices) == 1


@everyone(["clp", "jumps", "gateprobe", "gauss-newton", "greedy", "cosine", "mse", "residual", "first"])
def test_scores_are_higher_for_what_goes_first(criterion):
    choice = select(criterion, measured(depth=6, seed=3), remove=1)
    assert choice.removed == (int(np.nanargmax(choice.scores)),)


@everyone()
@pytest.mark.parametrize(("remove", "message"), [(-1, "give 0 to 7"), (8, "at least one block stays")])
def test_criterion_rejects_impossible_counts(criterion, remove, message):
    with pytest.raises(InputError, match=message):
        select(criterion, measured(), remove=remove)


@everyone()
def test_criterion_rejects_what_period_and_protection_forbid(criterion):
    with pytest.raises(InputError, match=r"period 2 .* remove 2 or 4 instead of 3"):
        select(criterion, measured(period=2), remove=3)
    with pytest.raises(InputError, match="leave no room to remove 4"):
        select(criterion, measured(period=2, protected={1, 4, 6}), remove=4)


@everyone(sorted(set(CRITERIA) - {"first", "random"}))
def test_criterion_without_its_evidence_is_not_available(criterion):
    blank = Evidence.unmeasured(8)
    assert criterion in available(measured())
    assert criterion not in available(blank)
    with pytest.raises(InputError, match="possible here: first, random"):
        select(criterion, blank, remove=2)
    with pytest.raises(InputError, match="was not measured"):
        CRITERIA[criterion](blank, remove=2)


def test_select_names_the_criteria_it_knows():
    with pytest.raises(InputError, match="no criterion 'cka'; choose one of clp, jumps"):
        select("cka", measured(), remove=1)


# --- feasible sets


@property_test
@given(st.integers(1, 9), st.integers(0, 8), st.integers(1, 4), st.sets(st.integers(0, 8)))
def test_all_sets_and_count_agree_with_brute_force(depth, remove, period, protected):
    assume(remove <= depth)
    allowed = ~np.isin(np.arange(depth), list(protected))
    expected = feasible_sets(depth, remove, period, protected)
    assert count_sets(allowed, remove, period) == len(expected)
    if remove % period == 0:
        found = [tuple(np.flatnonzero(row).tolist()) for row in all_sets(allowed, remove, period)]
        assert found == expected


@property_test
@given(st.lists(st.integers(-9, 9), min_size=2, max_size=9), st.integers(1, 3), st.data())
def test_cheapest_set_is_the_cheapest(costs, period, data):
    remove = data.draw(st.integers(0, len(costs) - 1).filter(lambda k: k % period == 0))
    unknown = data.draw(st.sets(st.integers(0, len(costs) - 1), max_size=2))
    cost = np.array([np.nan if block in unknown else value for block, value in enumerate(costs)], np.float64)
    sets = feasible_sets(len(costs), remove, period, unknown)
    if not sets:
        with pytest.raises(InputError, match="remove fewer"):
            cheapest_set(cost, remove, period)
        return
    found = cheapest_set(cost, remove, period)
    assert found in sets
    assert cost[list(found)].sum() == min(cost[list(chosen)].sum() for chosen in sets)


def test_random_set_reaches_every_set_equally_often():
    allowed = np.arange(7) != 3
    sets = feasible_sets(7, 4, 2, {3})
    rng = np.random.default_rng(0)
    draws = [random_set(rng, allowed, 4, 2) for _ in range(400)]
    counts = [draws.count(chosen) for chosen in sets]
    assert sum(counts) == 400
    # Five standard deviations of a binomial count.
    share = 1 / len(sets)
    assert np.abs(np.array(counts) - 400 * share).max() < 5 * math.sqrt(400 * share * (1 - share))


# --- clp

# Removed blocks as published (depth, period, blocks), and blocks that are similar but must stay.
PUBLISHED = {
    "pi0": (18, 1, [1, 2, 4, 6, 8, 9], []),
    "groot_vlm": (12, 1, [3, 4, 5, 6, 7, 8, 9], []),
    "groot_vlsa": (4, 1, [2], []),
    "groot_dit": (16, 2, [1, 2, 4, 5, 6, 7, 10, 11], [9, 13]),
    "smolvla": (16, 2, [1, 2, 5, 6, 14, 15], [4, 12]),
}


def published_profile(depth, removed, tempting):
    """Adjacent CKA that implies a published list: twins near 1, some lone similar blocks, the embedding most of all."""
    profile = 0.80 + 0.05 * np.cos(np.arange(depth))
    profile[removed] = 0.970 + 0.002 * np.arange(len(removed))
    profile[tempting] = 0.975
    profile[0] = 0.999
    return profile


@pytest.mark.parametrize("tower", PUBLISHED)
def test_clp_reproduces_the_published_lists(tower):
    depth, period, removed, tempting = PUBLISHED[tower]
    similarity = chain(published_profile(depth, removed, tempting))
    choice = clp(Evidence(depth, similarity, 1 - similarity, period=period), remove=len(removed))
    assert list(choice.removed) == removed


def test_clp_reports_the_runs_of_pi0():
    depth, _, removed, _ = PUBLISHED["pi0"]
    similarity = chain(published_profile(depth, removed, []))
    choice = clp(Evidence(depth, similarity, 1 - similarity), remove=6)
    assert choice.detail["tau"] == pytest.approx(0.970)
    assert choice.detail["runs"] == [
        {"anchor": 0, "twins": [1, 2]},
        {"anchor": 3, "twins": [4]},
        {"anchor": 5, "twins": [6]},
        {"anchor": 7, "twins": [8, 9]},
    ]
    assert np.isnan(choice.scores[0])


def test_without_the_period_clp_would_take_the_lone_similar_blocks():
    depth, _, removed, tempting = PUBLISHED["groot_dit"]
    similarity = chain(published_profile(depth, removed, tempting))
    choice = clp(Evidence(depth, similarity, 1 - similarity), remove=len(removed))
    assert set(tempting) <= set(choice.removed)


@property_test
@given(st.lists(st.floats(0.01, 1.0), min_size=2, max_size=9), st.data())
def test_clp_is_the_top_k_of_adjacent_similarity(profile, data):
    remove = data.draw(st.integers(0, len(profile) - 1))
    similarity = chain(profile)
    choice = clp(Evidence(len(profile), similarity, 1 - similarity), remove=remove)
    assert 0 not in choice.removed
    assert sorted(profile[block] for block in choice.removed) == sorted(profile[1:])[len(profile) - 1 - remove :]


@property_test
@given(st.lists(st.floats(0.01, 1.0), min_size=3, max_size=9), st.data())
def test_literal_anchor_keeps_the_first_block_of_every_run(profile, data):
    remove = data.draw(st.integers(1, len(profile) - 2))
    similarity = chain(profile)
    choice = clp(Evidence(len(profile), similarity, 1 - similarity), remove=remove, anchor="literal")
    tau = choice.detail["tau"]
    twins = {block for block in range(1, len(profile)) if profile[block] >= tau}
    pool = {block for block in twins if block - 1 in twins}
    assert set(choice.removed) <= pool
    assert 1 not in choice.removed
    assert min(profile[block] for block in choice.removed) >= max(
        [profile[b] for b in pool - set(choice.removed)] + [0]
    )
    # One threshold higher, the pool would have been too small.
    higher = {block for block in twins if profile[block] > tau}
    assert len({block for block in higher if block - 1 in higher}) < remove


def test_literal_anchor_says_when_the_pool_cannot_grow():
    with pytest.raises(InputError, match=r"leaves only 6 twins that may go, not 7 \(anchor 'literal'"):
        clp(measured(), remove=7, anchor="literal")


@pytest.mark.parametrize("anchor", ["predecessor", "literal"])
def test_threshold_removes_the_whole_pool(anchor):
    profile = [0.99, 0.97, 0.98, 0.5, 0.96, 0.6, 0.99, 0.95]
    similarity = chain(profile)
    evidence = Evidence(8, similarity, 1 - similarity)
    count = pool_size(evidence, 0.95, anchor=anchor)
    expected = {"predecessor": (1, 2, 4, 6, 7), "literal": (2, 7)}[anchor]
    assert clp(evidence, remove=count, anchor=anchor).removed == expected


def test_clp_lowers_tau_until_a_set_obeys_the_period():
    similarity = chain([0.5, 0.99, 0.2, 0.98, 0.2, 0.7, 0.6, 0.3])
    choice = clp(Evidence(8, similarity, 1 - similarity, period=2), remove=2)
    assert choice.removed == (5, 6)
    assert choice.detail["tau"] == 0.6


# --- jumps


@property_test
@given(st.integers(1, 8), st.integers(1, 3), st.sets(st.integers(0, 7), max_size=2), st.integers(0, 10_000))
def test_jump_table_is_exact_for_every_size(depth, period, protected, seed):
    rng = np.random.default_rng(seed)
    damage = rng.uniform(-0.1, 1.0, (depth + 1, depth + 1)) ** rng.integers(1, 4)
    damage[rng.random(damage.shape) < 0.2] = np.nan
    protected = frozenset(block for block in protected if block < depth)
    evidence = Evidence(depth, damage, damage, period=period, protected=protected)
    assume(evidence.has("damage"))
    table = jump_table(evidence, up_to=depth - 1)
    for remove in range(depth):
        costs = [
            sum(damage[run] for run in runs_of(chosen)) for chosen in feasible_sets(depth, remove, period, protected)
        ]
        best = min([cost for cost in costs if not np.isnan(cost)], default=np.inf)
        assert table.costs[remove] == pytest.approx(best, abs=SUM_ATOL)
        if np.isfinite(best):
            made = table.jumps(remove)
            assert sum(end - start for start, end in made) == remove
            assert all(after[0] > before[1] for before, after in itertools.pairwise(made))
            assert sum(damage[jump] for jump in made) == pytest.approx(best, abs=SUM_ATOL)


def test_jumps_prefers_two_short_jumps_when_damage_compounds():
    states = np.arange(7.0)
    damage = (states[:, None] - states) ** 2 / 100
    assert len(runs_of(jumps(Evidence(6, 1 - damage, damage), remove=3).removed)) == 3


def test_jumps_does_not_jump_to_a_state_it_knows_nothing_about():
    evidence = measured(unread_last_state=True)
    assert 7 not in jumps(evidence, remove=7).removed


def test_jumps_says_when_no_removal_is_known():
    damage = np.full((4, 4), np.nan)
    damage[0, 1] = 0.1
    with pytest.raises(InputError, match="no set of 2 blocks has known damages"):
        jumps(Evidence(3, damage, damage), remove=2)


def test_jumps_reports_its_way():
    choice = jumps(measured(), remove=3)
    assert sum(end - start for start, end, _ in choice.detail["jumps"]) == 3
    assert sum(cost for _, _, cost in choice.detail["jumps"]) == pytest.approx(choice.predicted_cost)
    assert choice.detail["costs"][0] == 0.0
    assert choice.detail["costs"][3] == choice.predicted_cost


def test_knee_finds_the_bend():
    assert knee(np.array([0, 1, 2, 3, 13, 23, 33.0]), limit=6) == 3
    # Half of the depth by default; sizes that the period forbids are passed over.
    assert knee(np.array([0, np.inf, 0.1, np.inf, 5, np.inf, 6, np.inf])) == 2


@pytest.mark.parametrize("costs", [[0, 1, 2, 3, 4], [0, 3, 5, 6, 6.5], [0, 1], [0, np.inf, np.inf], [0, 0, 0, 0]])
def test_knee_is_nought_without_a_bend(costs):
    assert knee(np.array(costs, np.float64), limit=4) == 0


# --- gates


@pytest.mark.parametrize(("period", "protected"), [(1, ()), (1, (2,)), (2, ()), (2, (3,))])
def test_gauss_newton_is_exact(period, protected):
    evidence = measured(depth=7, period=period, protected=protected)
    gradient, quadratic = evidence.gates.gradient, evidence.gates.gauss_newton

    def change(removed):
        gone = np.isin(np.arange(7), removed).astype(float)
        return -gradient @ gone + gone @ quadratic @ gone / 2

    choice = gauss_newton(evidence, remove=4)
    best = min(feasible_sets(7, 4, period, set(protected)), key=change)
    assert choice.removed == best
    assert choice.predicted_cost == pytest.approx(change(best))
    assert choice.detail["search"] == "exact"


def test_gauss_newton_predicts_the_change_of_a_quadratic_loss():
    # L(alpha) = |A (alpha - c)|^2, so g = 2 A^T A (1 - c) and Q = 2 A^T A.
    rng = np.random.default_rng(1)
    a, c = rng.normal(size=(6, 6)), rng.normal(size=6)
    quadratic = 2 * a.T @ a

    def loss(alpha):
        return float(np.sum((a @ (alpha - c)) ** 2))

    evidence = Evidence(6, np.eye(7), np.eye(7), gates=GateEvidence(None, quadratic @ (1 - c), quadratic), loss=loss)
    choice = gauss_newton(evidence, remove=3)
    gates = np.isin(np.arange(6), choice.keep).astype(float)
    assert choice.predicted_cost == pytest.approx(loss(gates) - loss(np.ones(6)))
    alone = [loss(1.0 - np.eye(6)[block]) - loss(np.ones(6)) for block in range(6)]
    np.testing.assert_allclose(-choice.scores, alone)


@pytest.mark.parametrize("period", [1, 2])
def test_gauss_newton_searches_when_there_are_too_many_sets(monkeypatch, period):
    evidence = measured(depth=8, period=period, protected={0})
    exact = gauss_newton(evidence, remove=4)
    monkeypatch.setattr(gates_module, "EXACT_LIMIT", 0)
    searched = gauss_newton(evidence, remove=4)
    assert searched.detail["search"] == "beam+swap"
    assert obeys_period(searched.removed, period)
    assert 0 not in searched.removed
    assert searched.predicted_cost >= exact.predicted_cost - SUM_ATOL


def test_a_wide_beam_or_swaps_repair_what_greedy_gets_wrong():
    # Alone, block 0 is cheapest; but with it gone, neither 1 nor 2 can go cheaply. The best pair is (1, 2).
    quadratic = np.array([[1.0, 3.0, 3.0], [3.0, 1.1, 0.0], [3.0, 0.0, 1.1]])

    def found(**options):
        mask, _ = descend(lambda sets: ((sets @ quadratic) * sets).sum(1), np.ones(3, bool), 2, 1, **options)
        return np.flatnonzero(mask).tolist()

    assert found(swap=False) == [0, 1]
    assert found(swap=True) == [1, 2]
    assert found(swap=False, beam=2) == [1, 2]


def test_gauss_newton_leaves_blocks_that_it_knows_nothing_about():
    evidence = measured(depth=4)
    gradient, quadratic = evidence.gates.gradient.copy(), evidence.gates.gauss_newton.copy()
    gradient[1] = quadratic[1] = quadratic[:, 1] = np.nan
    evidence = Evidence(4, np.eye(5), np.eye(5), gates=GateEvidence(None, gradient, quadratic))
    assert gauss_newton(evidence, remove=3).removed == (0, 2, 3)
    quadratic[0, 2] = np.nan  # seen by the evidence, too: it holds the same array
    with pytest.raises(InputError, match="unknown between blocks"):
        gauss_newton(evidence, remove=2)


def test_gateprobe_keeps_what_the_loss_feels():
    sensitivity = np.array([0.3, 0.1, 0.5, 0.2])
    evidence = Evidence(4, np.eye(5), np.eye(5), gates=GateEvidence(sensitivity))
    choice = select("gateprobe", evidence, remove=2)
    assert choice.removed == (1, 3)
    assert choice.predicted_cost == pytest.approx(0.3)


def test_greedy_follows_the_real_loss_step_by_step():
    evidence = measured(depth=6)
    removed = []
    for _ in range(3):
        rest = [block for block in range(6) if block not in removed]
        removed.append(min(rest, key=lambda block: evidence.loss(1.0 - np.isin(np.arange(6), [*removed, block]))))
    choice = greedy(evidence, remove=3)
    assert choice.removed == tuple(sorted(removed))
    after = evidence.loss(np.isin(np.arange(6), choice.keep).astype(float))
    assert choice.predicted_cost == pytest.approx(after - evidence.loss(np.ones(6)))


def test_greedy_never_measures_a_set_twice():
    seen = []

    def loss(gates):
        seen.append(tuple(gates))
        return float(np.arange(1.0, 7.0) @ (1 - gates))

    choice = greedy(Evidence(6, np.eye(7), np.eye(7), loss=loss), remove=3, swap=True)
    assert choice.removed == (0, 1, 2)
    assert len(seen) == len(set(seen)) == choice.detail["evaluations"]
    assert set(itertools.chain(*seen)) == {0.0, 1.0}


def test_greedy_with_swaps_ends_no_worse():
    for seed in range(5):
        evidence = measured(depth=6, seed=seed)
        plain, swapped = greedy(evidence, remove=3), greedy(evidence, remove=3, swap=True)
        assert swapped.predicted_cost <= plain.predicted_cost


def test_greedy_survives_a_diverging_loss_and_rejects_a_broken_model():
    evidence = Evidence(3, np.eye(4), np.eye(4), loss=lambda gates: float("nan") if gates[0] == 0 else 1.0)
    assert greedy(evidence, remove=2).removed == (1, 2)
    with pytest.raises(InputError, match="full model is not finite"):
        greedy(Evidence(3, np.eye(4), np.eye(4), loss=lambda gates: float("nan")), remove=1)


# --- baselines


def test_angular_removes_the_run_with_the_smallest_angle():
    evidence = measured()
    begin = min(range(6), key=lambda state: evidence.angle[state, state + 3])
    choice = select("angular", evidence, remove=3)
    assert choice.removed == tuple(range(begin, begin + 3))
    assert choice.predicted_cost == evidence.angle[begin, begin + 3]


def test_angular_says_when_no_run_is_possible():
    with pytest.raises(InputError, match="no run of 4 blocks is unprotected"):
        select("angular", measured(protected={2, 5}), remove=4)


def test_first_keeps_the_first_and_may_protect_the_last():
    assert select("first", Evidence.unmeasured(6), remove=2).keep == (0, 1, 2, 3)
    assert select("first", Evidence.unmeasured(6, protected=frozenset({5})), remove=2).keep == (0, 1, 2, 5)


def test_random_depends_on_the_seed():
    assert len({select("random", Evidence.unmeasured(12), remove=6, seed=seed).removed for seed in range(8)}) > 1


@pytest.mark.parametrize(("criterion", "sign"), [("cosine", 1), ("mse", -1), ("residual", -1)])
def test_adjacent_baselines_rank_by_their_own_matrix(criterion, sign):
    evidence = measured()
    own = np.diagonal(getattr(evidence, criterion), 1)
    choice = select(criterion, evidence, remove=3)
    assert choice.removed == tuple(sorted(np.argsort(-sign * own)[:3].tolist()))


# --- evidence


def test_evidence_checks_its_shapes():
    with pytest.raises(InputError, match=r"similarity of a tower of 3 blocks has shape \(4, 4\), not \(3, 3\)"):
        Evidence(3, np.eye(3), np.eye(3))
    with pytest.raises(InputError, match=r"gradient of a tower of 3 blocks has shape \(3,\), not \(4,\)"):
        Evidence(3, np.eye(4), np.eye(4), gates=GateEvidence(gradient=np.zeros(4)))
    with pytest.raises(InputError, match="cannot protect block 3"):
        Evidence.unmeasured(3, protected=frozenset({3}))
    with pytest.raises(InputError, match="period 0"):
        Evidence.unmeasured(3, period=0)


def towers():
    vlm = np.array([[1.0, 0.6, np.nan], [0.6, 1.0, np.nan], [np.nan, np.nan, np.nan]])
    action = np.array([[1.0, 0.9, 0.3], [0.9, 1.0, 0.5], [0.3, 0.5, 1.0]])
    return {
        "vlm": Evidence(2, vlm, 1 - vlm, cosine=vlm, protected=frozenset({0}), period=2),
        "action": Evidence(2, action, 1 - action, cosine=action, mse=1 - action, period=3),
    }


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.75, 0.5]),
        ({"weights": {"vlm": 1.0, "action": 3.0}}, [0.825, 0.5]),
        ({"how": "min"}, [0.6, 0.5]),
        ({"how": "vlm"}, [0.6, np.nan]),
        ({"how": "action"}, [0.9, 0.5]),
    ],
)
def test_combine_lets_the_tower_that_knows_decide(options, expected):
    both = combine(towers(), **options)
    np.testing.assert_allclose(both.adjacent("similarity"), expected)
    np.testing.assert_allclose(both.adjacent("damage"), 1 - np.array(expected))
    np.testing.assert_allclose(both.adjacent("cosine"), expected)
    assert both.protected == {0}
    assert both.period == 6


def test_combine_takes_the_matrices_that_any_tower_has():
    both = combine(towers())
    np.testing.assert_allclose(both.adjacent("mse"), [0.1, 0.5])
    assert both.angle is None


@pytest.mark.parametrize(
    ("parts", "options", "message"),
    [
        ({}, {}, "no tower to combine"),
        ({"a": Evidence.unmeasured(2), "b": Evidence.unmeasured(3)}, {}, "different depths"),
        ({"a": Evidence.unmeasured(2)}, {"how": "max"}, "give 'mean', 'min' or one of a"),
        ({"a": Evidence.unmeasured(2)}, {"how": "min", "weights": {"a": 1.0}}, "weights are for 'mean'"),
        ({"a": Evidence.unmeasured(2)}, {"weights": {"b": 1.0}}, "one weight above 0 to each of a"),
        ({"a": Evidence.unmeasured(2)}, {"weights": {"a": 0.0}}, "one weight above 0 to each of a"),
        ({"a": measured(2)}, {}, "measure them for the group"),
    ],
)
def test_combine_rejects_what_does_not_belong_together(parts, options, message):
    with pytest.raises(InputError, match=message):
        combine(parts, **options)


# --- depth


@pytest.mark.parametrize(
    ("options", "period", "expected"),
    [
        ({"keep_layers": 12}, 1, 6),
        ({"keep_layers": 18}, 1, 0),
        ({"keep_ratio": 1.0}, 1, 0),
        ({"keep_ratio": 0.5}, 1, 9),
        ({"keep_ratio": 0.6}, 1, 7),  # 10.8 blocks: 11 stay
        ({"keep_ratio": 0.6}, 2, 6),
        ({"keep_ratio": 0.01}, 1, 17),
        ({"keep_ratio": 7 / 18}, 1, 11),
    ],
)
def test_how_many_by_number_or_share(options, period, expected):
    assert how_many(Evidence.unmeasured(18, period=period), **options) == expected


def test_how_many_is_not_fooled_by_rounding():
    assert 0.28 * 25 > 7
    assert how_many(Evidence.unmeasured(25), keep_ratio=0.28) == 18


def test_how_many_by_threshold_is_the_pool_of_clp():
    evidence = measured()
    threshold = 0.5
    assert how_many(evidence, threshold=threshold) == int((np.diagonal(evidence.similarity, 1)[1:] >= threshold).sum())
    period_2 = Evidence(4, chain([0.9, 0.9, 0.9, 0.9]), np.eye(5), period=2)
    assert how_many(period_2, threshold=0.9) == 2


def test_how_many_by_the_knee_of_the_costs():
    damage = np.full((9, 9), 5.0)
    for block in (2, 5, 7):
        damage[block, block + 1] = 0.01
    assert how_many(Evidence(8, 1 - damage, damage), auto=True) == 3
    with pytest.raises(InputError, match=r"without a knee.* say how many are to stay"):
        how_many(measured(flat=True, depth=3), auto=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "given: none"),
        ({"keep_layers": 3, "auto": True}, "given: keep_layers and auto"),
        ({"keep_layers": 0}, "cannot keep 0 of 8 blocks"),
        ({"keep_layers": 9}, "cannot keep 9 of 8 blocks"),
        ({"keep_ratio": 0.0}, "share of blocks to keep is 0.0"),
        ({"keep_ratio": 1.1}, "share of blocks to keep is 1.1"),
        ({"threshold": 0.0}, "CKA threshold is 0.0"),
        ({"threshold": 1.01}, "CKA threshold is 1.01"),
    ],
)
def test_how_many_takes_one_sensible_wish(options, message):
    with pytest.raises(InputError, match=message):
        how_many(measured(), **options)


# --- bootstrap


def clusters(count=12, states=4, seed=0):
    """HSIC sums of clusters: Gram matrices, so every CKA is between -1 and 1."""
    factors = np.random.default_rng(seed).normal(size=(count, states, 6)) + 1.0
    return factors @ factors.transpose(0, 2, 1)


def point_cka(hsic):
    own = np.sqrt(np.diagonal(hsic))
    return hsic / np.outer(own, own)


def test_interval_surrounds_the_estimate_and_shrinks_with_more_clusters():
    few, many = clusters(6), clusters(400)
    low, high = cka_interval(many, resamples=200)
    estimate = point_cka(many.sum(0))
    assert (low <= estimate + SUM_ATOL).all()
    assert (high >= estimate - SUM_ATOL).all()
    np.testing.assert_allclose(np.diagonal(low), 1.0)
    wide_low, wide_high = cka_interval(few, resamples=200)
    assert (high - low).max() < (wide_high - wide_low).max()


def test_interval_agrees_with_resampling_one_at_a_time():
    hsic = clusters(5)
    rng = np.random.default_rng(1)
    slow = [point_cka(hsic[rng.integers(0, 5, 5)].sum(0)) for _ in range(3000)]
    expected = np.quantile(slow, [0.05, 0.95], axis=0)
    # Monte Carlo error of a 5% quantile from 3000 draws each, in units of the spread of CKA here (about 0.1).
    np.testing.assert_allclose(cka_interval(hsic, resamples=3000, level=0.9), expected, atol=0.02)


def test_interval_is_unknown_for_a_state_without_variance():
    hsic = clusters()
    hsic[:, 1] = hsic[:, :, 1] = 0.0
    interval = cka_interval(hsic, resamples=50)
    assert np.isnan(interval[:, 1]).all()
    assert np.isfinite(interval[:, 0, 2]).all()


def test_towers_are_resampled_together():
    one, other = clusters(seed=1), clusters(seed=2)
    both = np.stack([one, other], axis=1)
    separate = np.stack([cka_interval(one, resamples=40), cka_interval(other, resamples=40)], axis=1)
    np.testing.assert_allclose(cka_interval(both, resamples=40), separate)
    times = stability(np.stack([one, one], axis=1), lambda cka: [int((cka[0] == cka[1]).all())], resamples=40)
    np.testing.assert_array_equal(times, [0, 1, 0])


def test_bootstrap_is_deterministic_across_chunks():
    np.testing.assert_array_equal(cka_interval(clusters(), resamples=300), cka_interval(clusters(), resamples=300))


def test_stability_tells_a_clear_choice_from_a_toss_up():
    shared = np.random.default_rng(0).normal(size=(30, 4, 5))
    shared[:, 2] = shared[:, 1]  # block 1 changes nothing, the other two are alike
    hsic = shared @ shared.transpose(0, 2, 1)

    def most_similar(cka):
        return clp(Evidence(3, cka, 1 - cka), remove=1).removed

    np.testing.assert_array_equal(stability(hsic, most_similar, resamples=40), [0, 1, 0])
    random = stability(clusters(4), lambda cka: [int(cka[0, 1] < cka[1, 2])], resamples=300)
    assert random.sum() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cka_interval(clusters(1)), "two or more episodes"),
        (lambda: cka_interval(clusters(), resamples=0), "cannot draw 0 resamples"),
        (lambda: cka_interval(clusters(), level=1.0), "confidence level is 1.0"),
    ],
)
def test_bootstrap_rejects_what_has_no_spread(call, message):
    with pytest.raises(InputError, match=message):
        call()


# --- healed


def test_healed_takes_what_does_best_once_healed_and_says_what_it_tried():
    asked = []

    def loss(gates):
        asked.append(gates)
        return float("nan") if gates[0] == 0 else float(gates[1::2].sum())

    evidence = dataclasses.replace(measured(), healed_loss=loss)
    choice = select("healed", evidence, remove=3)
    tried = {tuple(cut["removed"]): cut["loss"] for cut in choice.detail["tried"]}
    assert len(asked) == len(tried), "a cut that several propose is healed once"
    assert choice.removed == next(iter(tried))
    known = [loss for loss in tried.values() if loss is not None]
    assert choice.predicted_cost == known[0] == min(known)
    assert list(tried.values()) == known + [None] * (len(tried) - len(known)), "best first, broken ones last"
    assert tried == {cut: loss(np.where(np.isin(np.arange(8), cut), 0.0, 1.0)) if cut[0] else None for cut in tried}


def test_healed_also_tries_cuts_without_long_runs():
    states = np.arange(9)
    flat_end = np.where((states[:, None] >= 3) & (states[None] >= 3), 1e-3, 1.0) * np.abs(states[:, None] - states)
    evidence = Evidence(8, 1 - flat_end, flat_end, healed_loss=lambda gates: float(max_run(gates)))
    assert max_run(np.isin(np.arange(8), jumps(evidence, remove=4).keep)) > 1
    assert max_run(np.isin(np.arange(8), select("healed", evidence, remove=4).keep)) == 1


def max_run(stays):
    """Length of the longest run of removed blocks."""
    return max(end - start for start, end in runs_of([i for i in range(len(stays)) if not stays[i]]))


def test_healed_asks_nothing_where_there_is_one_cut_only():
    evidence = Evidence(3, *np.full((2, 4, 4), np.nan), healed_loss=None, protected=frozenset([0, 1]))
    evidence = dataclasses.replace(evidence, healed_loss=lambda gates: pytest.fail("healed"))
    assert select("healed", evidence, remove=1).removed == (2,)
