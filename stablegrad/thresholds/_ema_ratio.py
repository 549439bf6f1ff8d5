"""A multiple of the running mean: AdaGC's idea of what is normal."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from .._checks import require, require_count
from .._signals import Signal, check_signal
from .._trees import increment
from . import _statistics as stats
from ._core import Threshold


class EmaRatioState(NamedTuple):
    """State of `ema_ratio`."""

    first_values: jax.Array  # float32 (groups, warmup_steps): fills during warm-up.
    finite_seen: jax.Array  # int32 (groups,): finite steps so far, saturating.
    running_mean: jax.Array  # float32 (groups,), in the signal's unit.
    exceedances: stats.Run


def ema_ratio(
    ratio: float | jax.Array,
    *,
    decay: float | jax.Array = 0.98,
    warmup_steps: int = 25,
    patience: int = 50,
    of: Signal = "grad_norm",
    per: str = "global",
) -> Threshold:
    """Calls a signal normal up to `ratio` times its own running mean.

    With h = max(ratio - 1, 1) and w_t = clip(x_t, m - h |m|, m + h |m|), m = m_{t-1}:

        limit_t = m + (ratio - 1) |m|                      (ratio * m where m > 0)
        m_t = d m + (1 - d) w_t

    The first `warmup_steps` finite values set m to their median; before, nothing is
    flagged. A value counts at no more than twice the mean (or `ratio` times, if that is
    more), so one outlier moves it by a few per cent, while a lasting rise lifts it by
    the factor 1 + (1 - d) a step or more. From the `patience`-th exceedance in a row
    on, each moves the mean half of the way to the smallest of them. A mean of zero
    flags nothing: it would never recover.

    Args:
        ratio: Tolerated multiple of the mean. Dimensionless, > 1.
        decay: Weight d of the past, in [0, 1). Half-life 34 steps at 0.98.
        warmup_steps: Finite steps before anything is flagged, >= 1.
        patience: Exceedances in a row after which the mean follows, >= 1 step.
        of: What is measured, as for `fixed`.
        per: "global" or "leaf", as for `fixed`.

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
    require_count("patience", patience)

    def init(groups: int) -> EmaRatioState:
        return EmaRatioState(
            first_values=jnp.zeros((groups, warmup_steps), jnp.float32),
            finite_seen=jnp.zeros((groups,), jnp.int32),
            running_mean=jnp.zeros((groups,), jnp.float32),
            exceedances=stats.init_run(groups),
        )

    def limit(state: EmaRatioState, groups: int) -> jax.Array:
        mean = state.running_mean
        armed = (state.finite_seen >= warmup_steps) & (mean != 0)
        return jnp.where(armed, mean + (ratio - 1) * jnp.abs(mean), jnp.inf)

    def warm_up(state: EmaRatioState, value, exceeded) -> EmaRatioState:
        del exceeded
        first_values = stats.write(state.first_values, state.finite_seen, value)
        seen = increment(state.finite_seen)
        return state._replace(
            first_values=first_values,
            finite_seen=seen,
            running_mean=stats.median(first_values, seen),
        )

    def track(state: EmaRatioState, value, exceeded) -> EmaRatioState:
        mean = state.running_mean
        reach = jnp.maximum(ratio - 1, 1.0) * jnp.abs(mean)
        bounded = jnp.where(
            mean == 0, value, jnp.clip(value, mean - reach, mean + reach)
        )
        run = stats.extend_run(state.exceedances, value, exceeded, patience)
        return state._replace(
            finite_seen=increment(state.finite_seen),
            running_mean=stats.rebased(
                mean + (1 - decay) * (bounded - mean), run, patience
            ),
            exceedances=run,
        )

    def update(state: EmaRatioState, signal, exceeded) -> EmaRatioState:
        value = stats.to_scale(signal, in_log=False)
        warming = state.finite_seen < warmup_steps
        return stats.per_group(warming, warm_up, track, state, value, exceeded)

    return Threshold("ema_ratio", of, per, init, limit, update)
