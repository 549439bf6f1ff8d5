"""A z-score over a window of past steps: the skip rule of OLMo, made robust."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from .._checks import require, require_count
from .._trees import increment
from ..granularity._groups import Granularity
from . import _statistics as stats
from ._base import Scope, Threshold
from ._signals import Signal, check_signal, is_norm


class WindowZScoreState(NamedTuple):
    """State of `window_zscore`: a ring of past values, on the statistics' scale."""

    ring: jax.Array  # float32 (groups, window), finite.
    finite_seen: jax.Array  # int32 (groups,): finite steps so far, saturating.
    ring_slot: jax.Array  # int32 (groups,), in [0, window): where the next value goes.
    center: jax.Array  # float32 (groups,): median of the ring.
    spread: jax.Array  # float32 (groups,), >= 0: its median absolute deviation.


def window_zscore(
    sigma: float | jax.Array,
    *,
    window: int = 128,
    spread_floor: float | jax.Array = 0.05,
    of: Signal = "grad_norm",
    per: Granularity = "global",
) -> Threshold:
    """Call a signal normal up to `sigma` robust deviations above a window's median.

    With y = log x for norms, y = x for other signals, over the last `window` finite
    steps before this one:

        limit_t = median(y) + sigma * max(1.4826 * MAD(y), floor)  (norms: exponential)

    Before half the window is filled, the deviation of norms counts as 1 at least, so
    only the first is accepted unchecked; other signals are not flagged yet. Raw
    values enter, and half of them may be outliers: one huge value neither moves the
    limit nor hides the next, and a lasting shift is the new median after
    window // 2 + 1 steps at the latest.

    Args:
        sigma: Tolerated deviations above the median, > 0.
        window: Steps that are remembered, >= 4. The state holds one float32 a step,
            and a leaf if per="leaf".
        spread_floor: Smallest deviation: in log units for norms (0.05 is 5 %),
            relative to |median| for other signals. > 0.
        of: What is measured, as for `fixed`.
        per: The granularity, as for `fixed`.

    Returns:
        A threshold for a response. A nan or inf is never normal, and never enters the
        window.

    Raises:
        ValueError: If a concrete argument is out of range.

    Example:
        >>> import optax
        >>> import stablegrad as sg
        >>> rules = (sg.window_zscore(6.0), sg.window_zscore(6.0, of="value"))
        >>> tx = sg.guard(optax.adam(1e-3), sg.skip(*rules))

    Reference:
        OLMo-core's SkipStepOptimizer, which takes mean and standard deviation: there
        one outlier hides the others of the next 128 steps, and one nan skips them all.
    """
    check_signal(of, per)
    require("sigma", sigma, "> 0", lambda x: 0 < x < float("inf"))
    require_count("window", window, 4)
    require("spread_floor", spread_floor, "> 0", lambda x: 0 < x < float("inf"))
    in_log = is_norm(of)

    def init(groups: int) -> WindowZScoreState:
        return WindowZScoreState(
            ring=jnp.zeros((groups, window), jnp.float32),
            finite_seen=jnp.zeros((groups,), jnp.int32),
            ring_slot=jnp.zeros((groups,), jnp.int32),
            center=jnp.zeros((groups,), jnp.float32),
            spread=jnp.zeros((groups,), jnp.float32),
        )

    def limit(state: WindowZScoreState, scope: Scope) -> jax.Array:
        del scope
        center = state.center
        spread = stats.floored(state.spread, center, spread_floor, in_log)
        normal = stats.from_scale(center + sigma * spread, in_log)
        early: jax.Array | float = jnp.inf
        if in_log:
            early = stats.early_limit(state.finite_seen, center, spread, sigma)
        return jnp.where(state.finite_seen >= window // 2, normal, early)

    def update(state: WindowZScoreState, signal, exceeded) -> WindowZScoreState:
        del exceeded
        value = stats.to_scale(signal, in_log)
        ring = stats.write(state.ring, state.ring_slot, value)
        seen = increment(state.finite_seen)
        center, spread = stats.median_and_spread(ring, seen)
        return WindowZScoreState(
            ring, seen, (state.ring_slot + 1) % window, center, spread
        )

    return Threshold("window_zscore", of, per, init, limit, update)
