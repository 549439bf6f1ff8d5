"""A clip in a chain: measure the gradient once, ask a rule, multiply once.

A rule turns the norms of a step into factors. The default face of each method asks a
threshold; the published face follows its paper's recurrence to the letter, nan and
all.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .. import _checks, _trees
from .._compiled import CompiledUpdate
from .._norms import measure
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
from ._readings import ClipReadings, init_readings, read


class ClippingState(NamedTuple):
    """State of a `clip_by_...` transformation."""

    clip_rule_state: Any
    clip_readings: dict[str, ClipReadings]  # One entry, under the method's name.


class Ruling(NamedTuple):
    """What a rule says of one step; arrays of shape (groups,)."""

    factors: jax.Array  # float32: what to multiply by.
    limit: jax.Array  # float32: the largest norm that stays as it is.
    state: Any


class Rule(NamedTuple):
    """How one method turns norms into factors."""

    per: Granularity
    init: Callable[[int], Any]  # groups -> state
    rule: Callable[[Any, jax.Array, Scope], Ruling]  # state, norms, scope
    of_params: bool = False
    published: bool = False  # Takes norms, nan and inf as they come.


def by_threshold(threshold: Threshold) -> Rule:
    """The rule that shrinks what a threshold does not call normal to its limit."""

    def rule(state, norms, scope: Scope) -> Ruling:
        limit = threshold.limit(state, scope)
        judgement = judge(threshold, norms, limit, scope.grouping)
        learned = learn(threshold, state, judgement)
        return Ruling(factors(judgement), judgement.limit, learned)

    return Rule(threshold.per, threshold.init, rule, threshold.of_params)


def clipping(name: str, rule: Rule) -> optax.GradientTransformationExtraArgs:
    """Return the transformation that applies a rule to the gradients of a chain."""

    def init_fn(params) -> ClippingState:
        count = group(rule.per, params).count
        state = ClippingState(rule.init(count), init_readings(name))
        return _trees.placed_like(_trees.distinct(state), params)

    def update_fn(updates, state, params=None, **extra):
        del extra
        grouping = group(rule.per, updates)
        measured, norms = measure_groups(grouping, updates)
        param_norms = None
        if rule.of_params:
            if params is None:
                raise _checks.missing_params(f"`{name}`")
            params = _trees.matching(params, updates)
            own = _trees.inexact_leaves(params, updates)
            param_norms = group_norms(grouping, measure(params, updates), own)
        ruling = rule.rule(state.clip_rule_state, norms, Scope(grouping, param_norms))
        scales = group_scales(grouping, ruling.factors)
        finite = measured.finite
        keep = None if rule.published else finite
        clipped = scale_leaves(updates, scales, updates, keep)
        length = scaled_groups_norm(grouping, measured, norms, ruling.factors)
        readings = read(
            state.clip_readings,
            raw=measured.norm,
            clipped=jnp.where(finite, length, 0.0),
            limit=jnp.min(ruling.limit, initial=jnp.inf),
            scale=scales.smallest(),
            finite=finite,
        )
        new = _trees.cast_like(ruling.state, state.clip_rule_state)
        return clipped, ClippingState(new, readings)

    check = functools.partial(_checks.require_state, name, ClippingState)
    return optax.GradientTransformationExtraArgs(
        init_fn, CompiledUpdate(update_fn, check)
    )
