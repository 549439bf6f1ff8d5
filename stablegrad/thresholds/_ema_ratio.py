"""A multiple of the running mean: AdaGC's idea of what is normal."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from .._checks import require, require_count
from ..granularity._groups import Granularity
from . import _statistics as stats
from ._base import Scope, Threshold
from ._signals import Signal, check_signal, is_norm

# How much wider the limit on norms is during warm-up.
EARLY_FACTOR = 10.0


class EmaRatioState(NamedTuple):
    """State of `ema_ratio`."""

    recent: stats.Recent
    running_mean: jax.Array  # float32 (groups,), in the signal's unit.


def ema_ratio(
    ratio: float | jax.Array,
    *,
    decay: float | jax.Array = 0.98,
    warmup_steps: int = 25,
    patience: int = 50,
    of: Signal = "grad_norm",
    per: Granularity = "global",
) -> Threshold:
    """Call a signal normal up to `ratio` times its own running mean.

    With h = max(ratio - 1, 1) and w_t = clip(x_t, m - h |m|, m + h |m|), m = m_{t-1}:

        limit_t = m + (ratio - 1) |m|                      (ratio * m where m > 0)
        m_t = d m + (1 - d) w_t

    The first `warmup_steps` finite values set m to their median. Meanwhile a norm may
    be ten times as large, so only the first is accepted unchecked; other signals
    are not flagged yet. A value counts at no more than twice the mean (or `ratio`
    times, if that is more), so one outlier moves it by a few per cent, while a lasting
    rise lifts it by the factor 1 + (1 - d) a step or more. From the `patience`-th value
    in a row on that is above the limit, or below m - (1 - 1 / ratio) |m|, m follows the
    median M of the last `warmup_steps` values instead: half of the way each step, or
    all of it once |M - m| <= 2 (ratio - 1) |M|. A mean of zero flags nothing: it would
    never recover.

    Args:
        ratio: Tolerated multiple of the mean. Dimensionless, > 1.
        decay: Weight d of the past, in [0, 1). Half-life 34 steps at 0.98.
        warmup_steps: Finite steps before the limit is in full force, and values
            remembered, >= 1.
        patience: Values in a row on one side, outside the limits, after which the mean
            starts again, >= warmup_steps.
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
        >>> tx = sg.guard(optax.adam(1e-3), sg.clip(sg.ema_ratio(2.0, per="leaf")))

    Reference:
        Wang et al., AdaGC (2025), https://arxiv.org/abs/2502.11034. There the mean
        learns from clipped norms and starts at their minimum: 0.1 % a step at most.
    """
    check_signal(of, per)
    require("ratio", ratio, "> 1", lambda x: 1 < x < float("inf"))
    require("decay", decay, "in [0, 1)", lambda x: 0 <= x < 1)
    require_count("warmup_steps", warmup_steps)
    require_count("patience", patience, warmup_steps)

    def init(groups: int) -> EmaRatioState:
        return EmaRatioState(
            stats.init_recent((groups,), warmup_steps),
            jnp.zeros((groups,), jnp.float32),
        )

    def limit(state: EmaRatioState, scope: Scope) -> jax.Array:
        del scope
        mean = state.running_mean
        normal = mean + (ratio - 1) * jnp.abs(mean)
        early = EARLY_FACTOR * normal if is_norm(of) else jnp.inf
        normal = jnp.where(stats.warming(state.recent), early, normal)
        return jnp.where(mean == 0, jnp.inf, normal)

    def update(state: EmaRatioState, signal, exceeded) -> EmaRatioState:
        value = stats.to_scale(signal, in_log=False)
        mean = state.running_mean
        warming = stats.warming(state.recent)
        below = ~warming & (value < mean - (1 - 1 / ratio) * jnp.abs(mean))
        recent, moved, level, _ = stats.remember(
            state.recent, value, exceeded, below, patience, like=(mean, mean)
        )
        reach = jnp.maximum(ratio - 1, 1.0) * jnp.abs(mean)
        bounded = jnp.clip(value, mean - reach, mean + reach)
        bounded = jnp.where(mean == 0, value, bounded)
        tracked = mean + (1 - decay) * (bounded - mean)
        followed = stats.follow(mean, level, (ratio - 1) * jnp.abs(level))
        return EmaRatioState(
            recent,
            jnp.where(warming, level, jnp.where(moved, followed, tracked)),
        )

    return Threshold("ema_ratio", of, per, init, limit, update)
