"""Sums over leaves: every total in its place, and one finishing sum for a shape."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stablegrad._leaf_sums import SHORT, leaf_dots, leaf_sums

SHAPES = [
    (3, SHORT),
    (),
    (7,),
    (5, SHORT - 1),
    (3, SHORT + 8),  # Its partial sums have the shape of the first one's.
    (2, 3, SHORT),
    (4, SHORT),
    (0,),
    (3, SHORT),
]


def arrays(dtype=np.float32):
    rng = np.random.default_rng(2)
    return [rng.integers(-99, 100, shape).astype(dtype) for shape in SHAPES]


def test_every_sum_stands_where_its_array_does():
    given = arrays()
    expected = [float(np.sum(x.astype(np.float64))) for x in given]
    found = jax.jit(leaf_sums, static_argnums=1)(list(map(jnp.asarray, given)), "f4")
    assert len(set(expected)) == len(expected)
    np.testing.assert_array_equal(found, np.float32(expected))


def test_bytes_are_added_up_in_the_wider_dtype():
    flags = [jnp.ones((4, 300), jnp.int8), jnp.ones((2, 200), jnp.int8)]
    found = leaf_sums(flags, jnp.int32)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, [1200, 400])


def test_no_array_gives_no_sum():
    assert leaf_sums([], jnp.float32).shape == (0,)


@pytest.mark.parametrize("count", [2, 20])
def test_arrays_of_one_shape_share_the_sum_that_finishes_them(count):
    given = [jnp.ones((5, 40 + i)) for i in range(count)]
    jaxpr = jax.make_jaxpr(lambda x: leaf_sums(x, jnp.float32))(given)
    sums = str(jaxpr).count("reduce_sum[")
    assert sums == count + 1


def test_dots_are_those_of_numpy_in_float64():
    lefts = [x * np.complex64(1 + 2j) for x in arrays(np.complex64) if x.size]
    rights = [x - np.complex64(1j) for x in lefts]
    expected = [
        np.vdot(x.astype(np.complex128), y.astype(np.complex128)).real
        for x, y in zip(lefts, rights, strict=True)
    ]
    found = leaf_dots(list(map(jnp.asarray, lefts)), list(map(jnp.asarray, rights)))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_inner_products_of_narrow_numbers_need_no_implicit_promotion():
    narrow = jnp.ones(3, jnp.bfloat16)
    with jax.numpy_dtype_promotion("strict"):
        np.testing.assert_allclose(leaf_dots([narrow], [narrow]), [3.0])
