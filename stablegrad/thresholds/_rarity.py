"""Rarity: what comes often enough is usual, whatever its size."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._checks import require, require_steps
from .._trees import increment
from ..granularity._groups import Granularity
from . import _statistics as stats
from ._base import Family, Scope, Threshold, as_float32
from ._signals import Signal, check_signal, is_norm

# Distances above the level, in octaves, at which values are counted. Steps of a third
# of an octave are needed: with halves, an outlier of six deviations is missed where the
# deviation is 5 %. The smallest edge keeps the limit of a constant signal above its
# rounding errors. The coarse edges are for norms that are themselves rounding errors,
# among which far larger ones come regularly.
EDGES = np.concatenate([np.arange(1, 73) / 3, np.arange(26, 101, 2)])[None]
EDGES = EDGES.astype(np.float32)
LEVEL_WEIGHT = 0.03  # Weight of a step in the level and the spread.
MOST_OCTAVES = 3.0  # A norm further from its level counts as if at this distance.
MOST_SPREADS = 8.0  # The same for other signals, in spreads.
LASTING = 12  # At least so many unusual values in a row move the level to their mean.
# (n, octaves): until n norms have been seen, the limit is wider by `octaves`. Those of
# several pairs add up.
EARLY = ((1, np.inf), (2, 6.0), (10, 3.0), (100, 1.0))
FIRST_COUNTED = 10  # First values of other signals, which set level and spread only.
ALONE = 1.5  # `share` is at least so many weights of a step: one value is never usual.
ARMED_AFTER = 50  # Values of other signals before they are compared with a limit.
LEAST_SPREAD = 1e-3  # Relative to the level: a spread is never zero.


class RarityState(NamedTuple):
    """State of `rarity`. Norms are followed as log2 x, other signals as x."""

    tail: jax.Array  # float32 (groups, edges): share of steps at or above each edge.
    level: jax.Array  # float32 (groups,)
    spread: jax.Array  # float32 (groups,): mean distance from the level; 0 for norms.
    reach: jax.Array  # float32 (groups,): octaves from the level to the limit.
    run_mean: jax.Array  # float32 (groups,): mean of the unusual values in a row.
    run: jax.Array  # int32 (groups,): unusual values in a row, until the level moves.
    seen: jax.Array  # int32 (groups,): finite values so far, saturating.


def rarity(
    share: float | jax.Array = 0.01,
    *,
    window: int | jax.Array = 256,
    margin: float | jax.Array = 1.0,
    patience: int | jax.Array = 4,
    of: Signal = "grad_norm",
    per: Granularity = "global",
) -> Threshold:
    """Call a value usual if more than a share of the recent steps reached it.

    With r_t the distance of a norm x_t from its level in octaves, y_t = log2 x_t:

        r_t = y_t - level;    level += w' clip(r_t, -3, 3),  w' = max(0.03, 1 / t)
        tail_k += w ([r_t >= edge_k] - tail_k),              w = max(1 / window, 1 / t)
        reach = least edge_k with tail_k <= max(share, 1.5 w)
        limit_{t+1} = margin * 2^(level + reach)

    The edges lie a third of an octave apart up to 24 octaves above the level, and two
    octaves up to 100. No value is bounded before it is counted, and none starts the
    statistics again: an outlier weighs 1 / `window` and hides nothing, and what comes
    again is usual after about share * window times. So that the limit does not stay
    open after a burst, a value above it is counted only if the one before it was not.
    The first norm sets the level and counts for no edge, so the unit does not matter;
    r_2 enters the level whole.
    After `patience` unusual values in a row, up to twice their mean is usual as well;
    after max(12, `patience`), the level moves to their mean. The first norm is accepted
    unchecked, the second up to 2^10 times the first, those up to the tenth up to 2^4
    times the limit, and those up to the hundredth up to twice the limit.

    Other signals can be negative, so y_t = x_t. Their level m and their mean absolute
    distance s from it are running means, in which a residual counts as at most 8 s. Of
    a run of unusual values, only the first one changes s. Of a signal that is constant,
    such as the loss of 0 while a replay buffer fills, only the last value counts. From
    the 50th value on,

        r_t = log2(max(x_t - m, 0) / s);    limit_{t+1} = m + margin * s * 2^reach

    Args:
        share: Expected share of healthy steps above the limit, in (0, 1), whatever
            their distribution.
        window: Steps that a value is remembered for, >= 2.
        margin: Factor on the limit of a norm, or on a limit's distance from the level,
            >= 1. The statistics do not depend on it.
        patience: Unusual values in a row after which more of their size are usual,
            >= 1.
        of: What is measured, as for `fixed`.
        per: The granularity, as for `fixed`. The state holds 116 numbers of 4
            bytes a group.

    Returns:
        A threshold for a response. A nan or inf is never usual, and never enters the
        state.

    Raises:
        ValueError: If a concrete argument is out of range.

    Example:
        >>> import optax
        >>> import stablegrad as sg
        >>> tx = sg.guard(
        ...     optax.adam(1e-3),
        ...     sg.clip(sg.rarity(0.01)),
        ...     sg.skip(sg.rarity(0.01, margin=32)),
        ... )
    """
    check_signal(of, per)
    require("share", share, "in (0, 1)", lambda x: 0 < x < 1)
    require("window", window, ">= 2", lambda x: 2 <= x < float("inf"))
    require("margin", margin, ">= 1", lambda x: 1 <= x < float("inf"))
    require_steps("patience", patience)
    settings = (share, window, margin, patience, float(is_norm(of)))
    family = Family(("rarity",), settings, _rule)
    return Threshold("rarity", of, per, *_rule(settings), family=family)


def _rule(settings: tuple):
    """Return init, limit and update; settings may differ by group."""
    share, window, margin, patience, norm = as_float32(settings)
    is_log = norm > 0

    def init(groups: int) -> RarityState:
        zeros = jnp.zeros((groups,), jnp.float32)
        none = jnp.zeros((groups,), jnp.int32)
        tail = jnp.zeros((groups, EDGES.size), jnp.float32)
        return RarityState(tail, zeros, zeros, zeros, zeros, none, none)

    def base_reach(state: RarityState) -> jax.Array:
        """Return the octaves from the level to the limit without margin or run."""
        early = sum(jnp.where(state.seen < last, wider, 0.0) for last, wider in EARLY)
        unarmed = jnp.where(state.seen < ARMED_AFTER, jnp.inf, 0.0)
        return state.reach + jnp.where(is_log, early, unarmed)

    def spread_of(state: RarityState) -> jax.Array:
        floor = LEAST_SPREAD * jnp.abs(state.level) + 1e-30
        return jnp.where(is_log, 1.0, jnp.maximum(state.spread, floor))

    def limit(state: RarityState, scope: Scope) -> jax.Array:
        del scope
        level, reach = state.level, base_reach(state)
        # Up to twice the mean of a run: an octave, or twice the distance.
        twice = state.run_mean + jnp.where(is_log, 1.0, state.run_mean - level)
        top = jnp.where(is_log, level + reach, level + spread_of(state) * 2**reach)
        lasts = state.run.astype(jnp.float32) >= patience
        top = jnp.where(lasts, jnp.maximum(top, twice), top)
        linear = level + margin * (top - level)
        return jnp.where(is_log, margin * 2.0**top, linear)

    def update(state: RarityState, signal, exceeded) -> RarityState:
        del exceeded  # By the limit with its margin, which is not what is learned from.
        bounded = jnp.clip(signal, -stats.BOUND, stats.BOUND)
        value = jnp.where(is_log, jnp.log2(jnp.maximum(signal, 1e-30)), bounded)
        distance, spread = value - state.level, spread_of(state)
        octaves = jnp.log2(jnp.maximum(distance, 1e-36)) - jnp.log2(spread)
        # The first norm sets the level, so it lies at no distance from it.
        r = jnp.where(is_log, jnp.where(state.seen > 0, distance, 0.0), octaves)
        unusual = r > base_reach(state)
        before = state.seen.astype(jnp.float32)
        # A spread means little before it has been followed for some steps.
        counted = before - jnp.where(is_log, 0, FIRST_COUNTED)
        counts = (~unusual | (state.run == 0)) & (counted >= 0)
        weight = jnp.maximum(1 / window, 1 / (jnp.maximum(counted, 0.0) + 1))
        allowed = jnp.maximum(share, ALONE * weight)[:, None]
        weight = jnp.where(counts, weight, 0.0)[:, None]
        reached = jnp.where(r[:, None] >= EDGES, 1.0, 0.0)
        tail = state.tail + weight * (reached - state.tail)
        rare = jnp.where(tail <= allowed, EDGES, EDGES[:, -1:])
        run = jnp.where(unusual, state.run + 1, 0)
        longer = jnp.maximum(run, 1).astype(jnp.float32)
        run_mean = state.run_mean + (value - state.run_mean) / longer
        most = jnp.where(is_log, MOST_OCTAVES, MOST_SPREADS * spread)
        free = before < jnp.where(is_log, 2, FIRST_COUNTED)
        most = jnp.where(free, jnp.inf, most)
        # Of a signal that is constant, the spread is not known yet.
        constant = ~is_log & (state.spread <= 0) & (distance == 0)
        near = jnp.clip(distance, -most, most)
        w = jnp.maximum(LEVEL_WEIGHT, 1 / (before + 1))
        most_run = jnp.maximum(patience, LASTING)
        lasting = unusual & (state.run.astype(jnp.float32) >= most_run)
        wider = state.spread + w * (jnp.abs(near) - state.spread)
        # A run of unusual values widens the spread by its first, so it stays unusual.
        spread_now = jnp.where(unusual & (state.run > 0), state.spread, wider)
        return RarityState(
            tail,
            jnp.where(lasting, state.run_mean, state.level + w * near),
            jnp.where(is_log | (before < 1), 0.0, spread_now),
            jnp.min(rare, axis=-1),
            jnp.where(unusual, run_mean, 0.0),
            jnp.where(lasting, 0, run),
            jnp.where(constant, 1, increment(state.seen)),
        )

    return init, limit, update
