"""Back off: lower the learning rate after an explosion, then let it regrow."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from .._checks import require
from .._trees import increment
from ..thresholds._core import Threshold
from ._core import Response, any_true, check_thresholds, proceed


class BackOffState(NamedTuple):
    """State of `back_off`."""

    scale_at_cut: jax.Array  # float32, in [min_scale, 1]: just after the last cut.
    regrown_steps: jax.Array  # int32: calm steps of regrowth since then, saturating.
    hold_left: jax.Array  # int32, >= 0: calm steps before it regrows.
    explosion_run: jax.Array  # int32: explosions in a row so far.
    may_cut: jax.Array  # bool: a step was taken since the last cut.


def back_off(
    *thresholds: Threshold,
    factor: float | jax.Array = 0.5,
    confirm_steps: int | jax.Array = 1,
    hold_steps: int | jax.Array = 10,
    regrow_steps: int | jax.Array = 1000,
    min_scale: float | jax.Array = 1e-4,
) -> Response:
    """Multiplies the learning rate by `factor` at an explosion, holds, then regrows.

    With e_t: some threshold is exceeded for the `confirm_steps`-th time in a row or
    later; a_t: a step has been taken since the last cut; and c_t: `hold_steps` steps
    have been taken and calm since the last explosion:

        k_t = max(factor * k_{t-1}, min_scale)               if e_t and a_t
        k_t = min(1, k_{t-1} * factor ** (-1 / regrow_steps))  if c_t, else k_{t-1}

    A nan or inf is no explosion, nor the end of a run of them: it says nothing of the
    learning rate. Pass `nonfinite()` to cut at one all the same. The update of step t
    is multiplied by the cut k at once, and by the regrown k from the next step on. A
    run of rejected steps cuts once: a learning rate can only be to blame for steps that
    were taken. Regrowth undoes one cut in `regrow_steps` calm steps, so the schedule's
    own rate is reached again; it is never exceeded.

    Args:
        *thresholds: What counts as an explosion; at least one.
        factor: One cut. Dimensionless, in (0, 1).
        confirm_steps: Explosions in a row that it takes to cut, >= 1. With 2, a single
            bad batch, which is no fault of the learning rate, costs nothing.
        hold_steps: Calm steps before regrowth starts, >= 0.
        regrow_steps: Calm steps that undo one cut, >= 1.
        min_scale: Smallest factor on the learning rate, in (0, 1].

    Returns:
        A response for `guard`, whose product is `lr_scale` in `metrics`.

    Raises:
        TypeError: If an argument is not a threshold.
        ValueError: If none is given, or a concrete argument is out of range.

    Example:
        >>> import optax
        >>> import stablegrad as sg
        >>> tx = sg.guard(optax.sgd(0.1), sg.back_off(sg.zscore(6.0, of="value")))
    """
    check_thresholds("back_off", thresholds)
    if not thresholds:
        raise ValueError("`back_off` must be given at least one threshold, got none.")
    require("factor", factor, "in (0, 1)", lambda x: 0 < x < 1)
    require("confirm_steps", confirm_steps, ">= 1", lambda x: 1 <= x < float("inf"))
    require("hold_steps", hold_steps, ">= 0", lambda x: 0 <= x < float("inf"))
    require("regrow_steps", regrow_steps, ">= 1", lambda x: 1 <= x < float("inf"))
    require("min_scale", min_scale, "in (0, 1]", lambda x: 0 < x <= 1)

    def init() -> BackOffState:
        return BackOffState(
            scale_at_cut=jnp.ones((), jnp.float32),
            regrown_steps=jnp.zeros((), jnp.int32),
            hold_left=jnp.zeros((), jnp.int32),
            explosion_run=jnp.zeros((), jnp.int32),
            may_cut=jnp.zeros((), bool),
        )

    def explodes(judgements):
        asked = [
            judgement.nonfinite
            for threshold, judgement in zip(thresholds, judgements, strict=True)
            if threshold.name == "nonfinite"
        ]
        broken = [jnp.any(flags) for flags in asked]
        return jnp.any(jnp.stack([any_true(judgements, "exceeded"), *broken]))

    def scale_now(state: BackOffState, exploded):
        """The factor on this step, whether it explodes for long enough, and cuts."""
        # From the count, not step by step: float32 would lose a slow regrowth.
        regrown = state.regrown_steps.astype(jnp.float32) / regrow_steps
        scale = state.scale_at_cut * jnp.asarray(factor, jnp.float32) ** -regrown
        # A factor that is traced may turn out to be nan.
        scale = jnp.where(jnp.isfinite(scale), jnp.minimum(scale, 1.0), 1.0)
        cut = jnp.maximum(scale * factor, min_scale)
        confirmed = exploded & (state.explosion_run + 1 >= confirm_steps)
        cuts = confirmed & state.may_cut & jnp.isfinite(cut)
        return jnp.where(cuts, cut, scale).astype(jnp.float32), confirmed, cuts

    def propose(state: BackOffState, judgements):
        return proceed(lr_scale=scale_now(state, explodes(judgements))[0])

    def settle(state: BackOffState, judgements, reason) -> BackOffState:
        exploded, taken = explodes(judgements), reason == 0
        unknown = any_true(judgements, "nonfinite")
        scale, confirmed, cuts = scale_now(state, exploded)
        calm = taken & ~exploded & ~unknown
        held = jnp.where(calm, jnp.maximum(state.hold_left - 1, 0), state.hold_left)
        regrows = calm & (state.hold_left == 0)
        regrown = jnp.where(
            regrows, increment(state.regrown_steps), state.regrown_steps
        )
        return BackOffState(
            scale_at_cut=jnp.where(cuts, scale, state.scale_at_cut),
            regrown_steps=jnp.where(cuts, 0, regrown),
            hold_left=jnp.where(confirmed, hold_steps, held).astype(jnp.int32),
            explosion_run=jnp.where(
                exploded,
                increment(state.explosion_run),
                jnp.where(unknown, state.explosion_run, 0),
            ),
            may_cut=taken | (state.may_cut & ~cuts),
        )

    return Response("back_off", thresholds, init, propose, settle)
