"""Clip by a multiple of each leaf's running norm: AdaGC."""

import jax
import optax

from ..granularity._groups import Granularity
from ..thresholds._ema_ratio import ema_ratio
from ._base import clip_norms, clip_to_threshold, only_published
from .published._adagc import adagc


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

    As published, with h the factor on the leaf and G the whole gradient, m rises by at
    most 0.1 % a step, so that most healthy steps are clipped:

        warm-up:  h = min(1, max_norm / (||G|| + 1e-8));  m = min(m, h ||g||)
        then:     h = min(1, ratio m / ||g||);  m = d m + (1 - d) h ||g||

    Args:
        ratio: Tolerated multiple of the mean, > 1. None: 2; 1.05 if published.
        decay: Weight d of the past, in [0, 1).
        warmup_steps: Steps that set the first mean, >= 1. None: 25; 100 if published.
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
        clip = adagc(ratio, decay, warmup_steps, per, max_norm)
    else:
        only_published(clip_by_ema, max_norm=max_norm)
        ratio = 2.0 if ratio is None else ratio
        warmup_steps = 25 if warmup_steps is None else warmup_steps
        threshold = ema_ratio(ratio, decay=decay, warmup_steps=warmup_steps, per=per)
        clip = clip_to_threshold(threshold)
    return clip_norms("clip_by_ema", clip)
