"""The last step in numbers, for the record."""

import jax.numpy as jnp

from .._norms import Measurement
from .._packing import encode
from .._scales import scaled_norm
from . import _record
from ._decide import StepContext, loss_of
from ._look_ahead import Decision
from ._roll_back import Trouble


def last_step(
    step: StepContext, gradient: Measurement, decision: Decision, trouble: Trouble
) -> _record.LastStep:
    """Return how a step went, before any response has halted."""
    verdict, ahead = decision.verdict, decision.ahead
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
    known = gradient.finite | trouble.poisoned
    return _record.LastStep(
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
        halted=jnp.zeros((), bool),
    )
