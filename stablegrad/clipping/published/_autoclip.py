"""AutoClip as published: `clip_by_percentile(published=True)`."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..._checks import require, require_count
from ...granularity._groups import Granularity
from ...thresholds._base import Scope
from ...thresholds._statistics import write
from .._base import NormClip, NormStep


class AutoClipStatistics(NamedTuple):
    history: jax.Array  # float32 (groups, window): raw norms, a ring.
    steps_seen: jax.Array  # int32 (groups,)


def autoclip(q, window: int, per: Granularity) -> NormClip:
    """Return AutoClip; arguments as for `clip_by_percentile`."""
    require("q", q, "in [0, 100]", lambda x: 0 <= x <= 100)
    require_count("window", window)

    def init(groups: int) -> AutoClipStatistics:
        return AutoClipStatistics(
            jnp.zeros((groups, window), jnp.float32), jnp.zeros((groups,), jnp.int32)
        )

    def step(statistics: AutoClipStatistics, norms, scope: Scope) -> NormStep:
        history = write(statistics.history, statistics.steps_seen % window, norms)
        seen = statistics.steps_seen + 1
        used = jnp.arange(window)[None, :] < seen[:, None]
        limit = jnp.nanpercentile(jnp.where(used, history, jnp.nan), q, axis=-1)
        poisoned = jnp.any(used & jnp.isnan(history), axis=-1)
        limit = jnp.where(poisoned, jnp.nan, limit)
        factor = jnp.minimum(limit / (norms + 1e-6), 1.0)
        return NormStep(factor, limit, AutoClipStatistics(history, seen))

    return NormClip(per, init, step, published=True)
