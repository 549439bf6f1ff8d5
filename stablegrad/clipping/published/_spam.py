"""SPAM's rule as published: what `clip_by_second_moment(published=True)` does."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ... import _trees
from ..._compiled import CompiledUpdate
from ..._norms import measure
from ..._scales import scale_leaves, uniform
from .. import _moments
from .._readings import ClipReadings, init_readings, read

PROTECTED = 20  # Steps without a limit, at the start and after each reset.


class SpamState(NamedTuple):
    """State of SPAM's rule."""

    clip_inner: Any  # State of the inner optimizer.
    clip_moment: Any  # Second moment of the clipped gradient, () if `inner` has it.
    total_steps: jax.Array  # int32
    moment_resets: jax.Array  # int32
    clip_readings: dict[str, ClipReadings]


def spam(
    name: str, threshold, optimizer, own_moment: bool, decay, period: int, warmup: int
) -> optax.GradientTransformationExtraArgs:
    """Clamps elements to sqrt(threshold v), and resets the moments on a clock."""

    def init_fn(params) -> SpamState:
        none = jnp.zeros((), jnp.int32)
        inner = _trees.strongly_typed(optimizer.init(params))
        if not own_moment:
            _moments.require_moments(name, inner, params)
        moment = _moments.zeros(params) if own_moment else ()
        counts = _trees.distinct((none, none, init_readings(name)))
        return SpamState(inner, moment, *counts)

    def update_fn(updates, state, params=None, **extra):
        step = _trees.increment(state.total_steps)
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
        bounds = jax.tree.map(
            lambda v: jnp.where(armed, jnp.sqrt(threshold * v), jnp.inf), yardstick
        )
        clipped = _moments.clamp(updates, bounds, updates)
        if own_moment:
            moment = _trees.map_inexact(
                lambda v, g: decay * v + (1 - decay) * jnp.square(jnp.abs(g)),
                updates,
                moment,
                clipped,
            )
        out, inner = optimizer.update(clipped, inner, params, **extra)
        if warmup and not own_moment:
            rising = 1 - 0.99 * (1 + jnp.cos(jnp.pi * age / (warmup + 1))) / 2
            scale = jnp.where((step >= period) & (age < warmup), rising, 1.0)
            out = scale_leaves(out, uniform(scale), updates)
        raw, left = measure(updates).norm, measure(clipped).norm
        ratio = jnp.where(raw > 0, left / raw, 1.0)
        readings = read(
            state.clip_readings,
            raw=raw,
            clipped=left,
            limit=jnp.inf,
            scale=ratio,
            finite=jnp.isfinite(raw),
        )
        return out, SpamState(
            inner,
            _trees.cast_like(moment, state.clip_moment),
            step,
            _trees.count_if(resets, state.moment_resets),
            readings,
        )

    return optax.GradientTransformationExtraArgs(init_fn, CompiledUpdate(update_fn))
