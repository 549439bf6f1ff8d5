"""Clip by a multiple of each leaf's running norm: AdaGC, robust and as published."""

import jax
import jax.numpy as jnp
import optax

from .._checks import require, require_count
from ..granularity._groups import Granularity
from ..thresholds._base import Scope
from ..thresholds._ema_ratio import ema_ratio
from ._base import (
    NormClip,
    NormStep,
    clip_norms,
    clip_to_threshold,
    only_published,
    patience_after,
)

EPS = 1e-8


def clip_by_ema(
    ratio: float | jax.Array | None = None,
    *,
    decay: float | jax.Array = 0.98,
    warmup_steps: int | None = None,
    per: Granularity = "leaf",
    published: bool = False,
    max_norm: float | jax.Array = 1.0,
) -> optax.GradientTransformationExtraArgs:
    """Shrink a leaf whose norm is above a multiple of its running mean: AdaGC.

        g_i <- g_i * min(1, ratio * m_i / ||g_i||),    m that of `ema_ratio`

    As published, with h the factor on the leaf and G all that is clipped, m rises by at
    most 0.1 % a step, so that most healthy steps are clipped:

        warm-up:  h = min(1, max_norm / (||G|| + 1e-8));  m = min(m, h ||g||)
        then:     h = min(1, ratio m / ||g||);  m = d m + (1 - d) h ||g||

    Args:
        ratio: Tolerated multiple of the mean, > 1. None: 2; 1.05 if published.
        decay: Weight d of the past, in [0, 1).
        warmup_steps: Steps that set the first mean, >= 1. None: 25; 100 if published,
            where it is >= 2, and one step less sets the mean, as in the paper.
        per: The groups that are clipped separately, as for `fixed`.
        published: Whether to follow the recurrence of the paper exactly.
        max_norm: Limit on ||G|| during the warm-up, > 0. Only with `published`.

    Returns:
        A transformation for `optax.chain`. A gradient with a nan or inf, or of norm
        1e18 or more, becomes zeros and teaches nothing; if published, it passes.

    Raises:
        ValueError: If a concrete argument is out of range.

    Example:
        >>> import optax
        >>> import stablegrad as sg
        >>> tx = optax.chain(sg.clip_by_ema(2.0), optax.adamw(1e-3))

    Reference:
        Wang et al., AdaGC (2025), https://arxiv.org/abs/2502.11034.
    """
    if published:
        ratio = 1.05 if ratio is None else ratio
        warmup_steps = 100 if warmup_steps is None else warmup_steps
        clip = _published(ratio, decay, warmup_steps, per, max_norm)
    else:
        only_published(clip_by_ema, max_norm=max_norm)
        ratio = 2.0 if ratio is None else ratio
        warmup_steps = 25 if warmup_steps is None else warmup_steps
        patience = patience_after(warmup_steps)
        threshold = ema_ratio(
            ratio, decay=decay, warmup_steps=warmup_steps, patience=patience, per=per
        )
        clip = clip_to_threshold(threshold)
    return clip_norms("clip_by_ema", clip)


def _published(ratio, decay, warmup_steps: int, per: Granularity, max_norm) -> NormClip:
    require("ratio", ratio, "> 1", lambda x: 1 < x < float("inf"))
    require("decay", decay, "in [0, 1)", lambda x: 0 <= x < 1)
    require("max_norm", max_norm, "> 0", lambda x: 0 < x < float("inf"))
    require_count("warmup_steps", warmup_steps, 2)

    def init(groups: int):
        return jnp.zeros((groups,), jnp.float32), jnp.zeros((groups,), jnp.int32)

    def step(statistics, norms, scope: Scope) -> NormStep:
        mean, seen = statistics  # `seen` counts up to `warmup_steps` - 1.
        warming = seen + 1 < warmup_steps
        whole = jnp.sqrt(jnp.sum(jnp.square(norms))) + EPS
        limit = jnp.where(warming, norms * (max_norm / whole), ratio * mean)
        factor = jnp.minimum(jnp.where(warming, max_norm / whole, limit / norms), 1.0)
        clipped = factor * norms
        lowest = jnp.where(seen == 0, clipped, jnp.minimum(mean, clipped))
        followed = decay * mean + (1 - decay) * clipped
        new = jnp.where(warming, lowest, followed)
        return NormStep(factor, limit, (new, jnp.where(warming, seen + 1, seen)))

    return NormClip(per, init, step, published=True)
