"""SPAM as published: `clip_by_second_moment(published=True)`."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ... import _trees
from ..._norms import measure
from ..._scales import Scales, scale_leaves
from .. import _elements, _moments
from .._base import transformation
from .._readings import ClipNumbers, ClipRecord

PROTECTED = 20  # Steps without a limit, at the start and after each reset.


class SpamState(NamedTuple):
    """State of SPAM."""

    clip_inner: Any  # State of the inner optimizer.
    clip_moment: Any  # Second moment of the clipped gradient, () if `inner` has it.
    clip_numbers: ClipNumbers  # Readings and statistics.


class SpamStatistics(NamedTuple):
    """Statistics of SPAM."""

    total_steps: jax.Array  # int32
    moment_resets: jax.Array  # int32


def spam(
    name: str, threshold, optimizer, own_moment: bool, decay, period: int, warmup: int
) -> optax.GradientTransformationExtraArgs:
    """Return SPAM; arguments as for `clip_by_second_moment`.

    Reference:
        Huang et al., SPAM (2025), https://arxiv.org/abs/2501.06842.
    """
    none = lambda tree: SpamStatistics(*[jnp.zeros((), jnp.int32)] * 2)
    record = ClipRecord(name, none)

    def init_fn(params) -> SpamState:
        inner, moment = _moments.init(name, optimizer, own_moment, params)
        return SpamState(inner, moment, record.init(params))

    def update_fn(updates, state, params=None, **extra):
        before = record.statistics(state.clip_numbers, updates)
        step = _trees.increment(before.total_steps)
        inner, moment = state.clip_inner, state.clip_moment
        age = step % period if period else step
        resets = (age == 0) if period else jnp.zeros((), bool)
        if own_moment:
            zero = jax.tree.map(jnp.zeros_like, moment)
            moment = yardstick = _trees.select(resets, zero, moment)
        else:
            inner = _trees.select(resets, _moments.cleared(inner, "mu", "nu"), inner)
            yardstick = _moments.second_moment(inner)
        armed = (step >= PROTECTED) & (age >= PROTECTED)

        def bound(v):
            limit = jnp.sqrt(threshold * v.astype(jnp.float32))
            return jnp.where(armed, limit, jnp.inf)

        bounds = _trees.map_inexact(bound, updates, yardstick)
        clipped = _elements.clamp(updates, bounds)
        if own_moment:
            moment = _moments.track(moment, clipped, decay)
        out, inner = optimizer.update(clipped, inner, params, **extra)
        if warmup and not own_moment:
            warmth = Scales(_moments.warmth(age, warmup)).where(step >= period)
            out = scale_leaves(out, warmth, updates)
        raw, left = measure(updates).norm, measure(clipped).norm
        ratio = jnp.where(raw > 0, left / raw, 1.0)
        numbers = record.after_step(
            state.clip_numbers,
            updates,
            SpamStatistics(step, _trees.count_if(resets, before.moment_resets)),
            raw=raw,
            clipped=left,
            limit=jnp.inf,
            scale=jnp.where(ratio < 1 - 1e-6, ratio, 1.0),  # Not a rounding error.
            finite=jnp.isfinite(raw),
        )
        return out, SpamState(inner, moment, numbers)

    return transformation(name, SpamState, init_fn, update_fn)
