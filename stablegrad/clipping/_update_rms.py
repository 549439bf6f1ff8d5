"""Clip by how far a leaf's gradient outruns its second moment: StableAdamW."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .. import _checks, _trees
from .._checks import require
from .._compiled import CompiledUpdate
from .._norms import measure
from .._scales import Scales, scale_leaves, scaled_norm
from ..granularity._groups import independent
from ..responses._clip import factors
from ..thresholds._base import Scope, judge, learn
from ..thresholds._zscore import zscore
from . import _moments
from ._readings import ClipReadings, init_readings, read

NAME = "clip_update_rms"
# The largest ratio that is squared, and the largest that is judged.
LARGEST_RATIO, LARGEST_JUDGED = 1e15, 9e17


class UpdateRmsState(NamedTuple):
    """State of `clip_update_rms`."""

    clip_inner: Any  # State of the inner optimizer.
    clip_moment: Any  # float32: the second moment, shaped like the parameters.
    moment_steps: jax.Array  # int32: steps in the moment.
    rms_state: Any  # What is normal for each leaf; () as published.
    clip_readings: dict[str, ClipReadings]


def clip_update_rms(
    max_rms: float | jax.Array | None = None,
    *,
    inner: optax.GradientTransformation | None = None,
    decay: float | jax.Array | None = None,
    eps: float | jax.Array = 1e-6,
    z: float | jax.Array = 2.5,
    published: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Shrinks a leaf whose gradient outruns its own second moment: StableAdamW.

        r_i = sqrt(mean(g^2 / v_hat));    g_i <- g_i * min(1, max(D, limit_i) / r_i)

    Published: v_hat includes the current gradient, so r is at most 1 / sqrt(1 - d); the
    update of `inner` is shrunk, by max(1, r / D), after its moments have taken the
    spike in. Default: v_hat is that of the steps before, an element counting at no less
    than its leaf's mean; the gradient is shrunk before any moment sees it; and limit_i
    is `zscore(z)` of r_i, so that a lasting shift by any factor is normal within 62
    steps, long before the second moment has followed.

    Args:
        max_rms: The multiple D of the second moment's root that is always normal, > 0.
            None: 2; as published 1. What a huge first gradient leaves in the second
            moment fades with d: until then, steps below it are normal.
        inner: The optimizer. Needed as published; else optional, the clip being a chain
            member that keeps a second moment of its own.
        decay: Weight d of the past, in (0, 1): that of the optimizer's second moment.
            None: 0.999; as published 0.99.
        eps: Smallest root of a second moment, > 0.
        z: Standard deviations of log r above its level that are still normal, > 0.
        published: Whether to follow the paper's recurrence exactly.

    Returns:
        A transformation for `optax.chain`. A step with a nan or inf anywhere becomes
        all zeros, is not shown to `inner`, and is counted; as published it passes.

    Raises:
        ValueError: If a concrete argument is out of range, or `published` and no inner.

    Example:
        >>> import optax
        >>> import stablegrad as sg
        >>> tx = optax.chain(sg.clip_update_rms(), optax.adamw(1e-3))

    Reference:
        Wortsman et al., Stable and low-precision training for large-scale
        vision-language models (2023), https://arxiv.org/abs/2304.13013.
    """
    top = (1.0 if published else 2.0) if max_rms is None else max_rms
    decay = (0.99 if published else 0.999) if decay is None else decay
    require("max_rms", top, "> 0", lambda x: 0 < x < float("inf"))
    require("decay", decay, "in (0, 1)", lambda x: 0 < x < 1)
    require("eps", eps, "> 0", lambda x: 0 < x < float("inf"))
    if published and inner is None:
        raise ValueError(
            "`clip_update_rms(published=True)` shrinks the update of an optimizer: "
            "pass one, as `clip_update_rms(inner=optax.adamw(1e-3), published=True)`."
        )
    if inner is not None:
        _checks.require_optimizer(NAME, inner)
    optimizer = optax.with_extra_args_support(inner or optax.identity())
    threshold = zscore(z, per="leaf")

    def init_fn(params) -> UpdateRmsState:
        leaves = len(_trees.inexact_leaves(params))
        watched = () if published else threshold.init(leaves)
        own = (jnp.zeros((), jnp.int32), watched, init_readings(NAME))
        return UpdateRmsState(
            _trees.strongly_typed(optimizer.init(params)),
            _moments.zeros(params),
            *_trees.distinct(own),
        )

    def rms(updates, moment, like, factors) -> jax.Array:
        """Root mean square of f g / sqrt(v), with one f a leaf; one a leaf."""
        factor = iter(factors)

        def relative(g, v):
            size = next(factor) * jnp.abs(g).astype(jnp.float32)
            return size / jnp.sqrt(jnp.maximum(v, jnp.square(eps)))

        ratios = _trees.map_inexact(relative, like, updates, moment)
        leaves = _trees.inexact_leaves(ratios, like)
        sizes = np.array([max(leaf.size, 1) for leaf in leaves], np.float32)
        return measure(ratios, like).leaf_norms / np.sqrt(sizes)

    def unbounded_rms(updates, moment, like, leaf_norms) -> jax.Array:
        """The same of g / sqrt(v), where its square may be beyond float32."""
        least = [
            jnp.min(v, initial=jnp.inf) for v in _trees.inexact_leaves(moment, like)
        ]
        least = jnp.stack([*least, jnp.zeros(())])[:-1]
        level = jnp.sqrt(jnp.maximum(least, jnp.square(eps)))
        factors = LARGEST_RATIO * level / jnp.maximum(leaf_norms, 1e-30)
        factors = jnp.clip(factors, 1e-30, 1.0)
        return (rms(updates, moment, like, factors) / factors).astype(jnp.float32)

    def follow_update(updates, state: UpdateRmsState, params, extra):
        """As published: the update is shrunk, after the moments have followed."""
        steps = _trees.increment(state.moment_steps)
        moment = _trees.map_inexact(
            lambda v, g: (
                decay * v + (1 - decay) * jnp.square(jnp.abs(g).astype(jnp.float32))
            ),
            updates,
            state.clip_moment,
            updates,
        )
        known = _moments.debiased(moment, decay, steps, updates)
        ones = np.ones(len(_trees.inexact_leaves(updates)), np.float32)
        factor = 1 / jnp.maximum(rms(updates, known, updates, ones) / top, 1.0)
        out, held = optimizer.update(updates, state.clip_inner, params, **extra)
        measured = measure(out, updates)
        scales = factor
        out = scale_leaves(out, Scales(scales), updates)
        limit = jnp.asarray(top, jnp.float32)
        return out, held, moment, steps, (), measured, limit, scales

    def shrink_gradient(updates, state: UpdateRmsState, params, extra):
        """The default: the gradient is shrunk, and judged by the steps before."""
        measured = measure(updates)
        finite = measured.finite
        known = _moments.debiased(state.clip_moment, decay, state.moment_steps, updates)
        known = _trees.map_inexact(_moments.floored, updates, known)
        ratio = unbounded_rms(updates, known, updates, measured.leaf_norms)
        known_before = finite & (state.moment_steps > 0)
        ratio = jnp.where(known_before, ratio, 0.0)
        grouping = independent(ratio.shape[0])
        normal = threshold.limit(state.rms_state, Scope(grouping))
        signal = jnp.minimum(ratio, LARGEST_JUDGED)
        word = judge(threshold, signal, normal, grouping, observed=known_before)
        limit = jnp.maximum(word.limit, top)
        word = word._replace(limit=limit, exceeded=word.exceeded & (ratio > limit))
        watched = learn(threshold, state.rms_state, word)
        scales = factors(word._replace(signal=ratio))
        clipped = scale_leaves(updates, Scales(scales), updates, keep=finite)
        moment = _moments.track(state.clip_moment, clipped, decay)
        out, held = optimizer.update(clipped, state.clip_inner, params, **extra)
        out = _trees.zero_unless(finite, out, updates)
        held = _trees.select(finite, held, state.clip_inner)
        moment = _trees.select(finite, moment, state.clip_moment)
        steps = _trees.count_if(finite, state.moment_steps)
        return out, held, moment, steps, watched, measured, limit, scales

    def update_fn(updates, state, params=None, **extra):
        step = follow_update if published else shrink_gradient
        out, held, moment, steps, watched, measured, limit, scales = step(
            updates, state, params, extra
        )
        finite = measured.finite
        readings = read(
            state.clip_readings,
            raw=measured.norm,
            clipped=jnp.where(
                finite, scaled_norm(measured, Scales(scales), updates), 0.0
            ),
            limit=jnp.min(limit, initial=jnp.inf),
            scale=Scales(scales).smallest(),
            finite=finite,
        )
        moment = _trees.cast_like(moment, state.clip_moment)
        return out, UpdateRmsState(held, moment, steps, watched, readings)

    return optax.GradientTransformationExtraArgs(init_fn, CompiledUpdate(update_fn))
