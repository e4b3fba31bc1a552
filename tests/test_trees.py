"""Named paths, two-sided differences and rules over names."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clp_jax import trees
from clp_jax.errors import InputError

NAMES = st.text("abc_.1", min_size=1, max_size=4)
TREES = st.recursive(st.integers(), lambda inner: st.dictionaries(NAMES, inner, min_size=1, max_size=3), max_leaves=12)


@hypothesis.given(st.dictionaries(NAMES, TREES, max_size=4))
def test_unflatten_undoes_flatten(tree):
    assert trees.unflatten(trees.flatten(tree)) == tree


def test_flatten_keeps_the_order_of_the_tree():
    assert list(trees.flatten({"b": {"z": 1, "a": 2}, "a": 3})) == ["b/z", "b/a", "a"]


@pytest.mark.parametrize("tree", [{"a/b": 1}, {"a": {"": 1}}, {"a": {0: 1}}, {"a": {}}])
def test_flatten_refuses_what_a_path_cannot_name(tree):
    with pytest.raises(InputError, match="the tree holds"):
        trees.flatten(tree)


@pytest.mark.parametrize("flat", [{"a": 1, "a/b": 2}, {"a/b": 2, "a": 1}, {"a/b": 1, "a/b/c/d": 2}])
def test_unflatten_refuses_a_leaf_that_is_also_a_group(flat):
    with pytest.raises(InputError, match="both a parameter and a group"):
        trees.unflatten(flat)


def test_difference_names_every_path_from_both_sides():
    expected = {"w": np.zeros((18, 4)), "only_here": np.zeros(3), "same": np.zeros(2)}
    got = {"w": np.zeros((9, 4)), "only_there": jax.ShapeDtypeStruct((5,), jnp.bfloat16), "same": np.zeros(2)}
    assert trees.difference(expected, got) == [
        "only_here: expected float64[3], got nothing",
        "only_there: expected nothing, got bfloat16[5]",
        "w: expected float64[18, 4], got float64[9, 4]",
    ]


def test_difference_compares_dtypes_when_asked():
    a, b = {"w": np.zeros(2, np.float32)}, {"w": np.zeros(2, np.float64)}
    assert trees.difference(a, b) == []
    assert trees.difference(a, b, dtypes=True) == ["w: expected float32[2], got float64[2]"]


def test_check_same_structure_lists_all_differences():
    with pytest.raises(InputError, match=r"(?s)the demo do not fit, 2 paths differ:.*  a: .*  b: "):
        trees.check_same_structure({"a": np.zeros(2), "b": np.zeros(3)}, {"a": np.zeros(3)}, what="the demo")
    trees.check_same_structure({"a": np.zeros(2)}, {"a": jax.ShapeDtypeStruct((2,), np.float32)}, what="the demo")


def test_abstract_keeps_shapes_and_dtypes_only():
    tree = {"a": {"w": jnp.zeros((2, 3), jnp.bfloat16)}}
    assert trees.abstract(tree) == {"a": {"w": jax.ShapeDtypeStruct((2, 3), jnp.bfloat16)}}


def test_assign_takes_the_first_rule_that_matches_the_whole_path():
    rules = [("a/.*", 1), ("a", 2), (".*", 3)]
    assert trees.assign(rules, ["a/b", "a", "xa"]) == {"a/b": 1, "a": 2, "xa": 3}


@pytest.mark.parametrize(
    ("rules", "paths", "message"),
    [([("a", 1)], ["a", "b"], "no rule matches 'b'"), ([(".*", 1), ("a", 2)], ["a"], r"match no path.*\['a'\]")],
)
def test_assign_refuses_a_path_without_rule_and_a_rule_without_path(rules, paths, message):
    with pytest.raises(InputError, match=message):
        trees.assign(rules, paths)
