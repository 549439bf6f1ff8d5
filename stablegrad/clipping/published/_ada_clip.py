"""Stable-SPAM's AdaClip as published: `clip_by_max(published=True)`."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from ... import _trees
from ..._checks import require
from ..._norms import measure
from .. import _moments
from .._base import Clipped, ClippingState, transformation
from .._elements import leaf_maxima, scale_above


class AdaClipStatistics(NamedTuple):
    running_max: jax.Array  # float32 (leaves,)
    correction_steps: jax.Array  # int32: 1 after each reset of the moments.
    total_steps: jax.Array  # int32


def ada_clip(
    name: str, decay, reset_every: int
) -> optax.GradientTransformationExtraArgs:
    """Return AdaClip; arguments as for `clip_by_max`."""
    require("decay", decay, "in [0, 1)", lambda x: 0 <= x < 1)

    def start(tree) -> AdaClipStatistics:
        leaves, none = len(_trees.inexact_leaves(tree)), jnp.zeros((), jnp.int32)
        return AdaClipStatistics(jnp.zeros((leaves,), jnp.float32), none, none)

    def step(updates, before: AdaClipStatistics, memory, params, extra) -> Clipped:
        measured = measure(updates)
        largest = leaf_maxima(updates)
        steps = _trees.increment(before.correction_steps)
        total = _trees.increment(before.total_steps)
        running = decay * before.running_max + (1 - decay) * largest
        limit = running * _moments.correction(decay, steps)
        factors = limit / largest
        clipped = scale_above(updates, limit, factors)
        if reset_every:
            steps = jnp.where(total % reset_every == 0, 1, steps)
        return Clipped(
            clipped,
            AdaClipStatistics(running, steps, total),
            raw=measured.norm,
            clipped=jnp.where(measured.finite, measure(clipped).norm, 0.0),
            limit=limit,
            scale=jnp.min(factors, initial=1.0),
            finite=measured.finite,
        )

    return transformation(name, ClippingState, start, step)
