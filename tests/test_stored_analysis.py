"""``similarity.npz``: every damage is one line, whatever it claims."""

import json

import numpy as np
import pytest

from clp_jax.analysis import Analysis
from clp_jax.errors import InputError
from clp_jax.models.towers import Tower
from clp_jax.selection import GateEvidence
from clp_jax.similarity import TowerSimilarity

DEPTH = 3


@pytest.fixture
def file(tmp_path):
    """Two coupled towers, with derivatives."""
    square = np.full((DEPTH + 1, DEPTH + 1), 0.5, np.float32)
    four, ones = np.stack([square] * 4), np.ones(DEPTH + 1)
    measured = TowerSimilarity(four, square, square, square, square, ones, np.stack([four] * 2), ones > 0, 8)
    gates = GateEvidence(np.ones(DEPTH), np.ones(DEPTH), np.ones((DEPTH, DEPTH)))
    group, shape = ("vlm", "action"), (Tower("vlm", DEPTH), Tower("action", DEPTH, period=2, protected=frozenset([1])))
    analysis = Analysis("pi0", shape, (group,), dict.fromkeys(group, measured), {group: gates}, {"observations": 8})
    analysis.save(tmp_path / "similarity.npz")
    return tmp_path / "similarity.npz"


def refused(file, message):
    with pytest.raises(InputError, match=message) as caught:
        Analysis.load(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_what_was_saved_comes_back(file):
    found = Analysis.load(file)
    assert found.shape[1] == Tower("action", DEPTH, period=2, protected=frozenset([1]))
    np.testing.assert_array_equal(found.gates["vlm", "action"].gauss_newton, np.ones((DEPTH, DEPTH)))


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("vlm/cka", lambda x: x[:2], r"vlm/cka is float32 of shape \(2, 4, 4\)"),
        ("vlm/read", lambda x: x.astype(np.float32), "vlm/read is float32"),
        ("vlm/clusters", lambda x: x[:0], "vlm/clusters is"),
        ("action/mse", lambda x: x.astype("U9"), "action/mse is <U9"),
        ("action/mse", lambda x: None, "it lacks 'action/mse'"),
        ("gates/vlm+action/gradient", lambda x: x[:1], "gates/vlm.action/gradient is"),
        ("gates/x/gradient", lambda x: np.ones(3), "which no analysis has"),
        ("extra", lambda x: np.ones(3), "which no analysis has"),
        ("meta", lambda x: None, "it lacks 'meta'"),
        ("meta", lambda x: np.ones(3), "it lacks 'meta'"),
    ],
)
def test_an_array_of_another_form(file, key, change, message):
    with np.load(file) as archive:
        arrays = dict(archive)
    arrays[key] = change(arrays.get(key))
    np.savez(file, **{name: array for name, array in arrays.items() if array is not None})
    refused(file, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda head: [head], "'meta' must be an object"),
        (lambda head: head | {"schema": 2}, "it has schema 2"),
        (lambda head: head | {"depths": {"vlm": 10**12, "action": 3}}, "the depth of vlm is"),
        (lambda head: head | {"depths": {"vlm": "3", "action": 3}}, "the depth of vlm must be"),
        (lambda head: head | {"samples": {"other": 3}}, "there is no tower 'other'"),
        (lambda head: head | {"groups": [["vlm", 3]]}, "there is no tower 3"),
        (lambda head: head | {"groups": [[]]}, "a group is empty"),
        (lambda head: head | {"towers": {"vlm": {"period": 0}}}, "period of vlm is 0"),
        (lambda head: head | {"towers": {"vlm": {"protected": 1}}}, "protected of vlm is 1"),
        (lambda head: head | {"meta": {"x": float("nan")}}, "NaN is no JSON number"),
        (lambda head: {key: value for key, value in head.items() if key != "kind"}, "it lacks 'kind'"),
    ],
)
def test_a_description_that_cannot_be(file, change, message):
    with np.load(file) as archive:
        arrays = dict(archive)
    arrays["meta"] = np.array(json.dumps(change(json.loads(str(arrays["meta"])))))
    np.savez(file, **arrays)
    refused(file, message)


def test_a_claim_of_terabytes_asks_for_no_memory(file):
    content = file.read_bytes()
    with np.load(file) as archive:
        np.savez(file, **archive)
    content = file.read_bytes()
    assert b"'shape': (4, 4, 4)" in content
    file.write_bytes(content.replace(b"'shape': (4, 4, 4), }      ", b"'shape': (9999999, 9999999), }"[:30]))
    refused(file, "similarity.npz cannot be read")
