"""Tests for the measurement: right norms, and the first bad leaf by index."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stablegrad._norms import LARGEST, measure, newly_nonfinite, scaled_norm

RTOL = 1e-5  # float32 sums of a few hundred squares against float64.

measured = jax.jit(measure)


def oracle(tree) -> float:
    """The L2 norm in float64."""
    leaves = [
        np.asarray(x).astype(np.complex128).ravel() for x in jax.tree.leaves(tree)
    ]
    return float(np.sqrt(sum(np.sum(np.abs(leaf) ** 2) for leaf in leaves)))


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e12, 1e20, 1e30])
def test_norm_is_right_at_every_scale_of_float32(scale):
    rng = np.random.default_rng(0)
    tree = {
        "a": jnp.asarray(rng.normal(size=(13, 7)) * scale, jnp.float32),
        "b": jnp.asarray(rng.normal(size=(5,)) * scale, jnp.float32),
    }
    seen = measured(tree)
    np.testing.assert_allclose(seen.norm, oracle(tree), rtol=RTOL)
    np.testing.assert_allclose(
        seen.leaf_norms, [oracle(tree["a"]), oracle(tree["b"])], rtol=RTOL
    )
    assert seen.first_bad_leaf == -1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "complex64"])
def test_norm_is_float32_for_every_dtype(dtype, strict):
    tree = {"w": jnp.full((4, 8), 300, dtype)}  # 300**2 overflows float16.
    seen = measured(tree)
    chex.assert_type(seen.norm, jnp.float32)
    np.testing.assert_allclose(seen.norm, oracle(tree), rtol=RTOL)


def test_float64_leaves_beyond_float32_count_as_finite(x64):
    seen = jax.jit(measure)({"w": jnp.full((3,), 1e300, jnp.float64)})
    assert seen.norm.dtype == jnp.float32
    assert seen.norm == np.float32(LARGEST)
    assert seen.first_bad_leaf == -1
    small = jax.jit(measure)({"w": jnp.array([3e-5, 4e-5], jnp.float64)})
    np.testing.assert_allclose(small.norm, 5e-5, rtol=RTOL)


def test_a_finite_tree_whose_norm_overflows_gets_the_largest_float32():
    seen = measured({"w": jnp.full((100,), 3e38)})
    assert seen.norm == np.float32(LARGEST)
    assert seen.first_bad_leaf == -1


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("leaf", ["a", "b", "c"])
def test_one_bad_element_names_its_leaf_and_leaves_the_other_norms_right(bad, leaf):
    tree = {name: jnp.full((64, 128), 0.5) for name in "abc"}
    tree[leaf] = tree[leaf].at[3, 5].set(bad)
    seen = measured(tree)
    index = "abc".index(leaf)
    assert seen.first_bad_leaf == index
    assert not jnp.isfinite(seen.norm)
    others = [i for i in range(3) if i != index]
    np.testing.assert_allclose(
        seen.leaf_norms[np.array(others)], oracle(jnp.full((64, 128), 0.5)), rtol=RTOL
    )


def test_a_large_leaf_of_nothing_but_nan_is_bad():
    # XLA's CPU maximum over an array of this size loses the nan.
    tree = {"a": jnp.ones(3), "b": jnp.full((64, 128), jnp.nan), "c": jnp.ones(3)}
    assert measured(tree).first_bad_leaf == 1


def test_leaves_that_are_not_floating_point_are_passed_over():
    tree = {"i": jnp.full((3,), 7), "n": None, "w": jnp.array([3.0, 4.0])}
    seen = measured(tree)
    np.testing.assert_allclose(seen.norm, 5.0, rtol=RTOL)
    chex.assert_shape(seen.leaf_norms, (1,))


@pytest.mark.parametrize("tree", [{}, {"i": jnp.arange(3)}, {"w": jnp.zeros((0, 4))}])
def test_a_tree_without_numbers_has_norm_zero_and_is_finite(tree):
    seen = measured(tree)
    assert seen.norm == 0
    assert seen.first_bad_leaf == -1


def test_scaled_norm_is_the_norm_of_the_scaled_tree():
    tree = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([12.0])}
    seen = measured(tree)
    np.testing.assert_allclose(
        scaled_norm(seen, jnp.float32(0.5), tree), 6.5, rtol=RTOL
    )
    scales = jnp.array([2.0, 0.0])
    np.testing.assert_allclose(scaled_norm(seen, scales, tree), 10.0, rtol=RTOL)
    scales = (jnp.array([0.0, 2.0]), jnp.float32(0.5))
    np.testing.assert_allclose(scaled_norm(seen, scales, tree), 10.0, rtol=RTOL)


def test_only_what_was_finite_before_counts_as_newly_broken():
    broken = jax.jit(newly_nonfinite)
    old = {"best": jnp.array(jnp.inf), "m": jnp.array([1.0, 2.0])}
    assert not broken(old, old)
    assert not broken({**old, "m": jnp.array([1e30, 0.0])}, old)
    assert broken({**old, "m": jnp.array([1.0, jnp.inf])}, old)
    assert broken({**old, "m": jnp.array([1.0, jnp.nan])}, old)


def test_the_norm_of_complex_numbers_has_both_parts():
    assert measured({"w": jnp.array([3 + 4j], jnp.complex64)}).norm == 5
