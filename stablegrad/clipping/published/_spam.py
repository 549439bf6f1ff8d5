"""SPAM as published: `clip_by_second_moment(published=True)`."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from ... import _trees
from ..._norms import measure
from ..._scales import Scales, scale_leaves
from .. import _elements, _moments
from .._base import Clipped, transformation

PROTECTED = 20  # Steps without a limit, at the start and after each reset.


class SpamStatistics(NamedTuple):
    total_steps: jax.Array  # int32
    moment_resets: jax.Array  # int32


def spam(
    name: str, threshold, optimizer, own_moment: bool, decay, period: int, warmup: int
) -> optax.GradientTransformationExtraArgs:
    """Return SPAM; arguments as for `clip_by_second_moment`."""

    def step(updates, before: SpamStatistics, memory, params, extra) -> Clipped:
        inner, moment = memory
        number = _trees.increment(before.total_steps)
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
            limit = jnp.sqrt(threshold * v.astype(jnp.float32))
            return jnp.where(armed, limit, jnp.inf)

        bounds = _trees.map_inexact(bound, updates, yardstick)
        clipped = _elements.clamp(updates, bounds)
        if own_moment:
            moment = _moments.track(moment, clipped, decay)
        out, inner = optimizer.update(clipped, inner, params, **extra)
        if warmup and not own_moment:
            warmth = Scales(_moments.warmth(age, warmup)).where(number >= period)
            out = scale_leaves(out, warmth, updates)
        raw, left = measure(updates).norm, measure(clipped).norm
        ratio = jnp.where(raw > 0, left / raw, 1.0)
        return Clipped(
            out,
            SpamStatistics(number, _trees.count_if(resets, before.moment_resets)),
            raw=raw,
            clipped=left,
            limit=jnp.inf,
            scale=jnp.where(ratio < 1 - 1e-6, ratio, 1.0),  # Not a rounding error.
            finite=jnp.isfinite(raw),
            memory=(inner, moment),
        )

    start = lambda tree: SpamStatistics(*[jnp.zeros((), jnp.int32)] * 2)
    memory = lambda params: _moments.init(name, optimizer, own_moment, params)
    return transformation(name, _moments.MomentState, start, step, memory)
