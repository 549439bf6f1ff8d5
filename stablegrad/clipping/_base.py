"""Clips of norms in a chain: measure the gradient once, multiply it once.

A `NormClip` turns the norms of a step into factors. The default one of each method
compares them with a threshold. The published ones follow the recurrence of a paper, nan
and inf included.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .. import _checks, _trees
from .._compiled import compiled
from .._norms import OVERFLOW, measure
from .._scales import scale_leaves
from ..granularity._group_norms import (
    group_norms,
    group_scales,
    measure_groups,
    scaled_groups_norm,
)
from ..granularity._groups import Granularity, group
from ..responses._clip import factors
from ..thresholds._base import Scope, Threshold, judge, learn
from ._readings import ClipNumbers, ClipRecord


class ClippingState(NamedTuple):
    """State of a `clip_by_...` transformation."""

    clip_numbers: ClipNumbers  # Readings and statistics.


class ClipStep(NamedTuple):
    """The result of a `NormClip` for one step; arrays of shape (groups,)."""

    factors: jax.Array  # float32: the factor on the gradient.
    limit: jax.Array  # float32: the largest norm that is not shrunk.
    statistics: Any


class NormClip(NamedTuple):
    """A method that turns norms into factors."""

    per: Granularity
    init: Callable[[int], Any]  # groups -> statistics
    step: Callable[[Any, jax.Array, Scope], ClipStep]  # statistics, norms, scope
    of_params: bool = False  # Whether it uses the norms of the parameters.
    published: bool = False  # Whether it is given nan and inf, and passes them on.


def clip_to_threshold(threshold: Threshold) -> NormClip:
    """Return the method that shrinks norms above a threshold's limit to the limit."""

    def step(statistics, norms, scope: Scope) -> ClipStep:
        limit = threshold.limit(statistics, scope)
        judgement = judge(threshold, norms, limit, scope.grouping)
        learned = learn(threshold, statistics, judgement)
        return ClipStep(factors(judgement), judgement.limit, learned)

    return NormClip(threshold.per, threshold.init, step, threshold.of_params)


def transformation(
    name: str, kind: type, init_fn: Callable, update_fn: Callable
) -> optax.GradientTransformationExtraArgs:
    """Return a transformation whose state is of a kind and lies where `params` do."""

    def init(params):
        # Some optimizers start with one buffer in two places, which cannot be donated.
        return _trees.placed_like(_trees.distinct(init_fn(params)), params)

    check = lambda state, tree: _checks.require_state(name, kind, state)
    return optax.GradientTransformationExtraArgs(init, compiled(update_fn, check))


def clip_norms(name: str, clip: NormClip) -> optax.GradientTransformationExtraArgs:
    """Return the transformation that clips the gradients of a chain by their norms."""
    record = ClipRecord(name, lambda tree: clip.init(group(clip.per, tree).count))

    def init_fn(params) -> ClippingState:
        return ClippingState(record.init(params))

    def update_fn(updates, state, params=None, **extra):
        del extra
        grouping = group(clip.per, updates)
        measured, norms = measure_groups(grouping, updates)
        param_norms = None
        if clip.of_params:
            if params is None:
                raise _checks.missing_params(f"`{name}`")
            own = _trees.inexact_leaves(params, updates)
            param_norms = group_norms(grouping, measure(params, updates), own)
        statistics = record.statistics(state.clip_numbers, updates)
        done = clip.step(statistics, norms, Scope(grouping, param_norms))
        scales = group_scales(grouping, done.factors)
        finite = (norms < OVERFLOW)[0] if grouping.whole else measured.finite
        keep = None if clip.published else finite
        clipped = scale_leaves(updates, scales, updates, keep)
        if grouping.whole:
            length = scales.by_leaf * measured.norm
        else:
            length = scaled_groups_norm(grouping, measured, norms, done.factors)
        numbers = record.after_step(
            state.clip_numbers,
            updates,
            done.statistics,
            raw=measured.norm,
            clipped=jnp.where(finite, length, 0.0),
            limit=jnp.min(done.limit, initial=jnp.inf),
            scale=scales.smallest(),
            finite=finite,
        )
        return clipped, ClippingState(numbers)

    return transformation(name, ClippingState, init_fn, update_fn)
