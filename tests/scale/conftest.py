"""Shared by the tests of scale."""

import jax
import pytest


@pytest.fixture
def quick():
    """`scenario.QUICK` for what takes no compiler options."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
