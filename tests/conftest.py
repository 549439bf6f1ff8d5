"""Shared by all tests: strict promotion of ranks and dtypes, and eight devices."""

import chex
import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
if jax.config.jax_num_cpu_devices < 0:  # `JAX_NUM_CPU_DEVICES` is not set.
    jax.config.update("jax_num_cpu_devices", 8)
if jax.default_backend() != "cpu":  # Oracles are of float64, products not of TF32.
    jax.config.update("jax_default_matmul_precision", "highest")


def pytest_runtest_setup(item):
    """Skips a test marked `devices(count)` where there are fewer."""
    for mark in item.iter_markers("devices"):
        (needed,) = mark.args
        if jax.device_count() < needed:
            pytest.skip(f"needs {needed} devices, JAX has {jax.device_count()}")


@pytest.fixture(autouse=True)
def fresh_trace_counts():
    """`chex.assert_max_traces` counts by name; each test counts for itself."""
    chex.clear_trace_counter()


@pytest.fixture
def x64():
    """Arrays may be float64, as for users who enable it."""
    # JAX before 0.8 has it elsewhere.
    home = jax if hasattr(jax, "enable_x64") else jax.experimental
    with home.enable_x64(True):
        yield


@pytest.fixture
def strict():
    """No implicit dtype promotion; optax's own Adam does not pass it."""
    with jax.numpy_dtype_promotion("strict"):
        yield
