"""Clip by a percentile of past norms: AutoClip."""

import jax
import optax

from ..granularity._groups import Granularity
from ..thresholds._percentile import percentile
from ._base import clip_norms, clip_to_threshold
from .published._autoclip import autoclip

NAME = "clip_by_percentile"


def clip_by_percentile(
    q: float | jax.Array | None = None,
    *,
    window: int | None = None,
    per: Granularity = "global",
    published: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Shrink a gradient whose norm is above a percentile of past norms: AutoClip.

        c_t = percentile(norms, q);    g <- g * min(1, c_t / ||g||)

    By default, the percentile is taken over a window of bounded norms before the
    current one, as in `percentile`. It shrinks under 1 % of healthy steps, and follows
    a lasting shift within 60 steps.

    As published, it is taken over all norms including the current one. With q = 10 it
    shrinks nine of ten steps; it follows a lasting rise only after ten times as many
    steps as came before; and one nan makes every later step nan.

    Args:
        q: Percentile, in [0, 100]. None: 99.5; 10 if published.
        window: Norms remembered, >= 25, or >= 1 if published. None: 1000; 10,000 if
            published, which is the whole history of a shorter run.
        per: The groups that are clipped separately, as for `fixed`.
        published: Whether to follow the recurrence of the paper exactly.

    Returns:
        A transformation for `optax.chain`. A gradient that holds a nan or inf, or whose
        norm is 1e18 or more, becomes all zeros, teaches nothing, and is counted in
        `metrics`. As published it is passed on.

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
        return clip_norms(NAME, autoclip(10.0 if q is None else q, window, per))
    threshold = percentile(
        99.5 if q is None else q, window=1000 if window is None else window, per=per
    )
    return clip_norms(NAME, clip_to_threshold(threshold))
