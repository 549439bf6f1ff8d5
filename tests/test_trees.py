"""Tests for what pytrees go through: typing, choosing leaves, counting."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import stablegrad as sg
from stablegrad import _trees
from stablegrad._norms import measure

PARAMS = {"w": jnp.array([1.0, 2.0])}


def test_an_inner_state_is_strongly_typed_so_that_no_step_retraces():
    inner = optax.GradientTransformation(
        lambda params: {"number": jnp.asarray(0.0)},  # Weakly typed.
        lambda updates, state, params=None: (updates, state),
    )
    state = sg.guard(inner).init(PARAMS)
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(state))


def test_the_tree_given_as_like_says_which_leaves_count():
    floats = {"a": jnp.ones(2), "n": jnp.ones(2)}
    like = {"a": jnp.ones(2), "n": jnp.ones(2, jnp.int32)}
    assert measure(floats, like=like).leaf_squares.shape == (1,)


def test_counters_stay_at_their_largest_instead_of_wrapping():
    top = jnp.int32(2**31 - 1)
    assert _trees.increment(top) == top


@pytest.mark.parametrize(
    "leaf", [len, "float32", np.float32, np.dtype("float32"), jax.nn.relu, None]
)
def test_what_is_no_array_or_number_is_not_floating_point(leaf):
    assert not _trees.is_inexact(leaf)


@pytest.mark.parametrize("leaf", [1.0, np.float16(1), 2j, jnp.ones(1, jnp.bfloat16)])
def test_arrays_and_numbers_are_floating_point_by_their_dtype(leaf):
    assert _trees.is_inexact(leaf)
    assert _trees.is_inexact(jax.eval_shape(lambda: leaf))


def test_a_field_called_value_keeps_its_name_and_a_variables_own_is_left_out():
    class Attention(eqx.Module):
        key: jax.Array
        value: jax.Array

    fields = Attention(jnp.ones(1), jnp.ones(1))
    assert _trees.leaf_names({"a": fields}) == ("a.key", "a.value")
    held = {"w": nnx.Param({"k": jnp.ones(1), "value": jnp.ones(1)})}
    names = _trees.leaf_names(held)
    assert names == ("w.k", "w.value")
    assert names == _trees.leaf_names(_trees.without_variables(held))


def test_leaves_whose_dotted_names_agree_have_different_names():
    one = jnp.ones(1)
    assert _trees.leaf_names({"a.b": one, "a": {"b": one}}) == ("a/b", "a.b")
    nested = {"a.b": {"c": one}, "a": {"b.c": one}, "d": {"e": one}}
    assert _trees.leaf_names(nested) == ("a/b.c", "a.b/c", "d.e")


def test_a_variable_is_replaced_by_all_that_it_holds():
    tree = {"none": nnx.Variable(None), "two": nnx.BatchStat((1, {"a": 2}))}
    assert _trees.without_variables(tree) == {"none": None, "two": (1, {"a": 2})}
