"""Several depths of one model behind one server: which one answers, and that it answers as the cut model alone."""

import functools
import re
import weakref

import jax.numpy as jnp
import numpy as np
import pytest
import toys
from served import loaded, params, rows

from clp_jax.commands.evaluate_policy import identity
from clp_jax.cuts import WHOLE, names_of, rows_of, smaller
from clp_jax.errors import InputError
from clp_jax.evaluation.local import LocalPolicy
from clp_jax.models import Lengths
from clp_jax.serving.depths import ANY, Wish, models_of, pick, wish_of
from clp_jax.serving.policy import Policy
from clp_jax.serving.requests import ModelRequests
from clp_jax.trees import flatten, unflatten

ARCH = toys.architecture()
CUTS = (WHOLE, (("vlm", (0, 2)), ("action", (0, 2))))
NAMES = ["4", "2"]


def served(architecture, weights, **settings) -> Policy:
    requests = ModelRequests(architecture, Lengths(toys.HORIZON, toys.PROMPT))
    sizes = {"action_horizon": toys.HORIZON, "max_batch": 4, "num_steps": 2}
    return Policy(loaded(architecture, weights), requests, **sizes, **settings)


@pytest.fixture(scope="module")
def policy():
    made = served(ARCH, params(ARCH), cuts=CUTS)
    made.buckets = (4,)  # less to compile
    made.compile(4)
    return made


@functools.cache
def alone(cut) -> Policy:
    made = served(smaller(ARCH, cut), rows_of(ARCH, params(ARCH), cut))
    made.buckets = (4,)
    return made


def noise(seed):
    return np.random.default_rng(seed).standard_normal((toys.HORIZON, ARCH.action_dim)).astype(np.float32)


def test_each_request_of_a_batch_is_answered_by_its_depth_as_by_the_cut_model(policy):
    observations = [row | {"noise": noise(i)} for i, row in enumerate(rows(4))]
    asked = [{}, {"keep_layers": 2}, {"keep_layers": "4"}, {"keep_layers": np.int64(2)}]
    answers = policy.infer_batch([policy.prepare(one | more) for one, more in zip(observations, asked, strict=True)])
    assert [answer["keep_layers"] for answer in answers] == ["4", "2", "4", "2"]
    assert [answer["policy_timing"]["batch_size"] for answer in answers] == [2, 2, 2, 2]
    for observation, answer, cut in zip(observations, answers, [*CUTS, *CUTS], strict=True):
        expected = alone(cut).infer(observation)
        assert "keep_layers" not in expected
        np.testing.assert_allclose(answer["actions"], expected["actions"], rtol=1e-5, atol=1e-5)
    whole, half = (alone(cut).infer(observations[0])["actions"] for cut in CUTS)
    assert np.abs(whole - half).max() > 1e-2


def test_the_time_that_a_request_has_chooses_by_what_was_measured(policy, monkeypatch):
    times = policy._milliseconds[4]
    assert list(times) == NAMES == policy.metadata["keep_layers"] and min(times.values()) > 0
    assert policy.metadata["latency_ms"] == times
    monkeypatch.setitem(policy._milliseconds, 4, {"4": 30.0, "2": 20.0})
    observation = rows(1)[0]
    found = [policy.infer(observation | {"latency_ms": time})["keep_layers"] for time in (31, 30.0, np.float32(29), 1)]
    assert found == ["4", "4", "2", "2"]


