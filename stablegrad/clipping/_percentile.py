"""Clip by a percentile of past norms: AutoClip, robust and as published."""

import jax
import jax.numpy as jnp
import optax

from .._checks import require, require_count
from ..granularity._groups import Granularity
from ..thresholds._base import Scope
from ..thresholds._percentile import percentile
from ..thresholds._statistics import write
from ._base import NormClip, NormStep, clip_norms, clip_to_threshold


def clip_by_percentile(
    q: float | jax.Array | None = None,
    *,
    window: int | None = None,
    per: Granularity = "global",
    published: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Shrink a gradient whose norm is above a percentile of past norms: AutoClip.

        c_t = percentile(norms, q);    g <- g * min(1, c_t / ||g||)

    The norms are those of `percentile`: a window of bounded norms before the current
    one. As published, all norms so far are used, including the current one. Then at
    q = 10, nine of ten steps are shrunk, the limit follows a lasting rise only after
    ten times as many steps as came before the rise, and one nan makes every later step
    nan.

    Args:
        q: Percentile, in [0, 100]. None: 99.5; 10 if published.
        window: Norms remembered, >= 25, or >= 1 if published. None: 1000; 10,000 if
            published, which is the whole history of a shorter run.
        per: The groups that are clipped separately, as for `fixed`.
        published: Whether to follow the recurrence of the paper exactly.

    Returns:
        A transformation for `optax.chain`. A gradient with a nan or inf, or of norm
        1e18 or more, becomes zeros and teaches nothing; if published, it passes.

    Raises:
        ValueError: If a concrete argument is out of range.

    Example:
        >>> import optax
        >>> import stablegrad as sg
        >>> tx = optax.chain(sg.clip_by_percentile(), optax.adamw(1e-3))

    Reference:
        Seetharaman et al., AutoClip (2020), https://arxiv.org/abs/2007.14469.
    """
    if published:
        window = 10_000 if window is None else window
        clip = _published(10.0 if q is None else q, window, per)
    else:
        window = 1000 if window is None else window
        threshold = percentile(99.5 if q is None else q, window=window, per=per)
        clip = clip_to_threshold(threshold)
    return clip_norms("clip_by_percentile", clip)


def _published(q, window: int, per: Granularity) -> NormClip:
    require("q", q, "in [0, 100]", lambda x: 0 <= x <= 100)
    require_count("window", window)

    def init(groups: int):
        return jnp.zeros((groups, window), jnp.float32), jnp.zeros((groups,), jnp.int32)

    def step(statistics, norms, scope: Scope) -> NormStep:
        ring, seen = statistics
        ring, seen = write(ring, seen % window, norms), seen + 1
        place = jnp.arange(window, dtype=jnp.int32)
        used = place[None, :] < seen[:, None]
        limit = jnp.nanpercentile(jnp.where(used, ring, jnp.nan), q, axis=-1)
        poisoned = jnp.any(used & jnp.isnan(ring), axis=-1)
        limit = jnp.where(poisoned, jnp.nan, limit)
        factor = jnp.minimum(limit / (norms + 1e-6), 1.0)
        return NormStep(factor, limit, (ring, seen))

    return NormClip(per, init, step, published=True)
