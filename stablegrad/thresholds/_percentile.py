"""A percentile of a window of past steps: AutoClip's idea of what is normal."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from .._checks import require, require_count
from ..granularity._groups import Granularity
from . import _statistics as stats
from ._base import Scope, Threshold
from ._signals import Signal, check_signal, is_norm

# During warm-up, a norm of up to this multiple of the median is normal.
EARLY_FACTOR = 12.0
# At its end, no value may lie further above the median.
RIPE_SPREADS = 6.0


class PercentileState(NamedTuple):
    """State of `percentile`."""

    recent: stats.Recent
    window: jax.Array  # float32 (groups, window): a ring of bounded values.
    filled: jax.Array  # int32 (groups,), in [0, window]: entries in use.
    window_slot: jax.Array  # int32 (groups,), in [0, window): where the next one goes.
    window_quantile: jax.Array  # float32 (groups,): percentile of the window.
    window_median: jax.Array  # float32 (groups,)


def percentile(
    q: float | jax.Array,
    *,
    window: int = 1000,
    warmup_steps: int = 25,
    patience: int = 50,
    of: Signal = "grad_norm",
    per: Granularity = "global",
) -> Threshold:
    """Call a signal normal up to a percentile of its own past.

    With x* what has entered the window of the last `window` finite steps:

        limit_t = percentile(x*, q), linearly interpolated
        x*_t = min(x_t, limit_t + |limit_t|)

    Until `warmup_steps` values have been seen, the limit on a norm is 12 times their
    median, and other signals are not flagged. At the end of this warm-up, values more
    than 6 spreads (1.48 median absolute deviations) above the median are cut to that. A
    value enters at no more than twice the limit, so a window that one huge outlier
    enters does not hide the next. After `patience` values in a row above both limit and
    median, or below the median, the window begins anew with the last `warmup_steps`
    values as they were: a lasting shift by any factor is normal after `patience` steps.

    Args:
        q: Per cent, in [0, 100]. A share of about 100 - q per cent of healthy steps is
            flagged.
        window: Steps that are remembered, >= warmup_steps. The state holds one float32
            a step and group, which every step sorts.
        warmup_steps: Finite steps before the limit is in full force, >= 2.
        patience: Values in a row on one side after which the window begins anew,
            >= warmup_steps.
        of: What is measured, as for `fixed`.
        per: The granularity, as for `fixed`.

    Returns:
        A threshold for a response. A nan or inf is never normal, and never enters the
        state.

    Raises:
        ValueError: If a concrete argument is out of range.

    Example:
        >>> import optax
        >>> import stablegrad as sg
        >>> tx = sg.guard(optax.adam(1e-3), sg.clip(sg.percentile(99.5)))

    Reference:
        Seetharaman et al., AutoClip (2020), https://arxiv.org/abs/2007.14469, with the
        tenth percentile of the whole history: nine of ten steps are clipped, a shift
        at step T is normal after step 10 T, and one nan makes all later steps nan.
    """
    check_signal(of, per)
    require("q", q, "in [0, 100]", lambda x: 0 <= x <= 100)
    require_count("warmup_steps", warmup_steps, 2)
    require_count("window", window, warmup_steps)
    require_count("patience", patience, warmup_steps)

    def init(groups: int) -> PercentileState:
        none = jnp.zeros((groups,), jnp.int32)
        return PercentileState(
            stats.init_recent((groups,), warmup_steps),
            jnp.zeros((groups, window), jnp.float32),
            none,
            none,
            jnp.zeros((groups,), jnp.float32),
            jnp.zeros((groups,), jnp.float32),
        )

    def limit(state: PercentileState, scope: Scope | None) -> jax.Array:
        del scope
        middle = state.window_median
        early: jax.Array | float = EARLY_FACTOR * middle if is_norm(of) else jnp.inf
        early = jnp.where(state.filled > 0, early, jnp.inf)
        return jnp.where(stats.warming(state.recent), early, state.window_quantile)

    def update(state: PercentileState, signal, exceeded) -> PercentileState:
        value = stats.to_scale(signal, in_log=False)
        largest, middle = limit(state, None), state.window_median
        settled = ~stats.warming(state.recent)
        recent, moved, level, spread = stats.remember(
            state.recent,
            value,
            settled & exceeded & (value > middle),
            settled & (value < middle),
            patience,
            like=(middle, middle),
        )
        bounded = jnp.minimum(value, largest + jnp.abs(largest))
        written = stats.write(state.window, state.window_slot, bounded)
        # The first values came in unjudged: now their own spread is known.
        ripe = ~settled & ~stats.warming(recent)
        most = jnp.where(ripe, level + RIPE_SPREADS * spread, jnp.inf)
        written = jnp.minimum(written, most[:, None])
        anew = jnp.zeros_like(written).at[:, :warmup_steps].set(stats.in_order(recent))
        filled = jnp.minimum(state.filled + 1, window)
        slot = (state.window_slot + 1) % window
        window_now = jnp.where(moved[:, None], anew, written)
        filled = jnp.where(moved, warmup_steps, filled)
        quantile, middle = stats.quantiles(window_now, filled, q / 100, 0.5)
        return PercentileState(
            recent._replace(outside_run=jnp.where(moved, 0, recent.outside_run)),
            window=window_now,
            filled=filled,
            window_slot=jnp.where(moved, warmup_steps % window, slot),
            window_quantile=quantile,
            window_median=middle,
        )

    return Threshold("percentile", of, per, init, limit, update)
