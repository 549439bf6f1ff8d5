"""The explosion-aware schedule of `optax.inject_hyperparams`, which sees the loss."""

from typing import Any

import jax
import jax.numpy as jnp

from .._checks import described
from .._norms import measure
from ..responses._explosions import ExplosionSettings
from ..thresholds._base import Threshold
from ..thresholds._signals import is_norm
from ._explosion_aware import (
    BaseSchedule,
    ExplosionAware,
    ScheduleState,
    after_step,
    explosion_aware,
    init_schedule,
    judged,
    rate_now,
    unjudged,
)

NAME = "explosion_aware_schedule"


class ExplosionAwareSchedule:
    """An `optax.schedules.StatefulSchedule`; build it with its function."""

    def __init__(self, parts: ExplosionAware):
        self._parts = parts

    def init(self) -> ScheduleState:
        """The state before the first step."""
        return init_schedule(self._parts, None)

    def __call__(self, state: ScheduleState, **extra_args: Any) -> jax.Array:
        """The learning rate of this step, rank-0, float32.

        Without any extra argument, as `optax.inject_hyperparams` asks at `init`, the
        rate if the step is calm.
        """
        if not isinstance(state, ScheduleState):
            raise TypeError(
                f"`{NAME}` keeps a state, so an optimizer must get it through "
                "`optax.inject_hyperparams(optax.adamw)(learning_rate=schedule)`; "
                f"called with a step count, it got {described(state)}."
            )
        if extra_args:
            words = self._words(state, extra_args)
        else:
            words = unjudged(self._parts, state)
        verdict = self._parts.rule.propose(state.explosions, words)
        return rate_now(self._parts, state, verdict.lr_scale).astype(jnp.float32)

    def update(self, state: ScheduleState, **extra_args: Any) -> ScheduleState:
        """The state after this step."""
        words = self._words(state, extra_args)
        return after_step(self._parts, state, words, taken=jnp.ones((), bool))

    def _words(self, state: ScheduleState, extra_args: dict[str, Any]):
        return judged(self._parts, state, measure(None), None, None, extra_args)


def explosion_aware_schedule(
    schedule: BaseSchedule,
    *thresholds: Threshold,
    factor: float | jax.Array = 0.5,
    confirm_steps: int | jax.Array = 1,
    hold_steps: int | jax.Array = 10,
    regrow_steps: int | jax.Array = 100,
    min_scale: float | jax.Array = 1e-4,
    advance: str = "always",
) -> ExplosionAwareSchedule:
    """Lowers a schedule at explosions of the loss, holds it there, and lets it regrow.

        rate_t = schedule(p_t) * k_t;    p_{t+1} = p_t + 1,  p_0 = 0

    with k_t in [min_scale, 1] the factor of `back_off` at step t, which takes every
    step as taken. The rate never exceeds the base schedule's own.

    A schedule never sees a gradient: thresholds watch of="value", passed as `value=` to
    `update`, or a function of what else is passed. Inside a guard, a step that the
    guard rejects leaves this state as it was, whatever `advance`: the schedule waits,
    and does not learn of the explosion. There, put `back_off` beside `skip` instead.

    Nor can it clip while the rate is low: for `limit=`, use one of the two other doors
    to the same machine, `scale_by_explosion_aware_schedule` in a chain and `back_off`
    in a guard.

    Args:
        schedule: The base schedule: a number, or a function of the step such as
            `optax.cosine_decay_schedule(...)`.
        *thresholds: What counts as an explosion; at least one. With of="value", or with
            a function `(updates, params, extra) -> scalar` of `extra`, the arguments
            passed by name to `update`; the other two are None.
        factor: One cut. Dimensionless, in (0, 1).
        confirm_steps: Explosions in a row that it takes to cut, >= 1.
        hold_steps: Calm steps that arm the next cut and start regrowth, >= 0.
        regrow_steps: Calm steps that undo one cut, >= 1.
        min_scale: Smallest k_t, in (0, 1].
        advance: When p_t moves on. "always": at every step, so that a schedule of
            10,000 steps ends at step 10,000. "calm": not at steps that explode or whose
            signal is nan or inf.

    Returns:
        A stateful schedule, for a hyperparameter of `optax.inject_hyperparams`. Its
        rate is float32. With parameters in bfloat16, build with
        `optax.inject_hyperparams(optax.adamw, hyperparam_dtype=jnp.float32)`: else
        optax rounds all numbers to their dtype, Adam's b2 of 0.999 to 1, and every
        update is nan.

    Raises:
        TypeError: If `schedule` is neither a number nor a function, or an argument is
            not a threshold; when a step is traced, if an optimizer was given the
            schedule without `optax.inject_hyperparams`.
        ValueError: If no threshold is given, if one watches a norm, or a concrete
            argument is out of range; at a step without the `value=` it needs.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import stablegrad as sg
        >>> rate = sg.explosion_aware_schedule(1e-3, sg.fixed(5.0, of="value"))
        >>> tx = optax.inject_hyperparams(optax.adamw)(learning_rate=rate)
        >>> params = {"w": jnp.ones(2)}
        >>> state = tx.init(params)
        >>> for loss in (1.0, 9.0):
        ...     _, state = tx.update(params, state, params, value=loss)
        >>> round(state.hyperparams["learning_rate"].item(), 6)
        0.0005

    Reference:
        `optax.schedules.StatefulSchedule`, the interface.
    """
    settings = ExplosionSettings(
        factor, confirm_steps, hold_steps, regrow_steps, min_scale
    )
    parts = explosion_aware(NAME, schedule, thresholds, settings, advance)
    for threshold in thresholds:
        if is_norm(threshold.of):
            raise ValueError(
                f"`{NAME}` never sees a gradient, got "
                f"`{threshold.name}(..., of={threshold.of!r})`. Watch the loss, or "
                "what you pass yourself:\n"
                "  of='value', with tx.update(grads, state, params, value=loss)\n"
                "  of=lambda updates, params, extra: extra['norm'], with\n"
                "     tx.update(grads, state, params, norm=optax.global_norm(grads))\n"
                "or use what does see it: `scale_by_explosion_aware_schedule` in a "
                "chain, `back_off` in a `guard`."
            )
    return ExplosionAwareSchedule(parts)
