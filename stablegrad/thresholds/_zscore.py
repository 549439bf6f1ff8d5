"""A robust running z-score: the default idea of what is normal."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._checks import require, require_count
from ..granularity._groups import Granularity
from . import _statistics as stats
from ._base import Family, Scope, Threshold, as_float32
from ._signals import Signal, check_signal, is_norm


class ZScoreState(NamedTuple):
    """State of `zscore`: statistics of log x and of x, along the second axis."""

    recent: stats.Recent
    center: jax.Array  # float32 (groups, 2): running level m.
    spread: jax.Array  # float32 (groups, 2), >= 0: running standard deviation s.
    always_positive: jax.Array  # bool (groups,): no value so far was zero or below.


def zscore(
    z: float | jax.Array,
    *,
    decay: float | jax.Array = 0.98,
    warmup_steps: int = 25,
    spread_floor: float | jax.Array = 0.05,
    patience: int = 50,
    of: Signal = "grad_norm",
    per: Granularity = "global",
) -> Threshold:
    """Call a signal normal up to `z` robust standard deviations above its level.

    With y_t = log x_t, s* = max(s_{t-1}, floor), r_t = clip(y_t - m_{t-1}, +-2.5 s*):

        limit_t = exp(m_{t-1} + z s*)
        m_t = m_{t-1} + (1 - d) r_t
        s_t^2 = d (s*^2 + 1.06 (1 - d) r_t^2);    s_t = s* if y_t < m_{t-1} - z s*

    The first `warmup_steps` finite values set m to their median M and s to 1.4826 times
    their median absolute deviation D: up to half of them may be outliers. Meanwhile a
    norm is held against exp(M + z max(D, 1)) of those before it, so only the first is
    accepted unchecked; other signals are not flagged yet. A clipped residual means
    that one outlier, however huge, widens s by 5 %, so it cannot hide the next; yet s
    does grow at every outlier (d (1 + 6.6 (1 - d)) > 1), so no level is refused for
    ever. Once `patience` values in a row are flagged, or lie below m - z s*, m and s
    follow M and D of the last `warmup_steps` values instead: s = D, and m moves half
    of the way to M at each step, or all of the way once |M - m| <= 2 z D. A lasting
    shift by any factor is normal after `patience` and at most 12 steps.

    Norms are close to lognormal. Other signals can be negative, so statistics of
    x_t itself are kept as well as those of log x_t. The limit is the larger of the two
    limits, because small losses have a heavy tail whose healthy steps are outliers on
    the linear scale only. After any value that was not positive, only the linear limit
    is used.

    Args:
        z: Tolerated standard deviations above the level, > 0. One-sided: 2.5 flags 0.5
            to 0.8 % of healthy lognormal steps, whatever their spread.
        decay: Weight d of the past, in (0.5, 1). Half-life 34 steps at 0.98.
        warmup_steps: Finite steps before the limit is in full force, and values
            remembered, >= 3.
        spread_floor: Smallest s*: in log units (0.05 is 5 %), relative to |m| on the
            linear scale. > 0: a constant signal must not flag its last digit.
        patience: Values in a row on one side, outside z s*, after which the statistics
            start again, >= warmup_steps.
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
        >>> tx = sg.guard(optax.adam(1e-3), sg.clip(sg.zscore(2.5)))

    Reference:
        Kumar et al., ZClip (2025), https://arxiv.org/abs/2504.02507, whose linear
        statistics of clipped norms refuse a threefold shift for ever.
    """
    check_signal(of, per)
    require("z", z, "> 0", lambda x: 0 < x < float("inf"))
    require("decay", decay, "in (0.5, 1)", lambda x: 0.5 < x < 1)
    require_count("warmup_steps", warmup_steps, 3)
    require("spread_floor", spread_floor, "> 0", lambda x: 0 < x < float("inf"))
    require_count("patience", patience, warmup_steps)
    family = Family(
        ("zscore", warmup_steps, patience),
        (z, decay, spread_floor, float(is_norm(of))),
        lambda settings: _rule(settings, warmup_steps, patience),
    )
    return Threshold("zscore", of, per, *family.build(family.settings), family=family)


def _rule(settings: tuple, warmup_steps: int, patience: int):
    """Return init, limit and update of a z-score; settings may differ by group."""
    z, decay, spread_floor, norm = as_float32(settings)
    by_scale = lambda x: x[:, None] if x.ndim else x  # Beside arrays (groups, 2).
    is_log = np.array([[True, False]])

    def init(groups: int) -> ZScoreState:
        zeros = jnp.zeros((groups, 2), jnp.float32)
        recent = stats.init_recent((groups, 2), warmup_steps)
        return ZScoreState(recent, zeros, zeros, jnp.ones((groups,), bool))

    def floored(spread, center) -> jax.Array:
        return stats.floored(spread, center, by_scale(spread_floor), is_log)

    def limit(state: ZScoreState, scope: Scope) -> jax.Array:
        del scope
        top = state.center + by_scale(z) * floored(state.spread, state.center)
        log, linear = jnp.exp(top[:, 0]), top[:, 1]
        of_value = jnp.where(state.always_positive, jnp.maximum(log, linear), linear)
        seen = state.recent.finite_seen[:, 0]
        early = stats.early_limit(seen, state.center[:, 0], state.spread[:, 0], z)
        early = jnp.where(norm > 0, early, jnp.inf)
        warming = stats.warming(state.recent)[:, 0]
        return jnp.where(warming, early, jnp.where(norm > 0, log, of_value))

    def update(state: ZScoreState, signal, exceeded) -> ZScoreState:
        value = jnp.stack(
            [stats.to_scale(signal, True), stats.to_scale(signal, False)], axis=-1
        )
        center, spread = state.center, floored(state.spread, state.center)
        warming = stats.warming(state.recent)
        below = ~warming & (value < center - by_scale(z) * spread)
        recent, moved, level, deviation = stats.remember(
            state.recent,
            value,
            jnp.broadcast_to(exceeded[:, None], value.shape),
            below,
            patience,
            like=(center, spread),
        )
        reach = by_scale(z) * floored(deviation, level)
        residual = jnp.clip(
            value - center, -stats.WINSOR * spread, stats.WINSOR * spread
        )
        # Relative to the spread, so that no square overflows.
        square = stats.CONSISTENCY * jnp.square(residual / spread)
        d = by_scale(decay)
        widening = jnp.sqrt(d * (1 + (1 - d) * square))
        # Low values are no danger: they must not loosen the limit on high ones.
        widened = spread * jnp.where(below, 1.0, widening)
        tracked = center + (1 - d) * residual
        followed = jnp.where(moved, stats.follow(center, level, reach), tracked)
        return ZScoreState(
            recent,
            jnp.where(warming, level, followed),
            jnp.where(warming | moved, deviation, widened),
            state.always_positive & (signal > 0),
        )

    return init, limit, update
