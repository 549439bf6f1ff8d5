"""The outcome of a step: what was decided, in the numbers of the record."""

import functools

import jax
import jax.numpy as jnp

from .._norms import Measurement, first_true
from .._packing import encode
from .._scales import scaled_norm
from ._decide import StepContext, loss_of
from ._look_ahead import Decision
from ._record import NO_LOSS, LastStep, Outcome, Record, last_step_of


def outcome_of(
    step: StepContext,
    record: Record,
    gradient: Measurement,
    decision: Decision,
    halted: list[jax.Array],
    warning: list[jax.Array] | None,
    kept_out: jax.Array,
) -> Outcome:
    """Return how the step went, for the record; `warning` is of `layer_health`."""
    _, verdict, ahead, _ = decision
    clipped_norm, clip_scale = gradient.norm, jnp.ones((), jnp.float32)
    if verdict.gradient_scales is not None:
        clip_scale = verdict.gradient_scales.smallest()
        clipped_norm = scaled_norm(
            gradient, verdict.gradient_scales, step.updates, step.like
        )
    if verdict.update_scales is not None:
        clip_scale = jnp.minimum(clip_scale, verdict.update_scales.smallest())
    loss = loss_of(step.extra, step.axes)
    largest = gradient.largest_leaf
    kept_leaf = first_true(kept_out[:-1] > 0)
    warned, layer = warning or (jnp.zeros((), bool), jnp.full((), -1, jnp.int32))
    last = LastStep(
        grad_norm=encode(gradient.norm),
        clipped_grad_norm=encode(clipped_norm),
        clip_scale=clip_scale,
        loss_value=encode(loss) if loss is not None else jnp.asarray(NO_LOSS),
        lr_scale=verdict.lr_scale * ahead.step_scale,
        back_off_scale=verdict.lr_scale,
        skipped=verdict.reason > 0,
        skip_reason=verdict.reason,
        first_bad_leaf=jnp.where(gradient.finite, kept_leaf, largest),
        largest_leaf=largest,
        kept_out_elements=jnp.sum(kept_out),
        halted=functools.reduce(jnp.logical_or, halted, jnp.zeros((), bool)),
    )
    return Outcome(
        last,
        {},
        backed_off=verdict.lr_scale < last_step_of(record).back_off_scale,
        shortened=ahead.alarm,
        warned=warned,
        warned_leaf=layer,
    )
