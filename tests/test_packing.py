"""Tests for packed numbers: what goes in comes out, of one state and of many."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stablegrad._norms import LARGEST
from stablegrad._packing import Packing, decode, encode

RNG = np.random.default_rng(0)


def drawn(shape, dtype):
    numbers = RNG.normal(size=shape) * 100
    return jnp.asarray(numbers > 0 if dtype == "bool" else numbers, dtype)


TREES = {
    "mixed": {
        "f": (drawn((), "float32"), drawn((3, 2), "float32")),
        "i": [drawn((), "int32"), drawn((0, 4), "int32"), drawn((5,), "int32")],
        "b": {"flag": drawn((), "bool"), "flags": drawn((2, 1, 2), "bool")},
        "empty": drawn((0,), "float32"),
        "none": None,
    },
    "floats": [drawn((2, 3), "float32"), drawn((), "float32")],
    "integers": [drawn((4,), "int32"), drawn((2,), "bool")],
    "nothing": {},
}
WIDTHS = {
    "mixed": [1 + 6, 1 + 5 + 1 + 4],
    "floats": [7, 0],
    "integers": [0, 6],
    "nothing": [0, 0],
}
every = pytest.mark.parametrize("name", TREES)


@every
def test_a_tree_comes_back_in_its_shapes_and_dtypes(name):
    tree = TREES[name]
    packing = Packing(jax.eval_shape(lambda: tree))
    packed = jax.jit(packing.pack)(tree)
    assert packing.widths == WIDTHS[name]
    assert [x.shape[0] for x in packed] == [n for n in WIDTHS[name] if n]
    chex.assert_rank(packed, 1)
    kinds = (jnp.float32, jnp.int32)
    wanted = [k for k, n in zip(kinds, WIDTHS[name], strict=True) if n]
    assert [x.dtype for x in packed] == wanted
    back = jax.jit(packing.unpack)(packed)
    chex.assert_trees_all_equal(back, tree)
    chex.assert_trees_all_equal_shapes_and_dtypes(back, tree)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TREES if name != "nothing"])
def test_an_ensemble_keeps_its_leading_axes(name):
    many = jax.tree.map(lambda x: drawn((2, 3, *x.shape), str(x.dtype)), TREES[name])
    packing = Packing(TREES[name])
    packed = jax.jit(jax.vmap(jax.vmap(packing.pack)))(many)
    assert all(x.shape[:2] == (2, 3) for x in packed)
    back = jax.jit(packing.unpack)(packed)
    chex.assert_trees_all_equal(back, many)
    chex.assert_trees_all_equal_shapes_and_dtypes(back, many)


def test_further_columns_at_the_end_are_left_alone():
    tree = TREES["mixed"]
    both = (tree, jnp.arange(3), jnp.ones((2, 2)))
    packed = jax.jit(Packing(both).pack)(both)
    chex.assert_trees_all_equal(jax.jit(Packing(tree).unpack)(packed), tree)


def test_numpy_arrays_are_unpacked_on_the_host():
    tree = TREES["mixed"]
    packed = tuple(np.asarray(x) for x in Packing(tree).pack(tree))
    back = Packing(tree).unpack(packed)
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(back))
    chex.assert_trees_all_equal(back, tree)


NUMBERS = [0.0, -1.5, 3e38, LARGEST, np.inf, -np.inf, np.nan]
ENCODED = [0.0, -1.5, 3e38, LARGEST, LARGEST, -LARGEST, -LARGEST]
DECODED = [0.0, -1.5, 3e38, np.inf, np.inf, np.nan, np.nan]


@pytest.mark.parametrize("way", ["concrete", "traced"])
def test_numbers_are_finite_while_encoded_and_come_back(way):
    wrap = jax.jit if way == "traced" else lambda function: function
    stored = wrap(encode)(jnp.array(NUMBERS, jnp.float32))
    np.testing.assert_array_equal(stored, np.float32(ENCODED))
    back = wrap(decode)(stored)
    assert back.dtype == np.float32
    np.testing.assert_array_equal(back, np.float32(DECODED))


def test_a_concrete_number_is_decoded_on_the_host():
    with jax.debug_nans(True):
        assert np.isnan(decode(jnp.float32(-LARGEST)))
        assert not isinstance(decode(jnp.float32(1.0)), jax.Array)
