"""Back off: lower the learning rate after an explosion, then let it regrow."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from .._checks import require
from ..granularity._group_norms import group_scales
from ..thresholds._base import Judgement, Threshold
from ..thresholds._signals import Signal, is_outgoing
from ._base import Response, check_thresholds, proceed
from ._clip import factors, unclipped
from ._explosions import (
    MOST_EXCESS,
    Explosion,
    ExplosionSettings,
    ExplosionState,
    after_step,
    check_settings,
    init_explosions,
    scale_now,
)


def back_off(
    *thresholds: Threshold,
    factor: float | jax.Array = 0.5,
    confirm_steps: int | jax.Array = 1,
    hold_steps: int | jax.Array = 10,
    regrow_steps: int | jax.Array = 100,
    min_scale: float | jax.Array = 1e-4,
    limit: Threshold | None = None,
    limit_below: float | jax.Array = 1.0,
) -> Response:
    """Multiply the learning rate by `factor` at a rise, hold it, then let it regrow.

    x_t is the excess of a signal over its limit, and x' is the excess at the last cut.
    e_t says that a threshold is exceeded for at least the `confirm_steps`-th time in a
    row. A row starts anew where a signal is below the one before and none is above it,
    and a rejected step does not lengthen it. c_t says that `hold_steps` calm steps have
    been taken since the last explosion:

        k_t = max(factor * k_{t-1}, min_scale)        if e_t and (c_t or x_t > 2 x')
        k_t = min(1, k_{t-1} * factor ** (-1 / regrow_steps))  if c_t, else k_{t-1}

    One rise causes one cut, however long it lasts. If the excess keeps growing, there
    is another cut for each doubling, down to `min_scale`. With `confirm_steps` of 2 or
    more, a loss that has risen and falls again, as after a change of the task, causes
    no cut. A run of rejected steps also causes only one cut, because only steps that
    were taken can be the fault of the learning rate. The update of step t is multiplied
    by the cut k at once, and by the regrown k from the next step on.

    Regrowth undoes one cut in `regrow_steps` calm steps: after a cut to 1/2, k is 0.71
    after hold_steps + 50 of them and 1 after hold_steps + 100, so the schedule's own
    rate is reached again; it is never exceeded. A nan or inf neither counts as an
    explosion nor ends a run of explosions, because it says nothing about the learning
    rate. Pass `nonfinite()` to cut the rate at a nan or inf as well. Where k_t <
    `limit_below`, the step is also clipped to what `limit` calls normal.

    Args:
        *thresholds: What counts as an explosion; at least one.
        factor: One cut. Dimensionless, in (0, 1).
        confirm_steps: Explosions in a row after which the rate is cut, >= 1. With 2, a
            single bad batch, for which the learning rate is not to blame, costs
            nothing.
        hold_steps: Calm steps after which the next rise cuts again and regrowth starts,
            >= 0. 0: every explosion cuts.
        regrow_steps: Calm steps that undo one cut, >= 1. What has regrown is computed
            anew in each step, so a schedule of this or of `factor` moves k.
        min_scale: Smallest factor on the learning rate, in (0, 1].
        limit: A threshold to clip to while the rate is low, as `clip` does; exceeding
            it is not an explosion. None: no clip. A cut by an explosion of the update
            (of="update_norm") comes too late to clip the gradient of its own step.
        limit_below: The k_t below which `limit` is in force, in (0, 1]. 1: whenever the
            rate is lowered at all.

    Returns:
        A response for `guard`, whose product is `lr_scale` in `metrics`.

    Raises:
        TypeError: If an argument is not a threshold.
        ValueError: If none is given, if `limit` watches the loss, or a concrete
            argument is out of range.

    Example:
        >>> import optax
        >>> import stablegrad as sg
        >>> rule = sg.back_off(sg.zscore(6.0, of="value"), limit=sg.fixed(1.0))
        >>> tx = sg.guard(optax.sgd(0.1), rule)
    """
    settings = ExplosionSettings(
        factor, confirm_steps, hold_steps, regrow_steps, min_scale
    )
    return explosion_response("back_off", thresholds, settings, limit, limit_below)


def explosion_response(
    asker: str,
    thresholds: tuple[Threshold, ...],
    settings: ExplosionSettings,
    limit: Threshold | None = None,
    limit_below: float | jax.Array = 1.0,
) -> Response:
    """Return the response of `back_off`, whose errors name `asker`.

    Its thresholds are those given and then `limit`.
    """
    clips = () if limit is None else (limit,)
    check_thresholds(asker, (*thresholds, *clips))
    if not thresholds:
        raise ValueError(f"`{asker}` must be given at least one threshold, got none.")
    if limit is not None and limit.of == "value":
        raise ValueError(
            "`limit` must watch a norm, got a threshold with of='value': a large loss "
            "does not say how far to shrink a gradient."
        )
    check_settings(settings)
    require("limit_below", limit_below, "in (0, 1]", lambda x: 0 < x <= 1)

    def propose(state: ExplosionState, judgements):
        seen = explosion(thresholds, judgements)
        verdict = proceed(lr_scale=scale_now(settings, state, seen)[0])
        if limit is None:
            return verdict
        outgoing = is_outgoing(limit.of)
        # The gradient can only be clipped for what is known before the optimizer runs.
        in_time = explosion(thresholds, judgements, lambda of: not is_outgoing(of))
        seen = seen if outgoing else in_time
        low = scale_now(settings, state, seen)[0] < limit_below
        scales = group_scales(judgements[-1].grouping, factors(judgements[-1]))
        clipped = scales.where(low)
        if outgoing:
            reason = jnp.where(low, unclipped(limit, judgements[-1]), 0)
            return verdict._replace(update_scales=clipped, reason=reason)
        return verdict._replace(gradient_scales=clipped)

    def settle(state: ExplosionState, judgements, reason) -> ExplosionState:
        seen = explosion(thresholds, judgements)
        return after_step(settings, state, seen, taken=reason == 0)

    init = functools.partial(init_explosions, len(thresholds))
    return Response(asker, (*thresholds, *clips), init, propose, settle)


def explosion(
    thresholds: tuple[Threshold, ...],
    judgements: tuple[Judgement, ...],
    counts: Callable[[Signal], bool] = lambda of: True,
) -> Explosion:
    """Return what a step tells by its judgements, of signals that count.

    Judgements beyond those of `thresholds` are left out.
    """
    none = jnp.zeros((), bool)
    exploded, unknown, excess, height = none, none, [], []
    for threshold, judgement in zip(thresholds, judgements, strict=False):
        above, bad = judgement.exceeded, judgement.nonfinite & counts(threshold.of)
        above &= counts(threshold.of)
        unknown |= jnp.any(bad)
        if threshold.name == "nonfinite":
            above |= bad
        exploded |= jnp.any(above)
        over = jnp.minimum(judgement.signal - judgement.limit, MOST_EXCESS)
        over = jnp.where(bad, MOST_EXCESS, over)
        excess.append(jnp.max(jnp.where(above, over, 0.0), initial=0.0))
        bounded = jnp.clip(judgement.signal, -MOST_EXCESS, MOST_EXCESS)
        top = jnp.where(bad, MOST_EXCESS, bounded)
        height.append(
            jnp.max(jnp.where(above, top, -MOST_EXCESS), initial=-MOST_EXCESS)
        )
    return Explosion(exploded, unknown, jnp.stack(excess), jnp.stack(height))
