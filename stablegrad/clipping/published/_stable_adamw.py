"""StableAdamW as published: `clip_update_rms(published=True)`."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from ... import _trees
from ..._norms import measure
from ..._scales import Scales, scale_leaves, scaled_norm
from .. import _elements, _moments
from .._base import Clipped, transformation


class StableAdamWStatistics(NamedTuple):
    moment_steps: jax.Array  # int32: steps in the moment.


def stable_adamw(
    name: str, optimizer, max_rms, decay, eps
) -> optax.GradientTransformationExtraArgs:
    """Return StableAdamW; arguments as for `clip_update_rms`."""

    def step(updates, before: StableAdamWStatistics, memory, params, extra) -> Clipped:
        inner, moment = memory
        steps = _trees.increment(before.moment_steps)
        moment = _moments.track(moment, updates, decay)
        correction = _moments.correction(decay, steps)
        least = jnp.asarray(eps, jnp.float32) ** 2

        def squares(g, v):
            return _elements.squares(g) / jnp.maximum(correction * v, least)

        ratios = _trees.map_inexact(squares, updates, updates, moment)
        rms = jnp.sqrt(_moments.means(ratios, updates))
        scales = Scales(1 / jnp.maximum(rms / max_rms, 1.0))
        out, inner = optimizer.update(updates, inner, params, **extra)
        measured = measure(out, updates)
        length = scaled_norm(measured, scales, out, updates)
        return Clipped(
            scale_leaves(out, scales, updates),
            StableAdamWStatistics(steps),
            raw=measured.norm,
            clipped=jnp.where(measured.finite, length, 0.0),
            limit=max_rms,
            scale=scales.smallest(),
            finite=measured.finite,
            memory=(inner, moment),
        )

    start = lambda tree: StableAdamWStatistics(jnp.zeros((), jnp.int32))
    memory = lambda params: _moments.init(name, optimizer, True, params)
    return transformation(name, _moments.MomentState, start, step, memory)
