"""ZClip as published: `clip_by_zscore(published=True)`."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..._checks import require, require_count
from ...granularity._groups import Granularity
from ...thresholds._base import Scope
from ...thresholds._statistics import write
from .._base import NormClip, NormStep

MODES = ("zscore", "percentile")
OPTIONS = ("adaptive_scaling", "mean")


class ZClipStatistics(NamedTuple):
    warmup_norms: jax.Array  # float32 (groups, warmup_steps)
    steps_seen: jax.Array  # int32 (groups,), up to `warmup_steps`.
    norm_mean: jax.Array  # float32 (groups,)
    norm_variance: jax.Array  # float32 (groups,)


def zclip(
    z,
    decay,
    warmup_steps: int,
    per: Granularity,
    *,
    max_norm,
    mode,
    option,
    clip_factor,
    skip_update_on_spike,
    eps,
) -> NormClip:
    """Return ZClip; arguments as for `clip_by_zscore`."""
    require("z", z, "> 0", lambda x: 0 < x < float("inf"))
    require("decay", decay, "in (0, 1)", lambda x: 0 < x < 1)
    require("clip_factor", clip_factor, "> 0", lambda x: 0 < x < float("inf"))
    require("eps", eps, "> 0", lambda x: 0 < x < float("inf"))
    require("max_norm", max_norm, "> 0 or None", lambda x: x is None or x > 0)
    require("mode", mode, f"one of {MODES}", lambda x: x in MODES)
    require("option", option, f"one of {OPTIONS}", lambda x: x in OPTIONS)
    require_count("warmup_steps", warmup_steps)

    def init(groups: int) -> ZClipStatistics:
        norms = jnp.zeros((groups, warmup_steps), jnp.float32)
        none, zeros = jnp.zeros((groups,), jnp.int32), jnp.zeros((groups,), jnp.float32)
        return ZClipStatistics(norms, none, zeros, zeros)

    def adaptive_limit(statistics: ZClipStatistics, norms):
        """Return the limit on norms that are spikes, and which are."""
        mean, deviation = statistics.norm_mean, jnp.sqrt(statistics.norm_variance)
        if mode == "percentile":
            return mean + z * deviation, norms > mean + z * deviation
        score = (norms - mean) / (deviation + eps)
        if option == "mean":
            return mean, score > z
        return clip_factor * (mean + z * deviation / (score / z)), score > z

    def step(statistics: ZClipStatistics, norms, scope: Scope) -> NormStep:
        before_mean, before_variance = statistics.norm_mean, statistics.norm_variance
        warming = statistics.steps_seen < warmup_steps
        value, spike = adaptive_limit(statistics, norms)
        spike &= ~warming
        target = jnp.where(spike, value, norms)
        limit = target if max_norm is None else jnp.minimum(target, max_norm)
        factor = jnp.where(norms > limit, limit / (norms + 1e-6), 1.0)
        seen = statistics.steps_seen + 1
        kept = write(statistics.warmup_norms, statistics.steps_seen, norms)
        full = seen == warmup_steps
        mean = decay * before_mean + (1 - decay) * target
        variance = decay * before_variance + (1 - decay) * jnp.square(target - mean)
        frozen = warming | (spike if skip_update_on_spike else False)
        mean = jnp.where(frozen, before_mean, mean)
        variance = jnp.where(frozen, before_variance, variance)
        learned = ZClipStatistics(
            kept,
            jnp.where(warming, seen, statistics.steps_seen),
            jnp.where(full, jnp.mean(kept, axis=-1), mean),
            jnp.where(full, jnp.var(kept, axis=-1), variance),
        )
        return NormStep(factor, limit, learned)

    return NormClip(per, init, step, published=True)
