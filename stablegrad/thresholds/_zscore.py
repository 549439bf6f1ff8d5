"""A robust running z-score: the default idea of what is normal."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from .._checks import require, require_count
from ..granularity._groups import Granularity
from . import _statistics as stats
from ._base import Family, Scope, Threshold
from ._signals import Signal, check_signal, is_norm


class Track(NamedTuple):
    """Level and spread of a signal on one scale, linear or logarithmic."""

    recent: stats.Recent
    center: jax.Array  # float32 (groups,): running level m.
    spread: jax.Array  # float32 (groups,), >= 0: running standard deviation s.


class ZScoreState(NamedTuple):
    """State of `zscore`. Norms have a logarithmic track only, other signals both."""

    tracks: tuple[Track, ...]
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
    """Calls a signal normal up to `z` robust standard deviations above its level.

    With y_t = log x_t, s* = max(s_{t-1}, floor), r_t = clip(y_t - m_{t-1}, +-2.5 s*):

        limit_t = exp(m_{t-1} + z s*)
        m_t = m_{t-1} + (1 - d) r_t
        s_t^2 = d (s*^2 + 1.06 (1 - d) r_t^2);    s_t = s* if y_t < m_{t-1} - z s*

    The first `warmup_steps` finite values set m to their median M and s to 1.4826 times
    their median absolute deviation D: up to half of them may be outliers. Meanwhile a
    norm is held against exp(M + z max(D, 1)) of those before it, so that only the very
    first is taken on trust; other signals are not flagged yet. A clipped residual means
    that one outlier, however huge, widens s by 5 %, so it cannot hide the next; yet s
    does grow at every outlier (d (1 + 6.6 (1 - d)) > 1), so no level is refused for
    ever. From the `patience`-th value in a row on that is flagged, or lies below m - z
    s*, m and s follow M and D of the last `warmup_steps` values instead: s = D, and m
    goes half of the way to M each step, all of it once |M - m| <= 2 z D. A lasting
    shift by any factor is normal after `patience` and at most 12 steps.

    Norms are close to lognormal. Other signals can be negative, so they are followed
    with y_t = x_t as well, and the limit is the larger of the two, or the linear one
    alone after a value that was not positive: small losses have a heavy tail, whose
    healthy steps are outliers on the linear scale only.

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
        per: For what, as for `fixed`.

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
    norm = is_norm(of)
    family = Family(
        ("zscore", warmup_steps, patience, norm),
        (z, decay, spread_floor),
        lambda settings: _rule(settings, warmup_steps, patience, norm),
    )
    return Threshold("zscore", of, per, *family.build(family.settings), family=family)


def _rule(settings: tuple, warmup_steps: int, patience: int, norm: bool):
    """How a z-score starts, limits and learns; settings may differ by group."""
    z, decay, spread_floor = settings
    scales = (True,) if norm else (True, False)  # Logarithmic or not.

    def init(groups: int) -> ZScoreState:
        def track():
            zeros = jnp.zeros((groups,), jnp.float32)
            return Track(stats.init_recent(groups, warmup_steps), zeros, zeros)

        return ZScoreState(tuple(track() for _ in scales), jnp.ones((groups,), bool))

    def floored(track: Track, in_log: bool) -> jax.Array:
        return stats.floored(track.spread, track.center, spread_floor, in_log)

    def limit(state: ZScoreState, scope: Scope) -> jax.Array:
        del scope
        log, *linear = (
            stats.from_scale(track.center + z * floored(track, in_log), in_log)
            for track, in_log in zip(state.tracks, scales, strict=True)
        )
        if linear:
            both = jnp.maximum(log, linear[0])
            log = jnp.where(state.always_positive, both, linear[0])
        track = state.tracks[0]
        early: jax.Array | float = jnp.inf
        if norm:
            seen = track.recent.finite_seen
            early = stats.early_limit(seen, track.center, track.spread, z)
        return jnp.where(stats.warming(track.recent), early, log)

    def follow(track: Track, in_log: bool, signal, exceeded) -> Track:
        value = stats.to_scale(signal, in_log)
        center, spread = track.center, floored(track, in_log)
        warming = stats.warming(track.recent)
        below = ~warming & (value < center - z * spread)
        recent, moved, level, deviation = stats.remember(
            track.recent, value, exceeded, below, patience, like=(center, spread)
        )
        reach = z * stats.floored(deviation, level, spread_floor, in_log)
        residual = jnp.clip(
            value - center, -stats.WINSOR * spread, stats.WINSOR * spread
        )
        # Relative to the spread, so that no square overflows.
        square = stats.CONSISTENCY * jnp.square(residual / spread)
        widening = decay * (1 + (1 - decay) * square)
        # Low values are no danger: they must not loosen the limit on high ones.
        widened = spread * jnp.where(below, 1.0, jnp.sqrt(widening))
        tracked = center + (1 - decay) * residual
        followed = jnp.where(moved, stats.follow(center, level, reach), tracked)
        return Track(
            recent,
            center=jnp.where(warming, level, followed),
            spread=jnp.where(warming | moved, deviation, widened),
        )

    def update(state: ZScoreState, signal, exceeded) -> ZScoreState:
        return ZScoreState(
            tuple(
                follow(track, in_log, signal, exceeded)
                for track, in_log in zip(state.tracks, scales, strict=True)
            ),
            state.always_positive & (signal > 0),
        )

    return init, limit, update
