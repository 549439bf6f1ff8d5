"""Clip each leaf's largest elements: Stable-SPAM's AdaClip."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .. import _checks, _trees
from .._checks import require, require_count
from .._compiled import CompiledUpdate
from .._norms import LARGEST, measure
from ..granularity._groups import independent
from ..responses._clip import factors
from ..thresholds._base import Scope, judge, learn
from ..thresholds._ema_ratio import ema_ratio
from . import _moments
from ._readings import ClipReadings, init_readings, read

NAME = "clip_by_max"


class AdaClipState(NamedTuple):
    """State of Stable-SPAM's AdaClip as published."""

    running_max: jax.Array  # float32 (leaves,)
    correction_steps: jax.Array  # int32: set to 1 by each reset of the moments.
    total_steps: jax.Array  # int32


class MaxState(NamedTuple):
    """State of `clip_by_max`."""

    max_rule_state: Any
    clip_readings: dict[str, ClipReadings]


def clip_by_max(
    ratio: float | jax.Array = 2.0,
    *,
    decay: float | jax.Array | None = None,
    reset_every: int = 1000,
    published: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Clamps the elements of a leaf that exceed its usual largest one: AdaClip.

        M_i = max |g_i|;    g_i <- g_i * min(1, ratio m_i / |g_i|), element by element

    Published: m is the bias-corrected running mean of M, current step included, so
    every second step is clipped; elements above it are multiplied by m / M, so that an
    element just above m ends far below those under it; and the correction begins anew
    whenever the moments are reset, which multiplies m by up to 500. Default: m is that
    of `ema_ratio`, elements are clamped to the limit and keep their order, and there is
    no reset.

    Args:
        ratio: Tolerated multiple of the usual maximum, > 1. Not as published, where it
            is 1.
        decay: Weight of the past, in [0, 1). None: 0.98; as published 0.999.
        reset_every: As published, steps between resets of the moments that restart the
            correction; 0 for never.
        published: Whether to follow the paper's recurrence exactly.

    Returns:
        A transformation for `optax.chain`. A step with a nan or inf anywhere becomes
        all zeros, and is counted; as published it passes.

    Raises:
        ValueError: If a concrete argument is out of range.

    Example:
        >>> import optax
        >>> import stablegrad as sg
        >>> tx = optax.chain(sg.clip_by_max(), optax.adamw(1e-3))

    Reference:
        Huang et al., Stable-SPAM (2025), https://arxiv.org/abs/2502.17055.
    """
    require_count("reset_every", reset_every, 0)
    if not published:
        _checks.only_published(reset_every=(reset_every, 1000))
    decay = (0.999 if published else 0.98) if decay is None else decay
    require("decay", decay, "in [0, 1)", lambda x: 0 <= x < 1)
    threshold = ema_ratio(2.0 if published else ratio, decay=decay, per="leaf")

    def init_fn(params) -> MaxState:
        leaves = len(_trees.inexact_leaves(params))
        none = jnp.zeros((), jnp.int32)
        rule = threshold.init(leaves)
        if published:
            rule = AdaClipState(jnp.zeros((leaves,), jnp.float32), none, none)
        return MaxState(*_trees.distinct((rule, init_readings(NAME))))

    def published_limits(state: AdaClipState, largest):
        """The limits, the factors on what is above them, and the new state."""
        steps = _trees.increment(state.correction_steps)
        total = _trees.increment(state.total_steps)
        running = decay * state.running_max + (1 - decay) * largest
        limit = running / (1 - jnp.asarray(decay, jnp.float32) ** steps)
        resets = (total % reset_every == 0) if reset_every else jnp.zeros((), bool)
        steps = jnp.where(resets, 1, steps)
        return limit, limit / largest, AdaClipState(running, steps, total)

    def update_fn(updates, state, params=None, **extra):
        del params, extra
        measured = measure(updates)
        finite = measured.finite
        leaves = _trees.inexact_leaves(updates)
        # The sum of squares tells a nan; XLA's maximum may not.
        largest = jnp.stack(
            [_bounded(jnp.max(jnp.abs(x), initial=0)) for x in leaves]
            or [jnp.zeros((), jnp.float32)]
        )[: len(leaves)]
        largest = jnp.where(jnp.isnan(measured.leaf_norms), jnp.nan, largest)
        if published:
            limit, factor, rule = published_limits(state.max_rule_state, largest)
            shrink = factor
        else:
            grouping = independent(len(leaves))
            signal = jnp.where(finite, largest, 0.0)
            normal = threshold.limit(state.max_rule_state, Scope(grouping))
            word = judge(threshold, signal, normal, grouping, observed=finite)
            rule = learn(threshold, state.max_rule_state, word)
            limit, factor, shrink = word.limit, factors(word), None
        clipped = _clamped(updates, limit, shrink)
        if not published:
            clipped = _trees.zero_unless(finite, clipped, updates)
        readings = read(
            state.clip_readings,
            raw=measured.norm,
            clipped=jnp.where(finite, measure(clipped).norm, 0.0),
            limit=jnp.min(limit, initial=jnp.inf),
            scale=jnp.minimum(jnp.min(factor, initial=1.0), 1.0),
            finite=finite,
        )
        rule = _trees.cast_like(rule, state.max_rule_state)
        return clipped, MaxState(rule, readings)

    return optax.GradientTransformationExtraArgs(init_fn, CompiledUpdate(update_fn))


def _bounded(largest) -> jax.Array:
    """In float32, where a finite float64 stays finite."""
    narrow = largest.astype(jnp.float32)
    return jnp.where(jnp.isfinite(largest), jnp.minimum(narrow, LARGEST), narrow)


def _clamped(updates, limit, shrink):
    """Elements beyond their leaf's limit at the limit, or multiplied by `shrink`."""
    leaves, structure = jax.tree.flatten(updates)
    done, index = [], 0
    for leaf in leaves:
        if _trees.is_inexact(leaf):
            bound = limit[index]
            if shrink is None:
                leaf = _moments.shrunk(leaf, bound)
            else:
                scaled = (leaf * shrink[index]).astype(leaf.dtype)
                leaf = jnp.where(jnp.abs(leaf) > bound, scaled, leaf)
            index += 1
        done.append(leaf)
    return structure.unflatten(done)
