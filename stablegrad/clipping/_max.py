"""Clip the elements of a leaf to its usual largest one: AdaClip of Stable-SPAM."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from .. import _trees
from .._checks import require, require_count
from .._norms import measure
from .._platform import cond_on_cpu
from ..granularity._groups import independent
from ..responses._clip import factors
from ..thresholds._base import Scope, Threshold, judge, learn
from ..thresholds._ema_ratio import ema_ratio
from . import _elements, _moments
from ._base import Clipped, ClippingState, only_published, transformation

NAME = "clip_by_max"


def clip_by_max(
    ratio: float | jax.Array | None = None,
    *,
    decay: float | jax.Array | None = None,
    reset_every: int | None = None,
    published: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Clamp the elements of a leaf that exceed its usual largest one: AdaClip.

        M = max |g_i|;    g_i <- g_i * min(1, ratio m / |g_i|),    m that of `ema_ratio`

    As published, m is the bias-corrected running mean of M including the current step,
    and elements above m are multiplied by m / M: every second step is clipped, and one
    element just above m becomes smaller than those just below it.

    Args:
        ratio: Tolerated multiple of the usual maximum, > 1. None: 2. Not with
            `published`, where it is 1.
        decay: Weight of the past, in [0, 1). None: 0.98; 0.999 if published.
        reset_every: Steps between resets of the moments, which restart the bias
            correction, >= 0; 0 for never. Only with `published`; None: 1000.
        published: Whether to follow the recurrence of the paper exactly.

    Returns:
        A transformation for `optax.chain`. A gradient with a nan or inf, or of norm
        1e18 or more, becomes zeros and teaches nothing; if published, it passes.

    Raises:
        ValueError: If a concrete argument is out of range.

    Example:
        >>> import optax
        >>> import stablegrad as sg
        >>> tx = optax.chain(sg.clip_by_max(), optax.adamw(1e-3))

    Reference:
        Huang et al., Stable-SPAM (2025), https://arxiv.org/abs/2502.17055.
    """
    if published:
        reset_every = 1000 if reset_every is None else reset_every
        require_count("reset_every", reset_every, 0)
        require("ratio", ratio, "None as published", lambda x: x is None)
        return _published(0.999 if decay is None else decay, reset_every)
    only_published(clip_by_max, reset_every=reset_every)
    ratio = 2.0 if ratio is None else ratio
    decay = 0.98 if decay is None else decay
    return _clamp_to(ema_ratio(ratio, decay=decay, per="leaf"))


def _clamp_to(threshold: Threshold) -> optax.GradientTransformationExtraArgs:
    """Return the transformation that clamps each leaf to a threshold's limit."""

    def step(updates, statistics, memory, params, extra) -> Clipped:
        measured = measure(updates)
        finite: Any = measured.finite
        largest = _elements.leaf_maxima(updates, measured.leaf_squares)
        largest = jnp.where(finite, largest, 0.0)
        grouping = independent(largest.shape[0])
        limit = threshold.limit(statistics, Scope(grouping))
        judgement = judge(threshold, largest, limit, grouping, observed=finite)
        bounds = jnp.where(judgement.exceeded, judgement.limit, jnp.inf)
        clamp = lambda: _elements.clamp(updates, _elements.per_leaf(bounds, updates))
        scale = jnp.min(factors(judgement), initial=1.0)
        squares = cond_on_cpu(
            scale < 1,
            lambda: measure(clamp()).leaf_squares,
            lambda: measured.leaf_squares,
        )
        clipped = _trees.zero_unless(finite, clamp(), updates)
        norm = jnp.sqrt(jnp.sum(squares))
        learned = learn(threshold, statistics, judgement)
        return Clipped(clipped, learned, measured, norm, judgement.limit, scale)

    start = lambda tree: threshold.init(len(_trees.inexact_leaves(tree)))
    return transformation(NAME, ClippingState, start, step)


def _published(decay, reset_every: int) -> optax.GradientTransformationExtraArgs:
    require("decay", decay, "in [0, 1)", lambda x: 0 <= x < 1)

    def start(tree):
        leaves, none = len(_trees.inexact_leaves(tree)), jnp.zeros((), jnp.int32)
        return jnp.zeros((leaves,), jnp.float32), none, none

    def step(updates, statistics, memory, params, extra) -> Clipped:
        running, steps, total = statistics
        measured = measure(updates)
        largest = _elements.leaf_maxima(updates, measured.leaf_squares)
        steps, total = _trees.increment(steps), _trees.increment(total)
        running = decay * running + (1 - decay) * largest
        limit = running * _moments.correction(decay, steps)
        limit = jnp.where(largest > 0, limit, jnp.inf)  # Nothing to clip.
        shrink = limit / largest
        clipped = _elements.scale_above(updates, limit, shrink)
        if reset_every:
            steps = jnp.where(total % reset_every == 0, 1, steps)
        shrunk = jnp.where(largest > limit, shrink, 1.0)
        norm, scale = measure(clipped).norm, jnp.min(shrunk, initial=1.0)
        statistics = (running, steps, total)
        numbers = (statistics, measured, norm, limit, scale)
        return Clipped(clipped, *numbers, overflows=False)

    return transformation(NAME, ClippingState, start, step)
