"""The smallest rate at which something happens, found from below."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

_FARTHEST = 2.0**40  # How far from its start a search goes, up or down.
_EXTREME = 1e20  # A search starts no farther from 1, lest its rates overflow.


class _Bracket(NamedTuple):
    """Rates between which the crossing lies; float32."""

    low: jax.Array  # The largest tried at which it does not happen, 0 if none.
    high: jax.Array  # The smallest tried at which it does, inf if none.


def crossing(
    happens: Callable, start: jax.Array, growth: float, precision: float
) -> jax.Array:
    """The smallest rate for which `happens(rate)`, within a factor `precision`.

    Down from `start` by factors of four while it happens there already, then up by
    factors of `growth` until it does, then halves the logarithm. Coming from below
    matters: a loss that saturates has several crossings, and the first may be narrow.
    Returns inf, or 0, if it never happens, or always, within 12 decades.
    """
    usable = jnp.isfinite(start) & (start > 0)
    start = jnp.where(usable, start, 1).astype(jnp.float32)
    start = jnp.clip(start, 1 / _EXTREME, _EXTREME)

    def searching(bracket) -> jax.Array:
        low, high = bracket
        found = (low > 0) & (high <= precision * low)
        lost = (low > start * _FARTHEST) | (high < start / _FARTHEST)
        return ~(found | lost)

    def following(low, high) -> jax.Array:
        up = jnp.minimum(growth * low, jnp.sqrt(low) * jnp.sqrt(high))
        down = jnp.where(jnp.isinf(high), start, high / 4)
        return jnp.where(low > 0, up, down)

    def look(bracket) -> _Bracket:
        rate = following(*bracket)
        yes = happens(rate)
        return _Bracket(
            jnp.where(yes, bracket.low, rate), jnp.where(yes, rate, bracket.high)
        )

    nothing = jnp.zeros((), jnp.float32)
    low, high = lax.while_loop(searching, look, _Bracket(nothing, nothing + jnp.inf))
    return jnp.where(
        jnp.isinf(high),
        jnp.inf,
        jnp.where(low > 0, jnp.sqrt(low) * jnp.sqrt(high), 0.0),
    )
