"""Shared by all tests: strict promotion, and runs of many steps in one scan."""

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def strict():
    """No implicit dtype promotion; optax's own Adam does not pass it."""
    with jax.numpy_dtype_promotion("strict"):
        yield
