"""Clip elements against their running second moment: SPAM, robust and as published."""

import jax
import jax.numpy as jnp
import optax
from jax import lax

from .. import _checks, _trees
from .._checks import require, require_count
from .._extra_args import with_extra_args
from .._norms import measure
from .._platform import cond_on_cpu
from .._scales import Scales, scale_leaves
from . import _elements, _moments
from ._base import Clipped, transformation

NAME = "clip_by_second_moment"
PROTECTED = 20  # Published steps without a limit, at the start and after resets.
SPIKE = 0.5  # A step that clipping leaves less than this share of its norm.


def clip_by_second_moment(
    threshold: float | jax.Array = 5000.0,
    *,
    inner: optax.GradientTransformation | None = None,
    decay: float | jax.Array = 0.999,
    reset_every: int | None = None,
    reset_on_spike: bool = False,
    rewarmup_steps: int | None = None,
    published: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Clamp each gradient element to a multiple of its own second moment: SPAM.

        v_hat = v / (1 - d^k);    b = sqrt(threshold * max(v_hat, mean(v_hat)))
        g <- g * min(1, b / |g|);    v <- d v + (1 - d) |g|^2

    with v that of the steps before, and the mean over its leaf. The limit is in force
    from the second step. A reset clears v and k, but not the mean.

    As published, b = sqrt(threshold v): the limit drifts from 10 to 45 standard
    deviations within one period, is off for 20 steps after each reset, and clamps an
    element whose v is zero to zero. Moments are reset at fixed intervals.

    Args:
        threshold: Tolerated square in units of the second moment, > 1. 5000 is 71
            standard deviations: it catches broken elements, not rough steps.
        inner: An optimizer with moments `mu` and `nu`, such as `optax.adam`, that takes
            the clipped gradient. Its `nu` is then the second moment, and a reset clears
            its moments. None: the clip keeps a second moment of its own.
        decay: Weight d of the past, in (0, 1). With an `inner`, pass its own, such as
            `b2` of Adam: it is not read from it.
        reset_every: Steps between resets, >= 0; 0 for never. None: 0; 500 if published.
        reset_on_spike: Whether to reset after a step of which clipping leaves less than
            half of the norm. Not with `published`.
        rewarmup_steps: Steps over which the updates grow from 0.01 back to 1 after each
            reset, along a cosine, >= 0. None: 0; 150 if published with an `inner`.
        published: Whether to follow the recurrence of the paper exactly. The paper's
            Adam adds `eps` before the bias correction of v; here, `inner` decides.

    Returns:
        A transformation for `optax.chain`. A gradient with a nan or inf, or of norm
        1e18 or more, becomes zeros and does not reach `inner`; if published, it passes.

    Raises:
        ValueError: If a concrete argument is out of range; when initialised, if `inner`
            does not have one `mu` and one `nu`.

    Example:
        >>> import optax
        >>> import stablegrad as sg
        >>> tx = sg.clip_by_second_moment(inner=optax.adam(1e-3), reset_on_spike=True)

    Reference:
        Huang et al., SPAM (2025), https://arxiv.org/abs/2501.06842.
    """
    require("threshold", threshold, "> 1", lambda x: 1 < x < float("inf"))
    require("decay", decay, "in (0, 1)", lambda x: 0 < x < 1)
    period = (500 if published else 0) if reset_every is None else reset_every
    usual = 150 if published and inner is not None else 0
    rewarmup = usual if rewarmup_steps is None else rewarmup_steps
    require_count("reset_every", period, 0)
    require_count("rewarmup_steps", rewarmup, 0)
    if inner is not None:
        _checks.require_optimizer(NAME, inner)
    optimizer = with_extra_args(inner or optax.identity())
    settings = (threshold, optimizer, inner is None, decay, period, rewarmup)
    if published:
        require("reset_on_spike", reset_on_spike, "False as published", lambda x: not x)
        return _published(*settings)
    return _clamp_to_moment(*settings, reset_on_spike)


def _clamp_to_moment(
    threshold, optimizer, own_moment, decay, period, rewarmup, reset_on_spike
) -> optax.GradientTransformationExtraArgs:
    """Return the default method; `own_moment` if the optimizer has none."""

    def start(tree):
        zeros = jnp.zeros((len(_trees.inexact_leaves(tree)),), jnp.float32)
        return zeros, zeros, *[jnp.zeros((), jnp.int32)] * 2

    def usual_sizes(moment, correction, levels, like):
        """Return the usual size of each element; inf where nothing is known."""
        levels = jnp.where(levels > 0, levels, jnp.inf)
        by_leaf = _elements.per_leaf(levels, like)

        def usual(v, level):
            return jnp.sqrt(jnp.maximum(correction * v.real.astype(jnp.float32), level))

        return _trees.map_inexact(usual, like, moment, by_leaf)

    def step(updates, statistics, memory, params, extra) -> Clipped:
        # Means of the clip's own moment; corrected ones, which no reset clears; steps
        # in the moment since its last reset.
        old_means, levels, steps, number_of_resets = statistics
        inner, moment = memory
        most = jnp.asarray(threshold, jnp.float32) ** 0.5  # Times the usual size.
        measured = measure(updates)
        finite = measured.finite
        yardstick = moment if own_moment else _moments.second_moment(inner)
        yardstick = lax.stop_gradient(yardstick)  # Limits are constants.
        correction = _moments.correction(decay, steps)
        means = old_means if own_moment else _moments.means(yardstick, updates)
        levels = jnp.where(correction * means > 0, correction * means, levels)
        usual = lambda: usual_sizes(yardstick, correction, levels, updates)
        bounds = lambda: jax.tree.map(lambda size: most * size, usual())
        clamp = lambda: _elements.clamp(updates, bounds())
        above = finite & jnp.any(_elements.largest_ratios(updates, usual()) > most)
        squares = cond_on_cpu(
            above,
            lambda: measure(clamp()).leaf_squares,
            lambda: measured.leaf_squares,
        )
        clipped = cond_on_cpu(above, clamp, lambda: updates)
        norm = jnp.where(finite, jnp.sqrt(jnp.sum(squares)), 0.0)
        ratio = jnp.where(finite & (measured.norm > 0), norm / measured.norm, 1.0)
        clipped = _trees.zero_unless(finite, clipped, updates)
        out, new_inner = optimizer.update(clipped, inner, params, **extra)
        out = _trees.zero_unless(finite, out, updates)
        if rewarmup:
            warmth = Scales(_moments.warmth(steps, rewarmup))
            out = scale_leaves(out, warmth.where(number_of_resets > 0), updates)
        new_inner = _trees.select(finite, new_inner, inner)
        new_means = old_means
        if own_moment:
            tracked = _moments.track(moment, clipped, decay)
            moment = _trees.select(finite, tracked, moment)
            followed = _moments.track_means(old_means, squares, decay, updates)
            new_means = jnp.where(finite, followed, old_means)
        steps = _trees.count_if(finite, steps)
        is_due, spikes = (steps == period) & (period > 0), (ratio < SPIKE)
        resets = finite & (is_due | (spikes & reset_on_spike))
        if period or reset_on_spike:
            zeros = jax.tree.map(jnp.zeros_like, moment)
            moment = _trees.select(resets, zeros, moment)
            if not own_moment:
                zeros = _moments.cleared(new_inner, "mu", "nu", "count")
                new_inner = _trees.select(resets, zeros, new_inner)
        statistics = (
            jnp.where(resets, 0.0, new_means),
            levels,
            jnp.where(resets, 0, steps),
            _trees.count_if(resets, number_of_resets),
        )
        scale = jnp.where(ratio < 1 - 1e-6, ratio, 1.0)  # Not a rounding error.
        memory = (new_inner, moment)
        return Clipped(out, statistics, measured, norm, jnp.inf, scale, memory)

    memory = lambda params: _moments.init(NAME, optimizer, own_moment, params)
    return transformation(NAME, _moments.MomentState, start, step, memory)


def _published(
    threshold, optimizer, own_moment: bool, decay, period: int, rewarmup: int
) -> optax.GradientTransformationExtraArgs:
    def step(updates, statistics, memory, params, extra) -> Clipped:
        inner, moment = memory
        total, number_of_resets = statistics
        number = _trees.increment(total)
        age = number % period if period else number
        resets = (age == 0) if period else jnp.zeros((), bool)
        if own_moment:
            zero = jax.tree.map(jnp.zeros_like, moment)
            moment = yardstick = _trees.select(resets, zero, moment)
        else:
            inner = _trees.select(resets, _moments.cleared(inner, "mu", "nu"), inner)
            yardstick = _moments.second_moment(inner)
        armed = (number >= PROTECTED) & (age >= PROTECTED)

        def bound(v):
            limit = jnp.sqrt(threshold * v.real.astype(jnp.float32))
            return jnp.where(armed, limit, jnp.inf)

        bounds = _trees.map_inexact(bound, updates, yardstick)
        clipped = _elements.clamp(updates, bounds)
        if own_moment:
            moment = _moments.track(moment, clipped, decay)
        out, inner = optimizer.update(clipped, inner, params, **extra)
        if rewarmup and period:
            warmth = Scales(_moments.warmth(age, rewarmup)).where(number >= period)
            out = scale_leaves(out, warmth, updates)
        measured, norm = measure(updates), measure(clipped).norm
        ratio = jnp.where(measured.norm > 0, norm / measured.norm, 1.0)
        scale = jnp.where(ratio < 1 - 1e-6, ratio, 1.0)  # Not a rounding error.
        done = (number, _trees.count_if(resets, number_of_resets))
        memory = (inner, moment)
        return Clipped(
            out, done, measured, norm, jnp.inf, scale, memory, overflows=False
        )

    start = lambda tree: (jnp.zeros((), jnp.int32),) * 2
    memory = lambda params: _moments.init(NAME, optimizer, own_moment, params)
    return transformation(NAME, _moments.MomentState, start, step, memory)
