"""Clip by a multiple of each leaf's running norm: AdaGC."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from .. import _checks
from .._checks import require, require_count
from ..granularity._groups import Granularity
from ..thresholds._base import Scope
from ..thresholds._ema_ratio import ema_ratio
from ._base import Rule, Ruling, by_threshold, clipping

EPS = 1e-8


class AdaGCState(NamedTuple):
    """State of AdaGC as published."""

    running_norm: jax.Array  # float32 (groups,): gamma, of clipped norms.
    steps_seen: jax.Array  # int32 (groups,)


def clip_by_ema(
    ratio: float | jax.Array | None = None,
    *,
    decay: float | jax.Array = 0.98,
    warmup_steps: int | None = None,
    per: Granularity = "leaf",
    published: bool = False,
    max_norm: float | jax.Array = 1.0,
) -> optax.GradientTransformationExtraArgs:
    """Shrinks a leaf whose norm is above a multiple of its running mean: AdaGC.

        g_i <- g_i * min(1, ratio * m_i / ||g_i||)

    Published: m starts at the smallest of the first norms and follows clipped ones, so
    that it rises by 0.1 % a step at most, and most healthy steps are clipped. Default:
    `ema_ratio`, which starts at the median, follows bounded norms, and after a lasting
    shift begins anew. As published, h being the factor on the leaf, G the whole:

        warm-up:  h = min(1, max_norm / (||G|| + 1e-8));  m = min(m, h ||g||)
        then:     h = min(1, ratio m / ||g||);  m = d m + (1 - d) h ||g||

    Args:
        ratio: Tolerated multiple of the mean, > 1. None: 2; as published 1.05.
        decay: Weight d of the past, in [0, 1).
        warmup_steps: Steps that set the first mean, >= 1. None: 25; as published 100.
        per: For what, as for `fixed`.
        published: Whether to follow the paper's recurrence exactly.
        max_norm: As published, the limit on the whole gradient's norm meanwhile, > 0.

    Returns:
        A transformation for `optax.chain`. A step with a nan or inf anywhere becomes
        all zeros, and is counted; as published it passes.

    Raises:
        ValueError: If a concrete argument is out of range.

    Example:
        >>> import optax
        >>> import stablegrad as sg
        >>> tx = optax.chain(sg.clip_by_ema(2.0), optax.adamw(1e-3))

    Reference:
        Wang et al., AdaGC (2025), https://arxiv.org/abs/2502.11034.
    """
    if not published:
        _checks.only_published(max_norm=(max_norm, 1.0))
        threshold = ema_ratio(
            2.0 if ratio is None else ratio,
            decay=decay,
            warmup_steps=25 if warmup_steps is None else warmup_steps,
            per=per,
        )
        return clipping("clip_by_ema", by_threshold(threshold))
    ratio = 1.05 if ratio is None else ratio
    warmup = 100 if warmup_steps is None else warmup_steps
    require("ratio", ratio, "> 1", lambda x: 1 < x < float("inf"))
    require("decay", decay, "in [0, 1)", lambda x: 0 <= x < 1)
    require("max_norm", max_norm, "> 0", lambda x: 0 < x < float("inf"))
    require_count("warmup_steps", warmup)

    def init(groups: int) -> AdaGCState:
        return AdaGCState(
            jnp.zeros((groups,), jnp.float32), jnp.zeros((groups,), jnp.int32)
        )

    def follow(state: AdaGCState, norms, scope: Scope) -> Ruling:
        del scope
        mean, seen = state.running_norm, state.steps_seen
        warming = seen + 1 < warmup
        whole = jnp.sqrt(jnp.sum(jnp.square(norms))) + EPS
        limit = jnp.where(warming, norms * (max_norm / whole), ratio * mean)
        factor = jnp.minimum(jnp.where(warming, max_norm / whole, limit / norms), 1.0)
        clipped = factor * norms
        lowest = jnp.where(seen == 0, clipped, jnp.minimum(mean, clipped))
        followed = decay * mean + (1 - decay) * clipped
        new = jnp.where(warming, lowest, followed)
        count = jnp.where(warming, seen + 1, seen)
        return Ruling(factor, limit, AdaGCState(new, count))

    return clipping("clip_by_ema", Rule(per, init, follow, published=True))
