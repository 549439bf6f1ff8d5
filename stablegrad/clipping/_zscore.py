"""Clip by a z-score of the norm: ZClip."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from .. import _checks
from .._checks import require, require_count
from ..granularity._groups import Granularity
from ..thresholds._base import Scope
from ..thresholds._statistics import write
from ..thresholds._zscore import zscore
from ._base import Rule, Ruling, by_threshold, clipping

MODES = ("zscore", "percentile")
OPTIONS = ("adaptive_scaling", "mean")


class ZClipState(NamedTuple):
    """State of ZClip as published."""

    warmup_norms: jax.Array  # float32 (groups, warmup_steps)
    steps_seen: jax.Array  # int32 (groups,)
    norm_mean: jax.Array  # float32 (groups,)
    norm_variance: jax.Array  # float32 (groups,)


def clip_by_zscore(
    z: float | jax.Array = 2.5,
    *,
    decay: float | jax.Array | None = None,
    warmup_steps: int = 25,
    per: Granularity = "global",
    published: bool = False,
    max_norm: float | jax.Array | None = 1.0,
    mode: str = "zscore",
    option: str = "adaptive_scaling",
    clip_factor: float | jax.Array = 1.0,
    skip_update_on_spike: bool = False,
    eps: float | jax.Array = 1e-6,
) -> optax.GradientTransformationExtraArgs:
    """Shrinks a gradient whose norm is an outlier among the past norms: ZClip.

        c_t = exp(m + z s);    g <- g * min(1, c_t / ||g||)

    Published: m and s are those of the norms, not of their logarithms, and learn from
    clipped norms: a lasting threefold rise is clipped for ever, and one nan switches
    the clip off for ever. Default: `zscore`, for which a lasting shift by any factor
    is normal within 62 steps. As published, with n the norm, mean m and deviation s:

        zscore:      z_t = (n - m) / (s + eps);  if z_t > z:  c = f (m + z^2 s / z_t)
        percentile:  if n > m + z s:  c = m + z s

    with f the clip factor, or c = m for option="mean"; then where n > min(c, max_norm),
    g <- g min(c, max_norm) / (n + 1e-6). m and s follow c, or n where there is no c.

    Args:
        z: Standard deviations above the mean that are still normal, > 0.
        decay: Weight of the past, in (0.5, 1); as published in (0, 1). None: 0.98; as
            published 0.97.
        warmup_steps: Steps that set the first statistics, >= 3; as published >= 1.
        per: For what, as for `fixed`.
        published: Whether to follow the paper's recurrence exactly. All arguments
            below belong to it.
        max_norm: A fixed limit besides, in the gradient's unit, or None.
        mode: "zscore" or "percentile".
        option: "adaptive_scaling" or "mean", for mode="zscore".
        clip_factor: Multiplies the limit of "adaptive_scaling", > 0.
        skip_update_on_spike: Whether a spike leaves the statistics alone.
        eps: Added to the deviation, > 0.

    Returns:
        A transformation for `optax.chain`. A step with a nan or inf anywhere becomes
        all zeros, and is counted; as published it passes.

    Raises:
        ValueError: If a concrete argument is out of range, or one that belongs to the
            published rule is given without it.

    Example:
        >>> import optax
        >>> import stablegrad as sg
        >>> tx = optax.chain(sg.clip_by_zscore(2.5), optax.adamw(1e-3))

    Reference:
        Kumar et al., ZClip (2025), https://arxiv.org/abs/2504.02507.
    """
    if not published:
        _checks.only_published(
            max_norm=(max_norm, 1.0),
            mode=(mode, MODES[0]),
            option=(option, OPTIONS[0]),
            clip_factor=(clip_factor, 1.0),
            skip_update_on_spike=(skip_update_on_spike, False),
            eps=(eps, 1e-6),
        )
        threshold = zscore(
            z,
            decay=0.98 if decay is None else decay,
            warmup_steps=warmup_steps,
            per=per,
        )
        return clipping("clip_by_zscore", by_threshold(threshold))
    decay = 0.97 if decay is None else decay
    require("z", z, "> 0", lambda x: 0 < x < float("inf"))
    require("decay", decay, "in (0, 1)", lambda x: 0 < x < 1)
    require("clip_factor", clip_factor, "> 0", lambda x: 0 < x < float("inf"))
    require("eps", eps, "> 0", lambda x: 0 < x < float("inf"))
    require("max_norm", max_norm, "> 0 or None", lambda x: x is None or x > 0)
    require("mode", mode, f"one of {MODES}", lambda x: x in MODES)
    require("option", option, f"one of {OPTIONS}", lambda x: x in OPTIONS)
    require_count("warmup_steps", warmup_steps)

    def init(groups: int) -> ZClipState:
        zeros = jnp.zeros((groups,), jnp.float32)
        return ZClipState(
            jnp.zeros((groups, warmup_steps), jnp.float32),
            jnp.zeros((groups,), jnp.int32),
            zeros,
            zeros,
        )

    def adaptive_limit(state: ZClipState, norms):
        """The clip value, and whether there is one."""
        mean, deviation = state.norm_mean, jnp.sqrt(state.norm_variance)
        if mode == "percentile":
            return mean + z * deviation, norms > mean + z * deviation
        score = (norms - mean) / (deviation + eps)
        if option == "mean":
            return mean, score > z
        return clip_factor * (mean + z * deviation / (score / z)), score > z

    def follow(state: ZClipState, norms, scope: Scope) -> Ruling:
        del scope
        warming = state.steps_seen < warmup_steps
        value, spike = adaptive_limit(state, norms)
        spike &= ~warming
        target = jnp.where(spike, value, norms)
        limit = target if max_norm is None else jnp.minimum(target, max_norm)
        factor = jnp.where(norms > limit, limit / (norms + 1e-6), 1.0)
        seen = state.steps_seen + 1
        kept = write(state.warmup_norms, state.steps_seen, norms)
        full = seen == warmup_steps
        mean = decay * state.norm_mean + (1 - decay) * target
        variance = decay * state.norm_variance + (1 - decay) * jnp.square(target - mean)
        still = warming | (spike if skip_update_on_spike else False)
        mean = jnp.where(still, state.norm_mean, mean)
        variance = jnp.where(still, state.norm_variance, variance)
        learned = ZClipState(
            kept,
            jnp.where(warming, seen, state.steps_seen),
            jnp.where(full, jnp.mean(kept, axis=-1), mean),
            jnp.where(full, jnp.var(kept, axis=-1), variance),
        )
        return Ruling(factor, limit, learned)

    return clipping("clip_by_zscore", Rule(per, init, follow, published=True))
