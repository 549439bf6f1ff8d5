"""Shared by all tests: strict promotion, and runs of many steps in one scan."""

import chex
import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True)
def fresh_trace_counts():
    """`chex.assert_max_traces` counts by name; each test counts for itself."""
    chex.clear_trace_counter()


@pytest.fixture
def strict():
    """No implicit dtype promotion; optax's own Adam does not pass it."""
    with jax.numpy_dtype_promotion("strict"):
        yield
