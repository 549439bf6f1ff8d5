"""The step that is shown to stay finite before it is computed, and written in place.

    proof from ranges, sample of the update -> [inspection, without a proof]
             -> commit in place, or hold

Nothing is computed twice but the sample, and nothing is held twice: a step that no
proof covers is inspected first, and then computed again to be written.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.extend import core as jex

from .. import _trees
from .._mapped_axes import Across
from .._norms import Measurement, scaled_norm, unmeasured
from ..bounds._kinds import Layout, layout_of
from ..bounds._proof import Proof, prove
from ..bounds._ranges import Ranges
from ..engine import _decide as _judging, _look_ahead as _looking
from ..responses._base import Foresight, Verdict
from ..responses._reasons import Reason, first_reason
from ._core import Situation, Taken
from ._inspect import Inspection, inspect
from ._sample import norms_of, rows_of


class _Plan(NamedTuple):
    """The optimizer's program, and what is shown of it."""

    run: Any  # updates, inner state, params -> update, inner state.
    layout: Layout
    proof: Proof


def proven_step(
    now: Situation, updates, inner_state, params, ranges: Ranges
) -> Taken | None:
    """Takes the step in place if it is normal and sound; None if no proof can be had.

    The norm of the update is that of a sample.
    """
    plan = _plan(now, updates, inner_state, params, ranges)
    if plan is None:
        return None
    operands = (updates, inner_state, params)

    def scaled_inner(updates, inner_state, params):
        scale = now.verdict.gradient_scale
        return plan.run(
            _trees.scale_leaves(updates, scale, updates), inner_state, params
        )

    def sample(updates, inner_state, params) -> list[jax.Array]:
        update, _ = scaled_inner(updates, inner_state, params)
        return rows_of(update, updates)

    def look(rows) -> tuple[Measurement, Any, Verdict]:
        measured = norms_of(rows, updates, now.over)
        words = _judging.judge_outgoing(
            now.responses,
            now.scopes,
            now.words,
            measured,
            _trees.inexact_leaves(updates),
        )
        return (
            measured,
            words,
            _judging.verdict_on(now.responses, now.response_states, words),
        )

    def pass_by(rows) -> tuple[Measurement, Any, Verdict]:
        del rows
        nothing = unmeasured(now.gradient.leaf_norms.shape[0])
        return nothing, now.words, now.verdict

    # Behind a barrier, so that a branch stays one also where no response ever rejects:
    # what only the sample reads must not be computed whole.
    reached = lax.optimization_barrier(now.verdict.reason == 0)
    # The rows leave a branch of their own: read twice in it, the update would be
    # computed whole.
    none = _trees.zeros(jax.eval_shape(sample, *operands))
    rows = lax.cond(reached, sample, lambda *_: none, *operands)
    measured, words, after = lax.cond(reached, look, pass_by, rows)
    scales = _trees.times(after.update_scale, after.lr_scale)
    unlooked = _looking.unlooked(now.response_states)
    ahead = unlooked
    if _looking.will_look(now.responses, params, now.extra):
        length = scaled_norm(measured, scales, updates)

        def look_along(updates, inner_state, params) -> Foresight:
            def step():
                update, _ = scaled_inner(updates, inner_state, params)
                return _trees.scale_leaves(update, scales, updates)

            return _looking.look_ahead(
                now.responses,
                now.response_states,
                updates,
                step,
                length,
                params,
                now.extra,
                now.over,
            )

        ahead = lax.cond(reached, look_along, lambda *_: unlooked, *operands)
    scales = _trees.times(scales, ahead.step_scale)

    def examine(updates, inner_state, params) -> Inspection:
        update, new_state = scaled_inner(updates, inner_state, params)
        moved = None
        if params is not None:
            step = _trees.scale_leaves(update, scales, updates)
            moved = optax.apply_updates(params, step)
        new = (update, new_state, moved)
        return inspect(
            plan.layout, ranges, updates, new, (inner_state, params), now.over
        )

    def trust(*_) -> Inspection:
        no = jnp.zeros((), bool)
        return Inspection(jnp.full((), -1, jnp.int32), no, no, plan.proof.ranges)

    unsure = reached & ~plan.proof.holds
    found = lax.cond(unsure, examine, trust, *operands)
    # That the sample is in this decision also has it read before anything is written.
    unsound = (
        (~(measured.norm >= 0), Reason.NONFINITE_UPDATE),
        (found.first_bad_leaf >= 0, Reason.NONFINITE_UPDATE),
        (found.state_breaks, Reason.NONFINITE_STATE),
        (found.params_break, Reason.NONFINITE_PARAMETERS),
    )
    breaks = first_reason([jnp.where(flag, int(why), 0) for flag, why in unsound])
    reason = first_reason((after.reason, breaks))
    fine = reason == 0

    def commit(updates, inner_state, params):
        update, new_state = scaled_inner(updates, inner_state, params)
        step = _trees.scale_leaves(update, scales, updates)
        return now.commit(step, params), new_state

    def hold(updates, inner_state, params):
        del updates
        return now.held(params), inner_state

    result, new_state = lax.cond(fine, commit, hold, *operands)
    return Taken(
        # Along a step that is not finite there is nothing to learn.
        _trees.select(breaks == 0, ahead, unlooked),
        result,
        new_state,
        measured._replace(first_bad_leaf=found.first_bad_leaf),
        scaled_norm(measured, scales, updates),
        words,
        after._replace(reason=reason),
        _trees.select(fine, found.ranges, ranges),
    )


def _plan(now: Situation, updates, inner_state, params, ranges) -> _Plan | None:
    """None if the step must be checked after it is computed."""
    scale = now.verdict.gradient_scale
    if isinstance(scale, tuple) or isinstance(now.verdict.update_scale, tuple):
        return None  # Factors within leaves need norms within leaves.
    program, shape = jax.make_jaxpr(now.inner, return_shape=True)(
        updates, inner_state, params
    )
    _, new_state = shape
    if not _unchanged(inner_state, new_state):
        return None
    norms = scale * now.gradient.leaf_norms if scale.ndim else scale * now.gradient.norm
    layout = layout_of(inner_state, updates if params is None else params)
    if layout.kinds != ranges.least.shape[0]:
        return None
    proof = prove(program, layout, ranges, jnp.max(norms), updates, inner_state, params)
    if proof is None:
        return None
    if now.over.names:
        proof = _agreed(proof, now.over)
    flat = jex.jaxpr_as_fun(program)
    structure = jax.tree.structure(shape)

    def run(updates, inner_state, params):
        leaves = flat(*jax.tree.leaves((updates, inner_state, params)))
        return jax.tree.unflatten(structure, leaves)

    return _Plan(run, layout, proof)


def _agreed(proof: Proof, over: Across) -> Proof:
    """The proof that holds on every device, in one exchange."""
    least, most = proof.ranges
    numbers = [jnp.where(proof.holds, 0.0, 1.0)[None], -least, most]
    fails, *bounds = jnp.split(
        over.largest(jnp.concatenate(numbers)), [1, 1 + len(least)]
    )
    return Proof(fails[0] == 0, Ranges(-bounds[0], bounds[1]))


def _unchanged(before, after) -> bool:
    """Whether a new state can be written where the old one was."""
    same = jax.tree.structure(before) == jax.tree.structure(after)
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=False)
    return same and all(
        (jnp.shape(old), jax.dtypes.result_type(old)) == (new.shape, new.dtype)
        for old, new in pairs
    )
