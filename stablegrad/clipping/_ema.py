"""Clip by a multiple of each leaf's running norm: AdaGC."""

import jax
import optax

from .. import _checks
from ..granularity._groups import Granularity
from ..thresholds._ema_ratio import ema_ratio
from ._base import clip_norms, clip_to_threshold
from .published._adagc import adagc

NAME = "clip_by_ema"


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

        g_i <- g_i * min(1, ratio * m_i / ||g_i||)

    By default, m is the running mean of `ema_ratio`, which starts at the median,
    follows bounded norms, and starts again after a lasting shift.

    As published, m starts at the smallest of the first norms and follows clipped ones,
    so that it rises by 0.1 % a step at most, and most healthy steps are clipped. With h
    the factor on the leaf and G the whole gradient:

        warm-up:  h = min(1, max_norm / (||G|| + 1e-8));  m = min(m, h ||g||)
        then:     h = min(1, ratio m / ||g||);  m = d m + (1 - d) h ||g||

    Args:
        ratio: Tolerated multiple of the mean, > 1. None: 2; 1.05 if published.
        decay: Weight d of the past, in [0, 1).
        warmup_steps: Steps that set the first mean, >= 1. None: 25; 100 if published.
        per: The groups that are clipped separately, as for `fixed`.
        published: Whether to follow the recurrence of the paper exactly.
        max_norm: The limit on the norm of the whole gradient during the warm-up, > 0.
            Only with `published`.

    Returns:
        A transformation for `optax.chain`. A gradient that holds a nan or inf, or whose
        norm is 1e18 or more, becomes all zeros, teaches nothing, and is counted in
        `metrics`. As published it is passed on.

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
        return clip_norms(NAME, adagc(ratio, decay, warmup_steps, per, max_norm))
    _checks.only_published(max_norm=(max_norm, 1.0))
    threshold = ema_ratio(
        2.0 if ratio is None else ratio,
        decay=decay,
        warmup_steps=25 if warmup_steps is None else warmup_steps,
        per=per,
    )
    return clip_norms(NAME, clip_to_threshold(threshold))
