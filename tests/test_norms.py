"""Tests for the measurement: right norms, and which gradients count as overflow."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stablegrad._norms import OVERFLOW, first_true, measure, measure_parts

RTOL = 1e-5  # float32 sums of a few hundred squares against float64.

measured = jax.jit(measure)


def oracle(tree) -> float:
    """The L2 norm in float64."""
    leaves = [
        np.asarray(x).astype(np.complex128).ravel() for x in jax.tree.leaves(tree)
    ]
    return float(np.sqrt(sum(np.sum(np.abs(leaf) ** 2) for leaf in leaves)))


@pytest.mark.parametrize("scale", [1e-17, 1e-12, 1.0, 1e12, 1e16])
def test_norm_is_right_at_every_scale_in_range(scale):
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
    assert seen.finite and seen.largest_leaf == 0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "complex64"])
def test_norm_is_float32_for_every_dtype(dtype, strict):
    tree = {"w": jnp.full((4, 8), 300, dtype)}  # 300**2 overflows float16.
    seen = measured(tree)
    chex.assert_type([seen.norm, seen.leaf_norms, seen.leaf_squares], jnp.float32)
    np.testing.assert_allclose(seen.norm, oracle(tree), rtol=RTOL)
    assert seen.finite


@pytest.mark.parametrize("elements", [1, 100])
@pytest.mark.parametrize("norm, finite", [(0.9e18, True), (1.1e18, False)])
def test_a_norm_of_1e18_is_an_overflow(norm, finite, elements):
    assert OVERFLOW == 1e18
    tree = {"a": jnp.ones(3), "b": jnp.full((elements,), norm / elements**0.5)}
    seen = measured(tree)
    assert seen.finite == finite
    np.testing.assert_allclose(seen.norm, norm, rtol=RTOL)  # It is still exact.
    assert seen.largest_leaf == 1


def test_leaves_that_overflow_only_together_are_an_overflow():
    tree = [jnp.full((1,), 0.8e18), jnp.full((1,), 0.9e18)]
    seen = measured(tree)
    assert not seen.finite
    assert seen.largest_leaf == 1


def test_a_finite_tree_whose_squares_overflow_has_norm_inf():
    seen = measured({"a": jnp.ones(3), "w": jnp.full((100,), 3e38)})
    assert seen.norm == jnp.inf and not seen.finite
    assert seen.largest_leaf == 1


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("leaf", ["a", "b", "c"])
def test_one_bad_element_names_its_leaf_and_leaves_the_other_norms_right(bad, leaf):
    tree = {name: jnp.full((64, 128), 0.5) for name in "abc"}
    tree[leaf] = tree[leaf].at[3, 5].set(bad)
    seen = measured(tree)
    index = "abc".index(leaf)
    assert seen.largest_leaf == index and not seen.finite
    np.testing.assert_equal(float(seen.norm), abs(bad))  # nan for nan, inf for inf.
    others = [i for i in range(3) if i != index]
    np.testing.assert_allclose(
        seen.leaf_norms[np.array(others)], oracle(jnp.full((64, 128), 0.5)), rtol=RTOL
    )


def test_the_first_bad_leaf_counts_as_the_largest():
    tree = [jnp.ones(3), jnp.array([1e19]), jnp.array([jnp.inf]), jnp.array([jnp.nan])]
    seen = measured(tree)
    assert seen.largest_leaf == 1
    assert jnp.isnan(seen.norm)
    assert measured([tree[0], tree[2], tree[3]]).largest_leaf == 1


def test_a_large_leaf_of_nothing_but_nan_is_bad():
    # XLA's CPU maximum over an array of this size loses the nan.
    tree = {"a": jnp.ones(3), "b": jnp.full((64, 128), jnp.nan), "c": jnp.ones(3)}
    seen = measured(tree)
    assert seen.largest_leaf == 1 and jnp.isnan(seen.norm)


def test_float64_leaves_are_summed_wide_and_overflow_as_float32(x64):
    seen = jax.jit(measure)({"w": jnp.full((3,), 1e300, jnp.float64)})
    assert seen.norm.dtype == jnp.float32
    assert seen.norm == jnp.inf and not seen.finite
    small = jax.jit(measure)({"w": jnp.array([3e-5, 4e-5], jnp.float64)})
    np.testing.assert_allclose(small.norm, 5e-5, rtol=RTOL)


def test_elements_of_1e_25_count_as_zero():
    seen = measured({"w": jnp.full((1000,), 1e-25)})
    assert seen.norm == 0 and seen.finite


def test_leaves_that_are_not_floating_point_are_passed_over():
    tree = {"i": jnp.full((3,), 7), "n": None, "w": jnp.array([3.0, 4.0])}
    seen = measured(tree)
    np.testing.assert_allclose(seen.norm, 5.0, rtol=RTOL)
    chex.assert_shape(seen.leaf_norms, (1,))


@pytest.mark.parametrize(
    "tree, largest",
    [({}, -1), ({"i": jnp.arange(3)}, -1), ({"w": np.zeros((0, 4))}, 0)],
)
def test_a_tree_without_numbers_has_norm_zero_and_is_finite(tree, largest):
    seen = measured(tree)
    assert seen.norm == 0 and seen.finite
    assert seen.largest_leaf == largest


def test_the_norm_of_complex_numbers_has_both_parts():
    assert measured({"w": jnp.array([3 + 4j], jnp.complex64)}).norm == 5


def test_parts_and_whole_are_measured_together():
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)
    bias = jnp.asarray(rng.normal(size=3), jnp.float32)
    over = ((0,), ())

    @jax.jit
    def both(kernel, bias):
        return measure_parts([kernel, bias], over)

    seen, (of_kernel, of_bias) = both(kernel, bias)
    chex.assert_trees_all_close(seen, measured([kernel, bias]), rtol=1e-6)
    chex.assert_shape(of_kernel, (1, 3))
    columns = np.sum(np.square(np.float64(kernel)), axis=0, keepdims=True)
    np.testing.assert_allclose(of_kernel, columns, rtol=RTOL)
    np.testing.assert_allclose(of_bias, np.square(np.float64(bias)), rtol=RTOL)


@pytest.mark.parametrize(
    "flags, index", [([0, 1, 1], 1), ([0, 0], -1), ([1], 0), ([], -1)]
)
def test_the_first_of_several_flags_is_found(flags, index):
    found = jax.jit(first_true)(jnp.array(flags, bool))
    assert found == index and found.dtype == jnp.int32
