"""Clip by a percentile of past norms: AutoClip."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from .._checks import require, require_count
from ..granularity._groups import Granularity
from ..thresholds._base import Scope
from ..thresholds._percentile import percentile
from ..thresholds._statistics import write
from ._base import Rule, Ruling, by_threshold, clipping


class AutoClipState(NamedTuple):
    """State of AutoClip as published."""

    history: jax.Array  # float32 (groups, window): raw norms, a ring.
    steps_seen: jax.Array  # int32 (groups,)


def clip_by_percentile(
    q: float | jax.Array | None = None,
    *,
    window: int | None = None,
    per: Granularity = "global",
    published: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Shrinks a gradient whose norm is above a percentile of the past norms: AutoClip.

        c_t = percentile(norms, q);    g <- g * min(1, c_t / ||g||)

    Published: the percentile of all norms up to and with the current one, as they are,
    so that q = 10 shrinks nine of ten steps, a lasting rise takes ten times its own
    onset, and one nan makes every later step nan. Default: `percentile` of a window of
    bounded norms before this one, which shrinks under 1 % of healthy steps, and follows
    a lasting shift within 60.

    Args:
        q: Per cent, in [0, 100]. None: 99.5; as published 10.
        window: Norms remembered, >= 25, as published >= 1. None: 1000; as published
            10,000, up to which it is the whole history.
        per: For what, as for `fixed`.
        published: Whether to follow the paper's recurrence exactly.

    Returns:
        A transformation for `optax.chain`. A step with a nan or inf anywhere becomes
        all zeros, and is counted; as published it passes.

    Raises:
        ValueError: If a concrete argument is out of range.

    Example:
        >>> import optax
        >>> import stablegrad as sg
        >>> tx = optax.chain(sg.clip_by_percentile(), optax.adamw(1e-3))

    Reference:
        Seetharaman et al., AutoClip (2020), https://arxiv.org/abs/2007.14469.
    """
    if not published:
        rule = by_threshold(
            percentile(
                99.5 if q is None else q,
                window=1000 if window is None else window,
                per=per,
            )
        )
        return clipping("clip_by_percentile", rule)
    q = 10.0 if q is None else q
    length = 10_000 if window is None else window
    require("q", q, "in [0, 100]", lambda x: 0 <= x <= 100)
    require_count("window", length)

    def init(groups: int) -> AutoClipState:
        return AutoClipState(
            jnp.zeros((groups, length), jnp.float32), jnp.zeros((groups,), jnp.int32)
        )

    def follow(state: AutoClipState, norms, scope: Scope) -> Ruling:
        del scope
        history = write(state.history, state.steps_seen % length, norms)
        seen = state.steps_seen + 1
        used = jnp.arange(length)[None, :] < seen[:, None]
        limit = jnp.nanpercentile(jnp.where(used, history, jnp.nan), q, axis=-1)
        poisoned = jnp.any(used & jnp.isnan(history), axis=-1)
        limit = jnp.where(poisoned, jnp.nan, limit)
        factor = jnp.minimum(limit / (norms + 1e-6), 1.0)
        return Ruling(factor, limit, AutoClipState(history, seen))

    return clipping("clip_by_percentile", Rule(per, init, follow, published=True))
