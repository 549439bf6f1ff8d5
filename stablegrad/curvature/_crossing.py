"""Search for the smallest rate at which a condition holds."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

_RANGE = 2.0**40  # The search covers this factor below and above its start.
_LARGEST_START = 1e20  # The start is clipped to this, so that no rate overflows.


def crossing(
    holds: Callable, start: jax.Array, growth: float, precision: float
) -> jax.Array:
    """Return the smallest rate for which `holds(rate)`, within a factor `precision`.

    Divide `start` by four until the condition fails, multiply by `growth` until it
    holds, then bisect the logarithm. Approach from below, because a loss that saturates
    crosses its limit several times, and the first rise may be narrow. Return inf if the
    condition never holds within 12 decades, 0 if always.
    """
    usable = jnp.isfinite(start) & (start > 0)
    start = jnp.where(usable, start, 1).astype(jnp.float32)
    start = jnp.clip(start, 1 / _LARGEST_START, _LARGEST_START)

    # low: the largest rate tried at which the condition fails, 0 if there is none.
    # high: the smallest rate tried at which it holds, inf if there is none.
    def searching(bracket) -> jax.Array:
        low, high = bracket
        found = (low > 0) & (high <= precision * low)
        lost = (low > start * _RANGE) | (high < start / _RANGE)
        return ~(found | lost)

    def narrow(bracket) -> tuple[jax.Array, jax.Array]:
        low, high = bracket
        up = jnp.minimum(growth * low, jnp.sqrt(low) * jnp.sqrt(high))
        down = jnp.where(jnp.isinf(high), start, high / 4)
        rate = jnp.where(low > 0, up, down)
        held = holds(rate)
        return jnp.where(held, low, rate), jnp.where(held, rate, high)

    zero = jnp.zeros((), jnp.float32)
    low, high = lax.while_loop(searching, narrow, (zero, zero + jnp.inf))
    middle = jnp.where(low > 0, jnp.sqrt(low) * jnp.sqrt(high), 0.0)
    return jnp.where(jnp.isinf(high), jnp.inf, middle)
