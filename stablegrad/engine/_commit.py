"""The commit: run the inner optimizer once, and write what is finite.

    u, S' = inner(s g, S);    theta' = theta + k u  where finite, else theta

An element of the parameters or of the inner state that was finite and would no longer
be is kept as it was, and counted. On an accelerator the mask fuses into the optimizer's
own kernels, and counting takes one kernel per leaf. On a CPU, a mask on the inner state
and a count cost more than the step. There, large trees of float32 leaves have only
their parameters masked, and `is_checked` steps are inspected before they are written: a
step that would break the inner state is held.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .. import _checks, _trees
from .._mapped_axes import manual_axes, varying_like
from .._norms import Measurement
from .._platform import cond_on_cpu, on_cpu
from .._scales import Scales, scale_leaves
from ..responses._reasons import Reason, first_reason
from ._decide import StepContext
from ._write import (
    Tally,
    broken_parameters,
    inspected,
    owners_of,
    tally_result,
    tally_state,
    write,
)

SMALL = 65_536  # Elements up to which every step is checked on a CPU, too.
FIRST_CHECKED = 8  # Steps at the start that are checked.
CHECK_EVERY = 256  # Steps from one check to the next after that.
UNUSUAL = 1e12  # A leaf norm above which a step is checked.


class Committed(NamedTuple):
    """The results of a step that was taken, or held back."""

    result: Any  # Updates or parameters, whichever the caller asked for.
    inner_state: Any
    # int32 (leaves + 1,): elements kept out; the last entry counts other arrays. If
    # the step was held back: above 0 where parameters are not finite.
    kept_out: jax.Array
    reason: jax.Array  # int32: why the step was held back, 0 if it was taken.


def commit(
    step: StepContext,
    scales: tuple[Scales | None, Scales | None],
    reason: jax.Array,
    is_checked: jax.Array,
    writes_params: bool,
) -> Committed:
    """Take the step if there is no reason against it, else leave everything as it was.

    `scales` are those of the gradient and of the update. `writes_params` says whether
    the result is the parameters, or the updates.
    """
    operands = step.operands
    counted = _trees.inexact_flags(step.like)
    leaves = _trees.inexact_leaves(step.like)
    owners = owners_of(step.inner_state, step.like)
    each_checked = always_checked(step.like, step.inner_state)
    # A constant on either platform, which removes the counts from a CPU's program.
    uncounted = jnp.zeros((), bool) if each_checked else on_cpu()

    def run(updates, inner_state, params):
        update, new_state = step.run_inner(scales[0], (updates, inner_state, params))
        _checks.require_same_state(inner_state, new_state)
        return scale_leaves(update, scales[1], step.like), new_state

    def inspect(updates, inner_state, params):
        """Count what the parameters would not take; tell whether the state breaks."""
        update, new_state = run(updates, inner_state, params)
        of_result, of_state = Tally(leaves), Tally(leaves)
        tally_result(of_result, params, update, counted, writes_params)
        tally_state(of_state, new_state, inner_state, owners)
        return inspected(of_result, of_state)

    kept_out = jnp.zeros((len(leaves) + 1,), jnp.int32)
    if not each_checked:
        kept_out, breaks = lax.cond(
            (reason == 0) & is_checked & uncounted,
            inspect,
            lambda *_: (kept_out, jnp.zeros((), bool)),
            *operands,
        )
        breaks = step.axes.total(breaks.astype(jnp.int32)) > 0  # On any device.
        broken = jnp.where(breaks, jnp.int32(Reason.NONFINITE_STATE), 0)
        reason = first_reason((reason, broken))

    def take(updates, inner_state, params) -> Committed:
        accepted = (reason == 0) | on_cpu()
        update, new_state = run(updates, inner_state, params)
        tally = Tally(leaves)
        result = tally_result(tally, params, update, counted, writes_params)
        state = tally_state(tally, new_state, inner_state, owners, ~uncounted)
        own = None
        if params is not None:
            own = _trees.inexact_leaves(params, step.like)
        found = jnp.where(uncounted, kept_out, tally.counts(accepted, own))
        return Committed(
            write(accepted, *result), write(accepted, *state), found, reason
        )

    def hold(updates, inner_state, params) -> Committed:
        result = params
        if not writes_params:
            structs, _ = jax.eval_shape(run, *operands)
            result = jax.tree.map(
                lambda leaf, struct: jnp.zeros_like(leaf, struct.dtype),
                updates,
                structs,
            )
        broken = broken_parameters(params, step.like)
        held = Committed(result, inner_state, broken, reason)
        if not manual_axes():
            return held
        return varying_like(held, jax.eval_shape(take, *operands))

    return cond_on_cpu(reason == 0, take, hold, *operands)


def always_checked(like, inner_state) -> bool:
    """Return whether a CPU checks every step: small trees, and narrow dtypes."""
    leaves = _trees.inexact_leaves((like, inner_state))
    narrow = any(jnp.finfo(leaf.dtype).bits < 32 for leaf in leaves)
    return narrow or sum(leaf.size for leaf in _trees.inexact_leaves(like)) <= SMALL


def checked_now(gradient: Measurement, steps, kept_out) -> jax.Array:
    """Return whether a CPU checks this step of a large tree of float32 leaves."""
    largest = jnp.max(gradient.leaf_squares, initial=0.0)
    due = (steps < FIRST_CHECKED) | (steps % CHECK_EVERY == 0)
    return due | (kept_out > 0) | ~(largest < UNUSUAL**2)
