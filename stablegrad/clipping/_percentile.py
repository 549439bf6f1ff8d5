"""Clip by a percentile of past norms: AutoClip."""

import jax
import optax

from ..granularity._groups import Granularity
from ..thresholds._percentile import percentile
from ._base import clip_norms, clip_to_threshold
from .published._autoclip import autoclip


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
    one. As published, they are all so far, with the current one: at q = 10, nine of ten
    steps shrink, a lasting rise is followed after ten times the steps before it, and
    one nan makes every later step nan.

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
        clip = autoclip(10.0 if q is None else q, window, per)
    else:
        window = 1000 if window is None else window
        threshold = percentile(99.5 if q is None else q, window=window, per=per)
        clip = clip_to_threshold(threshold)
    return clip_norms("clip_by_percentile", clip)
