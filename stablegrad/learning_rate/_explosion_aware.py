"""A base schedule and a back-off, joined: shared by the explosion-aware schedules."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._checks import require
from .._mapped_axes import LOCAL
from .._norms import Measurement
from .._packing import encode
from .._trees import count_if, distinct
from ..engine._decide import StepContext, judge_incoming, limits_of
from ..engine._families import Statistics
from ..responses._back_off import explosion, explosion_response
from ..responses._base import Response
from ..responses._explosions import ExplosionSettings, ExplosionState
from ..responses._reasons import Reason
from ..thresholds._base import Judgement, Threshold, unobserved

# A number, or a function of the step, such as optax's own schedules.
BaseSchedule = float | jax.Array | Callable[[Any], Any]

ADVANCES = ("always", "calm")


class ScheduleReadings(NamedTuple):
    """What an explosion-aware schedule did, for `metrics`; rank-0, all finite."""

    schedule_lr_scale: jax.Array  # float32 in (0, 1]: factor on the base schedule.
    schedule_rate: jax.Array  # float32, `encode`d: the base schedule times that.
    schedule_position: jax.Array  # int32: the base schedule's next step, saturating.
    schedule_cuts: jax.Array  # int32: steps that lowered the factor, since `init`.
    schedule_dropped_steps: jax.Array  # int32: steps not finite, which became zeros.


class ScheduleState(NamedTuple):
    """State of an explosion-aware schedule."""

    explosion_thresholds: tuple  # Statistics of each family of thresholds.
    explosions: ExplosionState
    schedule_readings: ScheduleReadings


class ExplosionAware(NamedTuple):
    """A base schedule, the back-off on top of it, and when the former advances."""

    rate: Callable[[jax.Array], jax.Array]  # int32 step -> (), float32 or wider.
    thresholds: tuple[Threshold, ...]  # Of explosions; the rule's may have one more.
    rule: Response
    advance: str
    statistics: Statistics


def explosion_aware(
    asker: str,
    schedule: BaseSchedule,
    thresholds: tuple[Threshold, ...],
    settings: ExplosionSettings,
    advance: str,
    limit: Threshold | None = None,
    limit_below: float | jax.Array = 1.0,
) -> ExplosionAware:
    """Check and join the pieces; errors name `asker`."""
    numbers = (int, float, np.ndarray, np.generic, jax.Array)
    number = isinstance(schedule, numbers) and not isinstance(schedule, bool)
    if not (number or callable(schedule)):
        raise TypeError(
            "`schedule` must be a number or a function of the step, such as "
            f"`optax.cosine_decay_schedule(1e-3, 10_000)`, got {schedule!r}."
        )
    if number:
        finite = lambda x: np.ndim(x) == 0 and 0 <= x < float("inf")
        require("schedule", schedule, "one finite number >= 0 or a function", finite)
    rule = explosion_response(asker, thresholds, settings, limit, limit_below)
    require("advance", advance, f"one of {ADVANCES}", lambda x: x in ADVANCES)

    def rate(position) -> jax.Array:
        now = jnp.asarray(schedule(position) if callable(schedule) else schedule)
        if now.ndim or jnp.iscomplexobj(now):
            raise ValueError(
                "`schedule` must return one real number a step, got shape "
                f"{now.shape} and dtype {now.dtype}."
            )
        inexact = jnp.issubdtype(now.dtype, jnp.floating)
        return now.astype(np.promote_types(now.dtype if inexact else "f4", "f4"))

    return ExplosionAware(rate, thresholds, rule, advance, Statistics((rule,)))


def init_schedule(parts: ExplosionAware, params) -> ScheduleState:
    """Return the state before the first step."""
    one, none = jnp.ones((), jnp.float32), jnp.zeros((), jnp.int32)
    readings = ScheduleReadings(one, jnp.zeros((), jnp.float32), none, none, none)
    states = (parts.statistics.init(params), parts.rule.init_state(), readings)
    return ScheduleState(*distinct(states))


def judged(
    parts: ExplosionAware,
    state: ScheduleState,
    measured: Measurement,
    updates,
    params,
    extra: dict[str, Any],
) -> tuple[Judgement, ...]:
    """Return the judgement of every threshold of the rule."""
    step = StepContext(updates, params, updates, extra, LOCAL)
    rules = (parts.rule,)
    scopes, limits = limits_of(
        rules, parts.statistics, state.explosion_thresholds, step
    )
    (judgements,) = judge_incoming(rules, scopes, limits, measured, step)
    return judgements


def unjudged(parts: ExplosionAware, state: ScheduleState) -> tuple[Judgement, ...]:
    """Return the judgements of a step in which no signal was measured."""
    step = StepContext(None, None, None, {}, LOCAL)
    (scopes,), (limits,) = limits_of(
        (parts.rule,), parts.statistics, state.explosion_thresholds, step
    )
    return tuple(
        unobserved(threshold, limit, scope.grouping)
        for threshold, limit, scope in zip(
            parts.rule.thresholds, limits, scopes, strict=True
        )
    )


def rate_now(parts: ExplosionAware, state: ScheduleState, lr_scale) -> jax.Array:
    """Return the base schedule's rate at its position, times the back-off's factor."""
    rate = parts.rate(state.schedule_readings.schedule_position)
    return rate * lr_scale.astype(rate.dtype)


def after_step(
    parts: ExplosionAware,
    state: ScheduleState,
    judgements: tuple[Judgement, ...],
    taken,
) -> ScheduleState:
    """Return the state after a step with these judgements, taken or not."""
    seen = explosion(parts.thresholds, judgements)
    calm = taken & ~seen.exploded & ~seen.unknown
    moves = calm | (parts.advance == "always")
    reason = jnp.where(taken, 0, int(Reason.NONFINITE_GRADIENT)).astype(jnp.int32)
    lr_scale = parts.rule.propose(state.explosions, judgements).lr_scale
    before = state.schedule_readings
    cut = lr_scale < before.schedule_lr_scale
    return ScheduleState(
        parts.statistics.learn(state.explosion_thresholds, [judgements]),
        parts.rule.settle(state.explosions, judgements, reason),
        ScheduleReadings(
            schedule_lr_scale=lr_scale,
            schedule_rate=encode(rate_now(parts, state, lr_scale)),
            schedule_position=count_if(moves, before.schedule_position),
            schedule_cuts=count_if(cut, before.schedule_cuts),
            schedule_dropped_steps=count_if(~taken, before.schedule_dropped_steps),
        ),
    )
