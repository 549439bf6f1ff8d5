"""The explosion-aware schedule of `optax.inject_hyperparams`, which sees the loss."""

from typing import Any

import jax
import jax.numpy as jnp

from .._checks import short_repr
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
        """Return the state before the first step."""
        return init_schedule(self._parts, None)

    def __call__(self, state: ScheduleState, **extra_args: Any) -> jax.Array:
        """Return the learning rate of this step, rank-0, float32.

        Without extra arguments, as `optax.inject_hyperparams` calls it at `init`, take
        the step as calm.
        """
        if not isinstance(state, ScheduleState):
            raise TypeError(
                f"`{NAME}` keeps a state, so an optimizer must get it through "
                "`optax.inject_hyperparams(optax.adamw)(learning_rate=schedule)`; "
                f"called with a step count, it got {short_repr(state)}."
            )
        parts = self._parts
        known = (
            self._judged(state, extra_args) if extra_args else unjudged(parts, state)
        )
        verdict = parts.rule.propose(state.explosions, known)
        return rate_now(parts, state, verdict.lr_scale).astype(jnp.float32)

    def update(self, state: ScheduleState, **extra_args: Any) -> ScheduleState:
        """Return the state after this step."""
        judgements = self._judged(state, extra_args)
        return after_step(self._parts, state, judgements, taken=jnp.ones((), bool))

    def _judged(self, state: ScheduleState, extra_args: dict[str, Any]):
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
    """Lower a schedule at explosions of the loss, hold it there, and let it regrow.

        rate_t = schedule(p_t) * k_t;    p_{t+1} = p_t + 1,  p_0 = 0

    with k_t in [min_scale, 1] the factor of `back_off` at step t, which counts every
    step as taken. The rate never exceeds the base schedule's own.

    A schedule sees no gradient: thresholds watch the loss, or what else is passed to
    `update`, and there is no `limit=`. To clip as well, use
    `scale_by_explosion_aware_schedule` in a chain. Inside a guard, use `back_off`: a
    rejected step leaves this state as it was, and teaches it nothing.

    Args:
        schedule: The base schedule: a number, or a function of the step such as
            `optax.cosine_decay_schedule(...)`.
        *thresholds: What counts as an explosion; at least one. With of="value", or with
            a function `(updates, params, extra) -> scalar` of `extra`, the arguments
            passed by name to `update`; the other two are None.
        factor: One cut. Dimensionless, in (0, 1).
        confirm_steps: As for `back_off`, >= 1.
        hold_steps: Calm steps that arm the next cut and start regrowth, >= 0.
        regrow_steps: Calm steps that undo one cut, >= 1.
        min_scale: Smallest k_t, in (0, 1].
        advance: When p_t moves on: "always", at every step; or "calm", not at steps
            that explode or whose signal is not finite.

    Returns:
        A stateful schedule of float32 rates, for `optax.inject_hyperparams`. With
        parameters in bfloat16, inject with `hyperparam_dtype=jnp.float32`: else optax
        rounds Adam's b2 of 0.999 to 1, and every update is nan. Give Adam also
        `mu_dtype=jnp.float32`, with `static_args=("mu_dtype",)`: else the dtype of mu
        changes in the first step, which `lax.scan` refuses (optax 0.2.8).

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
                f"`{NAME}` never sees a gradient, got `{threshold.name}(..., "
                f"of={threshold.of!r})`. Watch of='value', with "
                "tx.update(grads, state, params, value=loss), or a norm that you pass: "
                "of=lambda updates, params, extra: extra['norm'], with `norm=`. Or use "
                "`scale_by_explosion_aware_schedule` in a chain, or `back_off` in a "
                "guard."
            )
    return ExplosionAwareSchedule(parts)
