"""Clip element by element against the running second moment: SPAM's idea."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .. import _checks, _trees
from .._checks import require, require_count
from .._compiled import CompiledUpdate
from .._norms import measure
from .._scales import scale_leaves, uniform
from . import _moments
from ._readings import ClipReadings, init_readings, read
from .published import _spam

NAME = "clip_by_second_moment"
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
    """Clamps each gradient element to a multiple of its own second moment: SPAM.

        v_hat = v / (1 - d^k);    b = sqrt(threshold * max(v_hat, mean(v_hat_{t-1})))
        g <- g * min(1, b / |g|);    v <- d v + (1 - d) |g|^2

    Published: b = sqrt(threshold v), not corrected for its start, so that the limit
    drifts from 10 to 45 standard deviations within one period; an element whose v is
    zero is clamped to zero for ever; the first 20 steps after each reset are free; the
    moments are reset on a clock, their bias correction is not. Default: corrected, held
    against no less than the leaf's mean, in force from the second step, and reset only
    if asked to, correction included; the leaf's mean outlives a reset. Elements above
    1e18, whose squares would overflow Adam's moments, never pass.

    Args:
        threshold: Tolerated square in units of the second moment, > 1. 5000 is 71
            standard deviations: it catches broken elements, not rough steps.
        inner: An optimizer with moments `mu` and `nu`, such as `optax.adam`, that takes
            the clipped gradient. Its own `nu` is then the yardstick, and a reset means
            its moments. None: a chain member with a second moment of its own.
        decay: Weight d of the past, in (0, 1); that of `inner`, if there is one.
        reset_every: Steps from one reset to the next, 0 for never. None: 0; as
            published 500.
        reset_on_spike: Whether to reset after a step of which clipping leaves less than
            half of the norm. Not as published.
        rewarmup_steps: Steps over which the updates grow from 0.01 back to 1 after each
            reset, along a cosine, >= 0. None: 0; as published 150, if there is an
            `inner`.
        published: Whether to follow the paper's recurrence exactly. Its Adam adds `eps`
            before the bias correction of v, which is the affair of `inner`.

    Returns:
        A transformation for `optax.chain`. A step with a nan or inf anywhere becomes
        all zeros, is not shown to `inner`, and is counted; as published it passes.

    Raises:
        ValueError: If a concrete argument is out of range, or `inner` has not one `mu`
            and one `nu`.

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
    rewarmup = (150 if published else 0) if rewarmup_steps is None else rewarmup_steps
    require_count("reset_every", period, 0)
    require_count("rewarmup_steps", rewarmup, 0)
    if inner is not None:
        _checks.require_optimizer(NAME, inner)
    optimizer = optax.with_extra_args_support(inner or optax.identity())
    settings = (NAME, threshold, optimizer, inner is None, decay, period, rewarmup)
    if published:
        require("reset_on_spike", reset_on_spike, "False as published", lambda x: not x)
        return _spam.spam(*settings)
    return _clamped(*settings, reset_on_spike)


class SecondMomentState(NamedTuple):
    """State of `clip_by_second_moment`."""

    clip_inner: Any  # State of the inner optimizer.
    clip_moment: Any  # Second moment of the clipped gradient, () if `inner` has it.
    moment_steps: jax.Array  # int32: steps in the moment since its last reset.
    moment_resets: jax.Array  # int32
    leaf_levels: jax.Array  # float32 (leaves,): mean moments; no reset clears them.
    clip_readings: dict[str, ClipReadings]


