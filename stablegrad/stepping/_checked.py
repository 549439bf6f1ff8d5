"""The step that is computed, checked in every element, and then kept or dropped.

Right for every transformation. It holds parameters and state twice for a moment, which
costs memory and time where there are many.
"""

from typing import Any

import jax.numpy as jnp
import optax
from jax import lax

from .. import _trees
from .._norms import measure, newly_nonfinite, scaled_norm, unmeasured
from ..engine import _decide as _judging, _look_ahead as _looking
from ..responses._reasons import Reason, first_reason
from ._core import Situation, Taken


def checked_step(now: Situation, updates, inner_state, params, ranges: Any) -> Taken:
    """Takes the step if it was called normal, and gives it back if it is not sound."""

    def take(updates, inner_state, params) -> Taken:
        clipped = _trees.scale_leaves(updates, now.verdict.gradient_scale, updates)
        update, new_inner = now.inner(clipped, inner_state, params)
        measured = measure(update, like=updates, over=now.over)
        words = _judging.judge_outgoing(
            now.responses,
            now.scopes,
            now.words,
            measured,
            _trees.inexact_leaves(update, updates),
        )
        after = _judging.verdict_on(now.responses, now.response_states, words)
        broken = newly_nonfinite(new_inner, inner_state, now.over)
        reason = first_reason(
            (
                after.reason,
                jnp.where(measured.finite, 0, int(Reason.NONFINITE_UPDATE)),
                jnp.where(broken, int(Reason.NONFINITE_STATE), 0),
            )
        )
        scales = _trees.times(after.update_scale, after.lr_scale)
        length = scaled_norm(measured, scales, update, updates)
        ahead = _looking.look_ahead(
            now.responses,
            now.response_states,
            updates,
            lambda: _trees.scale_leaves(update, scales, updates),
            length,
            params,
            now.extra,
            now.over,
        )
        scales = _trees.times(scales, ahead.step_scale)
        step = _trees.scale_leaves(update, scales, updates)
        if params is not None:
            # Scaling, adding, or the parameters' dtype may still overflow.
            moved = optax.apply_updates(params, step)
            spoilt = newly_nonfinite(moved, params, now.over)
            last = jnp.where(spoilt, int(Reason.NONFINITE_PARAMETERS), 0)
            reason = first_reason((reason, last))
        fine = reason == 0
        return Taken(
            ahead,
            _trees.select(fine, now.commit(step, params), now.held(params)),
            _trees.select(fine, new_inner, inner_state),
            measured,
            length * ahead.step_scale,
            words,
            after._replace(reason=reason),
            ranges,
        )

    def hold(updates, inner_state, params) -> Taken:
        del updates
        nothing = unmeasured(now.gradient.leaf_norms.shape[0])
        return Taken(
            _looking.unlooked(now.response_states),
            now.held(params),
            inner_state,
            nothing,
            nothing.norm,
            now.words,
            now.verdict,
            ranges,
        )

    reached = now.verdict.reason == 0
    return lax.cond(reached, take, hold, updates, inner_state, params)
