"""Clip: shrink a step to the largest size that is still normal."""

import jax
import jax.numpy as jnp

from ..granularity._group_norms import group_scales
from ..thresholds._base import Judgement, Threshold
from ..thresholds._signals import is_outgoing
from ._base import Response, check_thresholds, proceed
from ._reasons import reason_code


def factors(judgement: Judgement) -> jax.Array:
    """Return the factor in [0, 1] by which each group meets its limit, (groups,)."""
    # A norm that counts as an overflow may be a number all the same.
    above = judgement.nonfinite & (judgement.limit < judgement.signal)
    above = judgement.exceeded | (above & (judgement.signal < jnp.inf))
    shrink = above & (judgement.signal > 0)
    signal = jnp.where(shrink, judgement.signal, 1.0)
    return jnp.where(shrink, jnp.maximum(judgement.limit, 0.0), 1.0) / signal


def unclipped(threshold: Threshold, judgement: Judgement) -> jax.Array:
    """Return the int32 reason to reject an update whose norm is too large to shrink.

    Elements that are nan are kept out by the guard, and do not stop the others.
    """
    infinite = judgement.nonfinite & (judgement.signal == jnp.inf)
    return reason_code(threshold.of, jnp.any(infinite), jnp.zeros((), bool))


def clip(threshold: Threshold) -> Response:
    """Shrink what exceeds a threshold to the threshold.

        s_t = limit_t / x_t  if limit_t < x_t < inf,  else 1

    multiplies the gradient for of="grad_norm" and for a function, whose value must be
    proportional to the gradient; the optimizer's update for of="update_norm". Every
    group of the threshold has its own factor: with per="leaf", a leaf that explodes
    does not shrink the others. Several clips apply the smallest of their factors.

    Args:
        threshold: The threshold. Not of="value": a loss is no size to shrink a
            gradient to.

    Returns:
        A response for `guard`. A nan or inf is not shrunk, so clipping cannot spread
        it. The guard rejects a gradient that is not finite, and this an update whose
        norm is inf; an element of the update that is nan is kept out, and the others
        are taken as they are.

    Raises:
        TypeError: If `threshold` is not a threshold.
        ValueError: If the threshold watches the loss.

    Example:
        >>> import optax
        >>> import stablegrad as sg
        >>> tx = sg.guard(optax.sgd(0.1), sg.clip(sg.zscore(2.5, per="leaf")))

    Reference:
        Pascanu et al. (2013), https://arxiv.org/abs/1211.5063, for a fixed limit.
    """
    check_thresholds("clip", (threshold,))
    if threshold.of == "value":
        raise ValueError(
            "`clip` must watch a norm, got a threshold with of='value': a large loss "
            "does not say how far to shrink a gradient. Use `skip` or `back_off`."
        )

    def propose(state, judgements):
        (judgement,) = judgements
        scales = group_scales(judgement.grouping, factors(judgement))
        if not is_outgoing(threshold.of):
            return proceed(gradient_scales=scales)
        return proceed(update_scales=scales, reason=unclipped(threshold, judgement))

    return Response("clip", (threshold,), propose=propose)
