"""Shared by the composition tests."""

import jax
import pytest


@pytest.fixture(autouse=True)
def compiled_quickly():
    """Programs that run for milliseconds; their compilation takes all the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
