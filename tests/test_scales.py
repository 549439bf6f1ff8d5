"""Tests for the factors on leaves: combined, applied, and the norm that is left."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stablegrad._norms import measure
from stablegrad._scales import Scales, minimum, scale_leaves, scaled_norm, uniform

TREE = {
    "a": jnp.array([[3.0, 4.0], [1.0, 2.0]]),
    "b": jnp.array([12.0]),
    "n": jnp.array([7]),
}
ONE = jnp.ones(())
SCALES = {
    "uniform": uniform(0.5),
    "by leaf": Scales(jnp.array([0.25, 2.0])),
    "within": Scales(ONE, (jnp.array([[0.5, 0.1]]), ONE)),
    "within and all": Scales(jnp.array(0.5), (jnp.array([[0.5, 0.1]]), ONE)),
}
every = pytest.mark.parametrize("name", SCALES)
# The factors of each leaf's elements, written out.
FACTORS = {
    "uniform": (0.5, 0.5),
    "by leaf": (0.25, 2.0),
    "within": (np.array([[0.5, 0.1]]), 1.0),
    "within and all": (np.array([[0.25, 0.05]]), 0.5),
}


def by_hand(a, b):
    """The leaves of TREE times `a` and `b`."""
    return {"a": np.asarray(TREE["a"]) * a, "b": np.asarray(TREE["b"]) * b, "n": [7]}


def assert_same(scaled, expected):
    assert scaled["n"].dtype == TREE["n"].dtype
    for key, leaf in expected.items():
        np.testing.assert_allclose(scaled[key], leaf, rtol=1e-6)


@every
def test_every_element_is_multiplied_by_its_factor(name):
    scaled = jax.jit(lambda tree, s: scale_leaves(tree, s, tree))(TREE, SCALES[name])
    assert_same(scaled, by_hand(*FACTORS[name]))


@every
def test_times_multiplies_every_factor(name):
    half = SCALES[name].times(0.5)
    a, b = FACTORS[name]
    assert_same(scale_leaves(TREE, half, TREE), by_hand(0.5 * a, 0.5 * b))


@every
def test_where_keeps_the_scales_or_gives_ones(name):
    kept, dropped = SCALES[name].where(True), SCALES[name].where(False)
    assert_same(scale_leaves(TREE, kept, TREE), by_hand(*FACTORS[name]))
    assert_same(scale_leaves(TREE, dropped, TREE), by_hand(1.0, 1.0))


@every
def test_smallest_is_the_smallest_factor_or_one(name):
    least = min(np.min(x) for x in FACTORS[name])
    np.testing.assert_allclose(SCALES[name].smallest(), least, rtol=1e-6)
    assert SCALES[name].times(100.0).smallest() == 1.0


def test_smallest_of_no_leaves_is_one():
    assert Scales(jnp.zeros((0,))).smallest() == 1.0
    assert Scales(ONE, ()).smallest() == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("second", SCALES)
@pytest.mark.parametrize("first", SCALES)
def test_the_minimum_is_taken_element_by_element(first, second):
    least = jax.jit(minimum)(SCALES[first], SCALES[second])
    pairs = zip(FACTORS[first], FACTORS[second], strict=True)
    expected = by_hand(*(np.minimum(x, y) for x, y in pairs))
    assert_same(scale_leaves(TREE, least, TREE), expected)
    split = SCALES[first].within is not None or SCALES[second].within is not None
    assert (least.within is not None) == split


@every
def test_the_norm_after_scaling_is_that_of_the_scaled_tree(name):
    scaled = scale_leaves(TREE, SCALES[name], TREE)
    found = scaled_norm(measure(TREE), SCALES[name], TREE)
    np.testing.assert_allclose(found, measure(scaled).norm, rtol=1e-6)


def test_leaves_are_scaled_in_float32_and_rounded_once():
    x = jnp.arange(1, 200, dtype=jnp.bfloat16)
    scaled = scale_leaves({"w": x}, uniform(0.3), {"w": x})["w"]
    exact = (jnp.float32(0.3) * x.astype(jnp.float32)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(scaled, exact)


def test_leaves_become_zeros_unless_they_are_kept():
    bad = TREE | {"b": jnp.array([jnp.nan])}
    held = scale_leaves(bad, uniform(0.5), bad, keep=jnp.array(False))
    assert_same(held, by_hand(0.0, 0.0))
    kept = scale_leaves(TREE, uniform(0.5), TREE, keep=jnp.array(True))
    assert_same(kept, by_hand(0.5, 0.5))


def test_the_tree_given_as_like_says_which_leaves_are_scaled():
    like = {"a": jnp.ones(2), "n": jnp.ones(2, jnp.int32)}
    scaled = scale_leaves({"a": jnp.ones(2), "n": jnp.ones(2)}, uniform(0.5), like)
    chex.assert_trees_all_equal(scaled, {"a": jnp.full(2, 0.5), "n": jnp.ones(2)})
