"""Clip by a z-score of the norm: ZClip, robust and as published."""

import jax
import jax.numpy as jnp
import optax

from .._checks import require, require_count
from ..granularity._groups import Granularity
from ..thresholds._base import Scope
from ..thresholds._statistics import write
from ..thresholds._zscore import zscore
from ._base import (
    NormClip,
    NormStep,
    clip_norms,
    clip_to_threshold,
    only_published,
    patience_after,
)

MODES = ("zscore", "percentile")
OPTIONS = ("adaptive_scaling", "mean")


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
    """Shrink a gradient whose norm is an outlier among the past norms: ZClip.

        c_t = exp(m + z s);    g <- g * min(1, c_t / ||g||),    m, s those of `zscore`

    As published, mean m and deviation s are those of the norms n, and follow c, or n
    where there is no c. A lasting threefold rise is clipped for ever. With f the clip
    factor:

        zscore:      z_t = (n - m) / (s + eps);  if z_t > z:  c = f (m + z^2 s / z_t)
        percentile:  if n > m + z s:  c = m + z s
        g <- g min(c, max_norm) / (n + 1e-6)  where n > min(c, max_norm)

    or c = m for option="mean".

    Args:
        z: Standard deviations above the mean that are still normal, > 0.
        decay: Weight of the past, in (0.5, 1), or in (0, 1) if published. None: 0.98;
            0.97 if published.
        warmup_steps: Steps that set the first statistics, >= 3, or >= 1 if published.
        per: The groups that are clipped separately, as for `fixed`.
        published: Whether to follow the recurrence of the paper exactly. All arguments
            below are for the published method only.
        max_norm: A further fixed limit, in the gradient's unit, > 0, or None.
        mode: "zscore" or "percentile".
        option: "adaptive_scaling" or "mean", for mode="zscore".
        clip_factor: Factor on the limit of "adaptive_scaling", > 0.
        skip_update_on_spike: Whether the statistics ignore spikes.
        eps: Added to the deviation, > 0.

    Returns:
        A transformation for `optax.chain`. A gradient with a nan or inf, or of norm
        1e18 or more, becomes zeros and teaches nothing; if published, it passes.

    Raises:
        ValueError: If a concrete argument is out of range, or one that belongs to the
            published method is given without `published=True`.

    Example:
        >>> import optax
        >>> import stablegrad as sg
        >>> tx = optax.chain(sg.clip_by_zscore(2.5), optax.adamw(1e-3))

    Reference:
        Kumar et al., ZClip (2025), https://arxiv.org/abs/2504.02507.
    """
    settings = dict(
        max_norm=max_norm,
        mode=mode,
        option=option,
        clip_factor=clip_factor,
        skip_update_on_spike=skip_update_on_spike,
        eps=eps,
    )
    if published:
        decay = 0.97 if decay is None else decay
        clip = _published(z, decay, warmup_steps, per, **settings)
    else:
        only_published(clip_by_zscore, **settings)
        decay = 0.98 if decay is None else decay
        patience = patience_after(warmup_steps)
        threshold = zscore(
            z, decay=decay, warmup_steps=warmup_steps, patience=patience, per=per
        )
        clip = clip_to_threshold(threshold)
    return clip_norms("clip_by_zscore", clip)


def _published(
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
    require("z", z, "> 0", lambda x: 0 < x < float("inf"))
    require("decay", decay, "in (0, 1)", lambda x: 0 < x < 1)
    require("clip_factor", clip_factor, "> 0", lambda x: 0 < x < float("inf"))
    require("eps", eps, "> 0", lambda x: 0 < x < float("inf"))
    require("max_norm", max_norm, "> 0 or None", lambda x: x is None or x > 0)
    require("mode", mode, f"one of {MODES}", lambda x: x in MODES)
    require("option", option, f"one of {OPTIONS}", lambda x: x in OPTIONS)
    require_count("warmup_steps", warmup_steps)

    def init(groups: int):
        norms = jnp.zeros((groups, warmup_steps), jnp.float32)
        none, zeros = jnp.zeros((groups,), jnp.int32), jnp.zeros((groups,), jnp.float32)
        return norms, none, zeros, zeros

    def adaptive_limit(norms, mean, deviation):
        """Return the limit on norms that are spikes, and which are."""
        if mode == "percentile":
            return mean + z * deviation, norms > mean + z * deviation
        score = (norms - mean) / (deviation + eps)
        if option == "mean":
            return mean, score > z
        return clip_factor * (mean + z * deviation / (score / z)), score > z

    def step(statistics, norms, scope: Scope) -> NormStep:
        first_norms, steps, before_mean, before_variance = statistics
        warming = steps < warmup_steps
        value, spike = adaptive_limit(norms, before_mean, jnp.sqrt(before_variance))
        spike &= ~warming
        target = jnp.where(spike, value, norms)
        limit = target if max_norm is None else jnp.minimum(target, max_norm)
        factor = jnp.where(norms > limit, limit / (norms + 1e-6), 1.0)
        first_norms, seen = write(first_norms, steps, norms), steps + 1
        full = seen == warmup_steps
        mean = decay * before_mean + (1 - decay) * target
        variance = decay * before_variance + (1 - decay) * jnp.square(target - mean)
        frozen = warming | (spike if skip_update_on_spike else False)
        mean = jnp.where(frozen, before_mean, mean)
        variance = jnp.where(frozen, before_variance, variance)
        learned = (
            first_norms,
            jnp.where(warming, seen, steps),
            jnp.where(full, jnp.mean(first_norms, axis=-1), mean),
            jnp.where(full, jnp.var(first_norms, axis=-1), variance),
        )
        return NormStep(factor, limit, learned)

    return NormClip(per, init, step, published=True)
