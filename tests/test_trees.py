"""Tests for what pytrees go through: typing, choosing leaves, counting."""

import jax
import jax.numpy as jnp
import optax

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
