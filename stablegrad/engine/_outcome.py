"""The outcome of a step: what the record is told of it."""

import functools

import jax
import jax.numpy as jnp

from .._norms import Measurement
from .._packing import encode
from .._scales import scaled_norm
from ..responses._base import Response
from ..responses._layers import LayerWarning
from . import _decide, _record
from ._decide import StepContext
from ._event_log import batch_of, cause_of
from ._look_ahead import Decision
from ._roll_back import Trouble


def outcome_of(
    responses: tuple[Response, ...],
    step: StepContext,
    gradient: Measurement,
    decision: Decision,
    states: tuple[tuple, tuple],
    trouble: Trouble,
    warning: LayerWarning,
    extras: dict[str, jax.Array],
    *,
    backed_off: jax.Array,
    rolled_back: jax.Array,
) -> _record.Outcome:
    """Return how the step went, for the record.

    `states` are those of the responses before and after the step, and `warning` is
    that of `layer_health`.
    """
    judgements, verdict, ahead, _ = decision
    before, settled = states
    halted = [r.halts(s) for r, s in zip(responses, settled, strict=True)]
    clipped_norm, clip_scale = gradient.norm, jnp.ones((), jnp.float32)
    if verdict.gradient_scales is not None:
        clip_scale = verdict.gradient_scales.smallest()
        clipped_norm = scaled_norm(
            gradient, verdict.gradient_scales, step.updates, step.like
        )
    if verdict.update_scales is not None:
        clip_scale = jnp.minimum(clip_scale, verdict.update_scales.smallest())
    loss = _decide.loss_of(step.extra, step.axes)
    largest = gradient.largest_leaf
    known = gradient.finite | trouble.poisoned
    last = _record.LastStep(
        grad_norm=encode(gradient.norm),
        clipped_grad_norm=encode(clipped_norm),
        clip_scale=clip_scale,
        loss_value=encode(loss) if loss is not None else jnp.asarray(_record.NO_LOSS),
        lr_scale=verdict.lr_scale * ahead.step_scale,
        back_off_scale=verdict.lr_scale,
        skipped=verdict.reason > 0,
        skip_reason=verdict.reason,
        first_bad_leaf=jnp.where(known, trouble.leaf, largest),
        largest_leaf=largest,
        kept_out_elements=trouble.kept_out,
        halted=functools.reduce(jnp.logical_or, halted, jnp.zeros((), bool)),
    )
    return _record.Outcome(
        last,
        extras,
        backed_off=backed_off,
        shortened=ahead.alarm,
        rolled_back=rolled_back,
        warned=jnp.asarray(warning.warned),
        warned_leaf=jnp.asarray(warning.leaf, jnp.int32),
        cause=cause_of(
            responses, before, judgements, verdict.reason, backed_off, gradient.norm
        ),
        batch=batch_of(step.extra),
    )
