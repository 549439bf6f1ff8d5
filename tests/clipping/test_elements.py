"""Sizes of elements, leaf by leaf."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stablegrad._norms import measure
from stablegrad.clipping import _elements


@pytest.mark.parametrize("dtype", ("float32", "bfloat16", "complex64"))
def test_the_largest_element_may_be_negative_and_a_nan_shows(dtype):
    leaf = np.ones((300, 40), dtype)
    leaf[200, 7] = -5
    tree = {"a": leaf, "b": leaf.copy(), "c": np.ones(0, dtype)}
    tree["b"][100, 3] = np.nan

    @jax.jit
    def found(tree):
        return _elements.leaf_maxima(tree, measure(tree).leaf_squares)

    np.testing.assert_array_equal(
        found(jax.tree.map(jnp.asarray, tree)), [5, np.nan, 0]
    )
