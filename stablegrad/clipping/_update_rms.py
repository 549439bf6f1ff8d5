"""Clip a leaf whose gradient exceeds its second moment: StableAdamW."""

import jax
import jax.numpy as jnp
import optax

from .. import _checks, _trees
from .._checks import require
from .._extra_args import with_extra_args
from .._norms import measure, root
from .._scales import Scales, scale_leaves, scaled_norm
from ..granularity._groups import independent
from ..responses._clip import factors
from ..thresholds._base import Scope, judge, learn
from ..thresholds._zscore import zscore
from . import _elements, _moments
from ._base import Clipped, transformation

NAME = "clip_update_rms"
# The unit of the ratios that are squared: no gradient below 1e18 overflows them.
UNIT = 1e12
LARGEST_JUDGED = 9e17  # Larger ratios count as this one to the threshold.


def clip_update_rms(
    max_rms: float | jax.Array | None = None,
    *,
    inner: optax.GradientTransformation | None = None,
    decay: float | jax.Array | None = None,
    eps: float | jax.Array = 1e-6,
    z: float | jax.Array = 2.5,
    published: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Shrink a leaf whose gradient exceeds its own second moment: StableAdamW.

        r_i = sqrt(mean(g^2 / v_hat));    g_i <- g_i * min(1, max(D, limit_i) / r_i)

    with v_hat that of the steps before, at least its mean over the leaf, and limit_i
    that of `zscore(z)` on r_i. The moments are updated with the clipped gradient only.

    As published, v_hat includes the current gradient, and the update of `inner` is
    divided by max(1, r / D) after the moments of `inner` have followed the gradient.

    Args:
        max_rms: The multiple D of the second moment's root that is always normal, > 0.
            None: 2; 1 if published.
        inner: The optimizer, which takes the clipped gradient. Required if published.
            None: the transformation only clips, as a member of a chain.
        decay: Weight d of the past, in (0, 1): that of the optimizer's second moment.
            None: 0.999; 0.99 if published.
        eps: The least root of a second moment that is assumed, > 0.
        z: Standard deviations of log r above its level that are normal, > 0. Not used
            if published.
        published: Whether to follow the recurrence of the paper exactly.

    Returns:
        A transformation for `optax.chain`. A gradient with a nan or inf, or of norm
        1e18 or more, becomes zeros and does not reach `inner`; if published, it passes.

    Raises:
        ValueError: If a concrete argument is out of range, or `published` comes without
            `inner`.

    Example:
        >>> import optax
        >>> import stablegrad as sg
        >>> tx = optax.chain(sg.clip_update_rms(), optax.adamw(1e-3))

    Reference:
        Wortsman et al. (2023), https://arxiv.org/abs/2304.13013.
    """
    top = (1.0 if published else 2.0) if max_rms is None else max_rms
    decay = (0.99 if published else 0.999) if decay is None else decay
    require("max_rms", top, "> 0", lambda x: 0 < x < float("inf"))
    require("decay", decay, "in (0, 1)", lambda x: 0 < x < 1)
    require("eps", eps, "> 0", lambda x: 0 < x < float("inf"))
    threshold = zscore(z, per="leaf")
    if published and inner is None:
        raise ValueError(
            "`clip_update_rms(published=True)` shrinks the update of an optimizer: "
            "pass one, as `clip_update_rms(inner=optax.adamw(1e-3), published=True)`."
        )
    if inner is not None:
        _checks.require_optimizer(NAME, inner)
    optimizer = with_extra_args(inner or optax.identity())
    if published:
        return _published(optimizer, top, decay, eps)
    return _clip_gradient(optimizer, top, decay, eps, threshold)


def _clip_gradient(
    optimizer, top, decay, eps, threshold
) -> optax.GradientTransformationExtraArgs:
    """Return the default method."""

    def start(tree):
        leaves, none = len(_trees.inexact_leaves(tree)), jnp.zeros((), jnp.int32)
        return jnp.zeros((leaves,), jnp.float32), none, threshold.init(leaves)

    def rms(updates, moment, correction, least) -> jax.Array:
        """Return the root mean square of g / sqrt(v_hat) of each leaf, (leaves,)."""

        def squares(g, v, floor):
            usual = jnp.sqrt(jnp.maximum(correction * v, floor))
            return jnp.square(_elements.sizes(g) / (UNIT * usual))

        floors = _elements.per_leaf(least, updates)
        ratios = _trees.map_inexact(squares, updates, updates, moment, floors)
        return UNIT * root(_moments.means(ratios, updates))

    def step(updates, statistics, memory, params, extra) -> Clipped:
        means, steps, of_ratios = statistics  # The moment: means, steps.
        old_inner, old_moment = memory
        measured = measure(updates)
        finite = measured.finite
        correction = _moments.correction(decay, steps)
        least = jnp.maximum(correction * means, jnp.square(eps))
        observed = finite & (steps > 0)
        ratio = rms(updates, old_moment, correction, least.astype(jnp.float32))
        ratio = jnp.where(observed, ratio, 0.0)
        grouping = independent(ratio.shape[0])
        normal = threshold.limit(of_ratios, Scope(grouping))
        signal = jnp.minimum(ratio, LARGEST_JUDGED)
        judgement = judge(threshold, signal, normal, grouping, observed=observed)
        limit = jnp.maximum(judgement.limit, top)
        exceeded = judgement.exceeded & (ratio > limit)
        judgement = judgement._replace(limit=limit, exceeded=exceeded)
        scales = Scales(factors(judgement._replace(signal=ratio)))
        clipped = scale_leaves(updates, scales, updates, keep=finite)
        out, inner = optimizer.update(clipped, old_inner, params, **extra)
        moment = _moments.track(old_moment, clipped, decay)
        squares = jnp.square(scales.by_leaf) * measured.leaf_squares
        new_means = _moments.track_means(means, squares, decay, updates)
        statistics = (
            jnp.where(finite, new_means, means),
            _trees.count_if(finite, steps),
            learn(threshold, of_ratios, judgement),
        )
        return Clipped(
            _trees.zero_unless(finite, out, updates),
            statistics,
            measured,
            scaled_norm(measured, scales, updates),
            limit,
            scales.smallest(),
            _trees.select(finite, (inner, moment), (old_inner, old_moment)),
        )

    memory = lambda params: _moments.init(NAME, optimizer, True, params)
    return transformation(NAME, _moments.MomentState, start, step, memory)


def _published(optimizer, max_rms, decay, eps) -> optax.GradientTransformationExtraArgs:
    def step(updates, statistics, memory, params, extra) -> Clipped:
        inner, moment = memory
        steps = _trees.increment(statistics)
        moment = _moments.track(moment, updates, decay)
        correction = _moments.correction(decay, steps)
        least = jnp.asarray(eps, jnp.float32) ** 2

        def squares(g, v):
            return jnp.square(_elements.sizes(g)) / jnp.maximum(correction * v, least)

        ratios = _trees.map_inexact(squares, updates, updates, moment)
        rms = root(_moments.means(ratios, updates))
        # As Python's `max(1, nan)`, which is 1.
        scales = Scales(jnp.where(rms > max_rms, max_rms / rms, 1.0))
        out, inner = optimizer.update(updates, inner, params, **extra)
        measured = measure(out, updates)
        norm = scaled_norm(measured, scales, out, updates)
        out, scale = scale_leaves(out, scales, updates), scales.smallest()
        return Clipped(out, steps, measured, norm, max_rms, scale, (inner, moment))

    start = lambda tree: jnp.zeros((), jnp.int32)
    memory = lambda params: _moments.init(NAME, optimizer, True, params)
    return transformation(NAME, _moments.MomentState, start, step, memory)
