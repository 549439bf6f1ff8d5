"""Several reductions in one pass, as CPUs take them, and one by one, as others do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stablegrad import _together

KINDS = ("sum", "min", "max", "sum")


@pytest.mark.parametrize("axes", [None, (), (1,), (0, 2)])
@pytest.mark.parametrize("way", [_together._in_one_pass, _together._one_by_one])
def test_both_ways_give_the_sums_and_extremes_of_numpy(way, axes):
    x = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    columns = (x, x - 7, x + 7, (x > 0).astype(np.int32))
    over, kept = (None, False) if axes is None else (axes, True)
    expected = [
        reduce(column, axis=over, keepdims=kept)
        for reduce, column in zip(
            (np.sum, np.min, np.max, np.sum), columns, strict=True
        )
    ]
    found = jax.jit(lambda *c: way(KINDS, axes, *c))(*columns)
    for own, right, column in zip(found, expected, columns, strict=True):
        assert own.shape == right.shape and own.dtype == column.dtype
        np.testing.assert_allclose(own, right, rtol=1e-5)


def test_a_number_is_its_own_sum():
    assert _together.reduce_together((jnp.float32(3.0),), ("max",)) == (3.0,)


def test_nothing_of_the_size_of_an_array_is_written():
    def sums(x):
        columns = (jnp.sqrt(x), jnp.exp(x) / (1 + x))
        return _together.reduce_together(columns, ("sum", "max"))

    x = jnp.ones((512, 256))
    program = jax.jit(sums).lower(x).compile()
    assert program.memory_analysis().temp_size_in_bytes < x.nbytes / 8