def _clamped(
    name, threshold, optimizer, own_moment, decay, period, rewarmup, reset_on_spike
) -> optax.GradientTransformationExtraArgs:
    """The default face."""

    def init_fn(params) -> SecondMomentState:
        none = jnp.zeros((), jnp.int32)
        inner = _trees.strongly_typed(optimizer.init(params))
        if not own_moment:
            _moments.require_moments(name, inner, params)
        moment = _moments.zeros(params) if own_moment else ()
        levels = jnp.zeros((len(_trees.inexact_leaves(params)),), jnp.float32)
        counts = _trees.distinct((none, none, levels, init_readings(name)))
        return SecondMomentState(inner, moment, *counts)

    def bounds_of(known, levels, like):
        """The largest magnitude of each element; none may square to inf."""
        level = iter(levels)

        def bound(leaf):
            floor = next(level)
            size = jnp.sqrt(jnp.maximum(leaf, floor)) * jnp.sqrt(
                jnp.asarray(threshold, jnp.float32)
            )
            return jnp.where(floor > 0, size, _moments.LARGEST_ROOT)

        return _trees.map_inexact(bound, like, known)

    def levels_of(moment, steps, before, like) -> jax.Array:
        """The mean of each leaf's moment, or what it was before the moment began."""
        known = _moments.debiased(moment, decay, steps, like)
        means = [
            jnp.mean(v) if v.size else 0.0 for v in _trees.inexact_leaves(known, like)
        ]
        now = jnp.stack([*means, jnp.zeros(())])[:-1].astype(jnp.float32)
        return jnp.where((steps > 0) & (now > 0), now, before)

    def update_fn(updates, state, params=None, **extra):
        inner, moment, steps = state.clip_inner, state.clip_moment, state.moment_steps
        measured = measure(updates)
        finite = measured.finite
        yardstick = moment if own_moment else _moments.second_moment(inner)
        known = _moments.debiased(yardstick, decay, steps, updates)
        bounds = bounds_of(known, state.leaf_levels, updates)
        clipped = _moments.clamp(updates, bounds, updates)
        clipped = _trees.zero_unless(finite, clipped, updates)
        left = jnp.where(finite, measure(clipped).norm, 0.0)
        ratio = jnp.where(finite & (measured.norm > 0), left / measured.norm, 1.0)
        out, new_inner = optimizer.update(clipped, inner, params, **extra)
        tracked = _moments.track(moment, clipped, decay) if own_moment else ()
        scales = uniform(warmth(state))
        out = scale_leaves(out, scales, updates, keep=finite)
        new_inner = _trees.select(finite, new_inner, inner)
        tracked = _trees.select(finite, tracked, moment)
        steps = _trees.count_if(finite, steps)
        yardstick = tracked if own_moment else _moments.second_moment(new_inner)
        levels = levels_of(yardstick, steps, state.leaf_levels, updates)
        resets = finite & (steps == period) if period else jnp.zeros((), bool)
        if reset_on_spike:
            resets |= finite & (ratio < SPIKE)
        if own_moment:
            zero = jax.tree.map(jnp.zeros_like, tracked)
            tracked = _trees.select(resets, zero, tracked)
        else:
            zero = _moments.cleared(new_inner, "mu", "nu", "count")
            new_inner = _trees.select(resets, zero, new_inner)
        readings = read(
            state.clip_readings,
            raw=measured.norm,
            clipped=left,
            limit=jnp.inf,
            scale=jnp.where(ratio < 1 - 1e-6, ratio, 1.0),
            finite=finite,
        )
        return out, SecondMomentState(
            new_inner,
            _trees.cast_like(tracked, moment),
            jnp.where(resets, 0, steps),
            _trees.count_if(resets, state.moment_resets),
            jnp.where(resets, state.leaf_levels, levels),
            readings,
        )

    def warmth(state: SecondMomentState) -> jax.Array:
        """The factor on the updates, which grows again after a reset."""
        phase = state.moment_steps / (rewarmup + 1)
        rising = 1 - 0.99 * (1 + jnp.cos(jnp.pi * phase)) / 2
        rises = (state.moment_resets > 0) & (state.moment_steps < rewarmup)
        return jnp.where(rises, rising, 1.0).astype(jnp.float32)

    return optax.GradientTransformationExtraArgs(init_fn, CompiledUpdate(update_fn))
