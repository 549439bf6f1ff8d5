"""AdaGC as published: `clip_by_ema(published=True)`."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..._checks import require, require_count
from ...granularity._groups import Granularity
from ...thresholds._base import Scope
from .._base import NormClip, NormStep

EPS = 1e-8


class AdaGCStatistics(NamedTuple):
    running_norm: jax.Array  # float32 (groups,): running mean of clipped norms.
    steps_seen: jax.Array  # int32 (groups,), up to `warmup_steps` - 1.


def adagc(ratio, decay, warmup_steps: int, per: Granularity, max_norm) -> NormClip:
    """Return AdaGC; arguments as for `clip_by_ema`."""
    require("ratio", ratio, "> 1", lambda x: 1 < x < float("inf"))
    require("decay", decay, "in [0, 1)", lambda x: 0 <= x < 1)
    require("max_norm", max_norm, "> 0", lambda x: 0 < x < float("inf"))
    require_count("warmup_steps", warmup_steps)

    def init(groups: int) -> AdaGCStatistics:
        return AdaGCStatistics(
            jnp.zeros((groups,), jnp.float32), jnp.zeros((groups,), jnp.int32)
        )

    def step(statistics: AdaGCStatistics, norms, scope: Scope) -> NormStep:
        mean, seen = statistics
        warming = seen + 1 < warmup_steps
        whole = jnp.sqrt(jnp.sum(jnp.square(norms))) + EPS
        limit = jnp.where(warming, norms * (max_norm / whole), ratio * mean)
        factor = jnp.minimum(jnp.where(warming, max_norm / whole, limit / norms), 1.0)
        clipped = factor * norms
        lowest = jnp.where(seen == 0, clipped, jnp.minimum(mean, clipped))
        followed = decay * mean + (1 - decay) * clipped
        new = jnp.where(warming, lowest, followed)
        count = jnp.where(warming, seen + 1, seen)
        return NormStep(factor, limit, AdaGCStatistics(new, count))

    return NormClip(per, init, step, published=True)
