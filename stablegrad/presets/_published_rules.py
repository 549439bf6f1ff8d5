"""The statistics of the large trainers' skip rules, as published."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from .._norms import OVERFLOW
from ..thresholds._base import Scope, Threshold
from ..thresholds._signals import Signal
from ..thresholds._statistics import write

DECAY = 0.99  # Weight of the past in the means of `accepted_mean`.
LEAST_ACCEPTED = 500  # Accepted steps before deviations limit anything.


class WindowState(NamedTuple):
    """State of `window_mean`."""

    past_values: jax.Array  # float32 (groups, window): raw, a ring.
    values_seen: jax.Array  # int32 (groups,)


class AcceptedState(NamedTuple):
    """State of `accepted_mean`."""

    accepted_steps: jax.Array  # int32 (groups,)
    accepted_mean: jax.Array  # float32 (groups,)
    accepted_square: jax.Array  # float32 (groups,): mean of squares.


def window_mean(
    of: Signal,
    window: int,
    sigma: float | jax.Array,
    ddof: int,
    floor: float,
    counts_itself: bool,
) -> Threshold:
    """Return mean + sigma * max(std, floor) of the last raw values, once half exist."""
    needed = max(2, window // 2) - int(counts_itself)

    def init(groups: int) -> WindowState:
        return WindowState(
            jnp.zeros((groups, window), jnp.float32), jnp.zeros((groups,), jnp.int32)
        )

    def limit(state: WindowState, scope: Scope) -> jax.Array:
        del scope
        place = jnp.arange(window, dtype=jnp.int32)
        used = place[None, :] < state.values_seen[:, None]
        count = jnp.sum(used, axis=-1).astype(jnp.float32)
        mean = jnp.sum(state.past_values, axis=-1, where=used) / count
        off = jnp.square(state.past_values - mean[:, None])
        spread = jnp.sqrt(jnp.sum(off, axis=-1, where=used) / (count - ddof))
        normal = mean + sigma * jnp.maximum(spread, floor)
        return jnp.where(state.values_seen >= needed, normal, jnp.inf)

    def update(state: WindowState, signal, exceeded) -> WindowState:
        del exceeded
        slot = state.values_seen % window
        return WindowState(
            write(state.past_values, slot, signal), state.values_seen + 1
        )

    return Threshold("window_mean", of, "global", init, limit, update, learns_all=True)


def accepted_mean(multiplier: float | jax.Array, deviations: bool) -> Threshold:
    """Return a threshold on the mean of accepted norms, or on their deviation."""

    def init(groups: int) -> AcceptedState:
        one = jnp.ones((groups,), jnp.float32)
        return AcceptedState(jnp.zeros((groups,), jnp.int32), one, one)

    def limit(state: AcceptedState, scope: Scope) -> jax.Array:
        del scope
        mean = state.accepted_mean
        drops_from = multiplier * mean
        if deviations:
            spread = jnp.sqrt(state.accepted_square - jnp.square(mean))
            armed = state.accepted_steps >= LEAST_ACCEPTED
            drops_from = jnp.where(armed, mean + multiplier * spread, 1e10)
        return jnp.nextafter(drops_from, jnp.float32(-jnp.inf))

    def update(state: AcceptedState, signal, exceeded) -> AcceptedState:
        accepted = (signal < OVERFLOW) & ~exceeded
        count = state.accepted_steps.astype(jnp.float32)
        weight = DECAY * (1 - DECAY**count) / (1 - DECAY ** (count + 1))
        value = jnp.where(accepted, signal, 0.0)
        mean = weight * state.accepted_mean + (1 - weight) * value
        square = weight * state.accepted_square + (1 - weight) * jnp.square(value)
        return AcceptedState(
            state.accepted_steps + accepted.astype(jnp.int32),
            jnp.where(accepted, mean, state.accepted_mean),
            jnp.where(accepted, square, state.accepted_square),
        )

    return Threshold(
        "accepted_mean", "grad_norm", "global", init, limit, update, learns_all=True
    )
