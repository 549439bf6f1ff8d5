"""A robust running z-score: the default idea of what is normal."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from .._checks import require, require_count
from .._signals import Signal, check_signal, is_norm
from .._trees import increment
from . import _statistics as stats
from ._core import Threshold


class ZScoreState(NamedTuple):
    """State of `zscore`; float32 fields are on the scale of the statistics."""

    first_values: jax.Array  # float32 (groups, warmup_steps): fills during warm-up.
    finite_seen: jax.Array  # int32 (groups,): finite steps so far, saturating.
    center: jax.Array  # float32 (groups,): running level m.
    spread: jax.Array  # float32 (groups,), >= 0: running standard deviation s.
    exceedances: stats.Run


def zscore(
    z: float | jax.Array,
    *,
    decay: float | jax.Array = 0.99,
    warmup_steps: int = 25,
    spread_floor: float | jax.Array = 0.05,
    patience: int = 50,
    of: Signal = "grad_norm",
    per: str = "global",
) -> Threshold:
    """Calls a signal normal up to `z` robust standard deviations above its level.

    With y_t = log x_t for norms (close to lognormal), y_t = x_t for other signals,
    s* = max(s_{t-1}, floor) and r_t = clip(y_t - m_{t-1}, -2.5 s*, 2.5 s*):

        limit_t = m_{t-1} + z s*                          (of norms: its exponential)
        m_t = m_{t-1} + (1 - d) r_t
        s_t^2 = d (s*^2 + (1 - d) r_t^2)

    The first `warmup_steps` finite values set m to their median and s to 1.4826 times
    their median absolute deviation: up to half of them may be outliers. Before, nothing
    is flagged. A clipped residual means that one outlier, however huge, widens s by
    less than 3 %, so it cannot hide the next; yet s grows at every outlier (d (1 +
    6.25 (1 - d)) > 1), so no level is refused for ever. From the `patience`-th
    exceedance in a row on, each moves m half of the way to the smallest of them: a
    lasting shift by any factor is normal after at most 12 steps more.

    Args:
        z: Tolerated standard deviations above the level, > 0. One-sided: 2.5 flags
            about 0.6 % of healthy lognormal steps.
        decay: Weight d of the past, in (0.5, 1). Half-life 69 steps at 0.99.
        warmup_steps: Finite steps before anything is flagged, >= 3.
        spread_floor: Smallest s*: in log units for norms (0.05 is 5 %), relative to
            |m| for other signals. > 0: a constant signal must not flag its last digit.
        patience: Exceedances in a row after which the level follows, >= 1 step.
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
    require_count("patience", patience)
    in_log = is_norm(of)

    def init(groups: int) -> ZScoreState:
        zeros = jnp.zeros((groups,), jnp.float32)
        return ZScoreState(
            first_values=jnp.zeros((groups, warmup_steps), jnp.float32),
            finite_seen=jnp.zeros((groups,), jnp.int32),
            center=zeros,
            spread=zeros,
            exceedances=stats.init_run(groups),
        )

    def limit(state: ZScoreState, groups: int) -> jax.Array:
        spread = stats.floored(state.spread, state.center, spread_floor, in_log)
        normal = stats.from_scale(state.center + z * spread, in_log)
        return jnp.where(state.finite_seen >= warmup_steps, normal, jnp.inf)

    def warm_up(state: ZScoreState, value, exceeded) -> ZScoreState:
        del exceeded
        first_values = stats.write(state.first_values, state.finite_seen, value)
        seen = increment(state.finite_seen)
        center, spread = stats.median_and_spread(first_values, seen)
        return state._replace(
            first_values=first_values, finite_seen=seen, center=center, spread=spread
        )

    def track(state: ZScoreState, value, exceeded) -> ZScoreState:
        spread = stats.floored(state.spread, state.center, spread_floor, in_log)
        reach = stats.WINSOR * spread
        residual = jnp.clip(value - state.center, -reach, reach)
        # Relative to the spread, so that no square overflows.
        widening = decay * (1 + (1 - decay) * jnp.square(residual / spread))
        run = stats.extend_run(state.exceedances, value, exceeded, patience)
        center = state.center + (1 - decay) * residual
        return state._replace(
            finite_seen=increment(state.finite_seen),
            center=stats.rebased(center, run, patience),
            spread=spread * jnp.sqrt(widening),
            exceedances=run,
        )

    def update(state: ZScoreState, signal, exceeded) -> ZScoreState:
        value = stats.to_scale(signal, in_log)
        warming = state.finite_seen < warmup_steps
        return stats.per_group(warming, warm_up, track, state, value, exceeded)

    return Threshold("zscore", of, per, init, limit, update)
