"""Tests for the quantiles of a ring, ranked by comparison or sorted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.marking import core

from stablegrad.thresholds import _statistics as stats

FRACTIONS = (0.0, 0.1, 0.5, 0.995, 1.0)
RNG = np.random.default_rng(0)


def expected(values, seen, fractions):
    """NumPy's quantiles of the entries that were seen, zero if there are none."""
    width = values.shape[-1]
    rows = values.reshape(-1, width)
    counts = np.minimum(seen.ravel(), width)
    pairs = list(zip(rows, counts, strict=True))
    return [
        np.reshape([np.quantile(x[:n], q) if n else 0.0 for x, n in pairs], seen.shape)
        for q in fractions
    ]


def entries(kind, width):
    """One row for each number of entries that may have been seen."""
    seen = np.unique([0, 1, 2, 3, width // 2, width - 1, width, 3 * width])
    shape = (len(seen), width)
    values = {
        "normal": RNG.normal(size=shape),
        "ties": RNG.integers(-2, 3, size=shape),
        "constant": np.full(shape, -0.7),
        "heavy": RNG.normal(size=shape) * 10.0 ** RNG.integers(-20, 20, size=shape),
    }[kind]
    return values.astype(np.float32), seen.astype(np.int32)


@pytest.mark.slow
@pytest.mark.parametrize("kind", core(["normal", "ties", "constant", "heavy"], "heavy"))
@pytest.mark.parametrize("width", [3, 25, stats.RANKED, stats.RANKED + 1, 200])
def test_quantiles_are_those_of_numpy(width, kind):
    values, seen = entries(kind, width)
    found = jax.jit(lambda v, n: stats.quantiles(v, n, *FRACTIONS))(values, seen)
    for own, right in zip(found, expected(values, seen, FRACTIONS), strict=True):
        assert own.dtype == jnp.float32 and own.shape == seen.shape
        size = np.abs(values).max(axis=-1)  # Interpolation rounds relative to it.
        np.testing.assert_array_less(np.abs(own - right), 1e-5 * size + 1e-30)


@pytest.mark.parametrize("width", [stats.RANKED, stats.RANKED + 1])
def test_only_rows_above_the_switch_are_sorted(width):
    values = jnp.zeros((2, width))
    program = str(jax.make_jaxpr(stats.median)(values, jnp.array([2, 2])))
    assert (" sort[" in program) == (width > stats.RANKED)


@pytest.mark.parametrize("width", [25, 100])
def test_a_second_axis_beside_the_groups_is_kept(width):
    values = RNG.normal(size=(4, 2, width)).astype(np.float32)
    seen = np.array([[0, 1], [2, 3], [width, width], [width + 5, 7]], np.int32)
    (found,) = jax.jit(lambda v, n: stats.quantiles(v, n, 0.3))(values, seen)
    (right,) = expected(values, seen, (0.3,))
    np.testing.assert_allclose(found, right, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("width", [25, 100])
def test_the_spread_is_the_normalised_median_absolute_deviation(width):
    values, seen = entries("normal", width)
    center, spread = jax.jit(stats.median_and_spread)(values, seen)
    for row, count, own_center, own_spread in zip(
        values, seen, center, spread, strict=True
    ):
        known = row[:count] if count else np.zeros(1)
        middle = np.median(known)
        np.testing.assert_allclose(own_center, middle, rtol=1e-5, atol=1e-6)
        deviation = 1.4826 * np.median(np.abs(known - middle))
        np.testing.assert_allclose(own_spread, deviation, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("width", [5, 70])
def test_the_largest_values_of_a_scale_do_not_overflow_a_quantile(width):
    values = jnp.tile(jnp.array([stats.BOUND, -stats.BOUND]), (1, width))[:, :width]
    found = jax.jit(lambda v, n: stats.quantiles(v, n, 0.0, 0.5, 1.0))(
        values, np.array([width])
    )
    expected = np.quantile(np.asarray(values), (0.0, 0.5, 1.0))
    np.testing.assert_allclose(np.ravel(found), expected, rtol=1e-6)
