"""Shared by all tests: strict promotion, and runs of many steps in one scan."""

import os

import chex
import jax
import pytest

# Compilation takes most of the tests' time, and XLA's older emitters halve it, on one
# thread a test. A flag that a later JAX may have dropped would end the process.
if jax.__version_info__ < (0, 11):
    flags = (
        "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    )
    os.environ["XLA_FLAGS"] = f"{flags} {os.environ.get('XLA_FLAGS', '')}".strip()

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 8)  # For `tests/scale`; others use the first.


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
