"""The explosion-aware schedule of a chain, which sees the updates that reach it."""

import jax
import jax.numpy as jnp
import optax

from .._checks import require_state
from .._compiled import compiled
from .._norms import measure
from .._placing import placed_like
from .._scales import scale_leaves, uniform
from ..responses._explosions import ExplosionSettings
from ..thresholds._base import Threshold
from ..thresholds._signals import is_outgoing
from ._explosion_aware import (
    BaseSchedule,
    ScheduleState,
    after_step,
    explosion_aware,
    init_schedule,
    judged,
    rate_now,
)

NAME = "scale_by_explosion_aware_schedule"


def scale_by_explosion_aware_schedule(
    schedule: BaseSchedule,
    *thresholds: Threshold,
    factor: float | jax.Array = 0.5,
    confirm_steps: int | jax.Array = 1,
    hold_steps: int | jax.Array = 10,
    regrow_steps: int | jax.Array = 100,
    min_scale: float | jax.Array = 1e-4,
    limit: Threshold | None = None,
    limit_below: float | jax.Array = 1.0,
    advance: str = "always",
    flip_sign: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Multiply updates by a schedule that backs off at explosions and regrows.

        u_t = schedule(p_t) * k_t * s_t * g_t;    p_{t+1} = p_t + 1,  p_0 = 0

    with k_t in [min_scale, 1] the factor of `back_off` at step t, and s_t that of
    `clip` by `limit` where k_t < limit_below, else 1. A step is never larger than the
    base schedule's own.

    Inside a guard, a rejected step leaves this state as it was, and teaches it nothing:
    there, put `back_off` beside `skip` instead.

    Args:
        schedule: The base schedule: a number, or a function of the step such as
            `optax.cosine_decay_schedule(...)`. It is traced, also outside `jax.jit`.
        *thresholds: What counts as an explosion; at least one. Here "grad_norm" is the
            norm of the updates that reach this transformation, before it scales them.
        factor: One cut. Dimensionless, in (0, 1).
        confirm_steps: As for `back_off`, >= 1.
        hold_steps: Calm steps that arm the next cut and start regrowth, >= 0.
        regrow_steps: Calm steps that undo one cut, >= 1.
        min_scale: Smallest k_t, in (0, 1].
        limit: A threshold to clip to while k_t is low; None: no clip.
        limit_below: The k_t below which `limit` is in force, in (0, 1].
        advance: When p_t moves on: "always", at every step; or "calm", not at steps
            that explode or are not finite.
        flip_sign: Whether to multiply by -1, to descend at the end of a chain. A
            positive schedule climbs, as in `optax.scale_by_schedule`.

    Returns:
        A transformation for `optax.chain`. A step with a nan or inf anywhere, the
        schedule's rate included, becomes zeros and is counted: it neither ends a hold
        nor regrows.

    Raises:
        TypeError: If `schedule` is neither a number nor a function, or an argument is
            not a threshold.
        ValueError: If no threshold is given, if one watches what a chain cannot see, or
            a concrete argument is out of range; at a step without the `value=` or
            `params` that a threshold needs.

    Example:
        >>> import optax
        >>> import stablegrad as sg
        >>> schedule = optax.cosine_decay_schedule(1e-3, 10_000)
        >>> rate = sg.scale_by_explosion_aware_schedule(
        ...     schedule, sg.zscore(6.0, of="value"), flip_sign=True
        ... )
        >>> tx = optax.chain(optax.scale_by_adam(), rate)

    Reference:
        `optax.scale_by_schedule`, which this equals while nothing explodes.
    """
    settings = ExplosionSettings(
        factor, confirm_steps, hold_steps, regrow_steps, min_scale
    )
    parts = explosion_aware(
        NAME, schedule, thresholds, settings, advance, limit, limit_below
    )
    for threshold in parts.rule.thresholds:
        if is_outgoing(threshold.of):
            raise ValueError(
                f"`{NAME}` cannot watch of='update_norm', got "
                f"`{threshold.name}(..., of='update_norm')`: in a chain, what reaches "
                "it is of='grad_norm'. Place it after the optimizer and watch that."
            )

    def init_fn(params) -> ScheduleState:
        return placed_like(init_schedule(parts, params), params)

    def update_fn(updates, state, params=None, **extra):
        measured = measure(updates)
        judgements = judged(parts, state, measured, updates, params, extra)
        verdict = parts.rule.propose(state.explosions, judgements)
        rate = rate_now(parts, state, verdict.lr_scale)
        rate = -rate if flip_sign else rate
        scales = verdict.gradient_scales or uniform()
        finite = measured.finite & jnp.isfinite(rate)
        scaled = scale_leaves(updates, scales.times(rate), updates, finite)
        return scaled, after_step(parts, state, judgements, finite)

    check = lambda state: require_state(NAME, ScheduleState, state)
    return optax.GradientTransformationExtraArgs(init_fn, compiled(update_fn, check))