def test_the_deepest_that_keeps_its_time_answers_in_whatever_order_depths_are_served_and_measured():
    blocks = {"9": 45, "18": 63, "12": 51}
    assert pick(Wish(milliseconds=35.0), {"9": 22.0, "18": 40.0, "12": 30.0}, blocks) == "12"
    assert pick(Wish(milliseconds=35.0), {"9": 31.0, "18": 40.0, "12": 30.0}, blocks) == "12"
    assert pick(ANY, {"9": 22.0, "18": 40.0}, blocks) == "9"


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        ({"keep_layers": 3}, "keep_layers is 3; served are 4, 2"),
        ({"keep_layers": [2]}, "served are 4, 2"),
        ({"keep_layers": np.zeros((2, 1))}, re.escape("keep_layers is [[0.] [0.]]; served are")),
        ({"keep_layers": 2, "latency_ms": 30}, "send one of them"),
        ({"latency_ms": 0}, "milliseconds above 0"),
        ({"latency_ms": np.nan}, "milliseconds above 0"),
        ({"latency_ms": "30"}, "latency_ms is '30'; send milliseconds above 0, as a number"),
        ({"noise": {"a": 1}}, "noise is a map; send an array"),
        ({"latency_ms": True}, "milliseconds above 0"),
        ({"latency_ms": [30, 40]}, "milliseconds above 0"),
        ({"latency_ms": [[30], [40, 50]]}, "milliseconds above 0"),
        ({"latency_ms": None}, "milliseconds above 0"),
        ({"keep_layers": {"vlm": 2}}, "keep_layers/vlm: keep_layers is one of 4, 2 and latency_ms a number"),
        ({"keep_layers": 2, "observation/latency_ms": {"most": 30}}, "neither is a map"),
    ],
)
def test_a_wish_that_cannot_be_had_is_said(policy, asked, complaint):
    with pytest.raises(InputError, match=complaint):
        policy.prepare(rows(1)[0] | asked)


@pytest.mark.parametrize("asked", [{"keep_layers": 4}, {"latency_ms": 30}])
def test_a_server_of_one_depth_refuses_to_choose(asked):
    with pytest.raises(InputError, match="clp serve --depths serves several"):
        alone(WHOLE).prepare(rows(1)[0] | asked)


def test_a_robots_own_key_of_that_name_is_no_wish():
    assert wish_of({"latency_ms": 3}, NAMES, used=("latency_ms",)) == ANY
    assert wish_of({"keep_layers/arm": 3}, NAMES, used=("keep_layers/arm",)) == ANY


def test_weights_that_depths_share_are_held_once():
    whole = loaded(ARCH, params(ARCH))
    models = models_of(whole, CUTS)
    assert models["4"] is whole
    full, half = flatten(whole.params), flatten(models["2"].params)
    own = {path for path, leaf in half.items() if leaf.shape != full[path].shape}
    assert own and all("/layers/" in path for path in own)


def test_what_no_depth_has_is_not_held():
    name, weights = "PaliGemma/llm/layers/mlp/linear", flatten(params(ARCH))
    weights[name] = jnp.asarray(weights[name])
    stacked = weakref.ref(weights[name])
    made = served(ARCH, unflatten(weights), cuts=CUTS[1:])
    del weights
    assert stacked() is None and list(made._models) == ["2"]


def test_an_evaluation_goes_on_when_a_server_of_several_depths_was_started_anew(policy, monkeypatch):
    before = identity(LocalPolicy(policy))
    monkeypatch.setitem(policy.metadata, "latency_ms", {"4": 30.0, "2": 20.0})
    assert identity(LocalPolicy(policy)) == before
    monkeypatch.setitem(policy.metadata, "keep_layers", NAMES[::-1])
    assert identity(LocalPolicy(policy)) != before


def test_a_server_tells_the_depth_of_the_model_that_answers(policy):
    cut = served(ARCH, params(ARCH), cuts=CUTS[1:])
    assert cut.metadata["depth"] == smaller(ARCH, CUTS[1]).depths != policy.metadata["depth"] == ARCH.depths
    assert identity(LocalPolicy(cut)) != identity(LocalPolicy(served(ARCH, params(ARCH))))


def test_names_tell_every_group_that_a_cut_changes():
    cut = (("vlm", (0, 2)), ("action", (0, 2)))
    assert names_of([WHOLE, cut], ARCH) == NAMES
    assert names_of([cut], ARCH) == ["2"]
