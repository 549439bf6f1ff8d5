"""A clip in a chain: measure the gradient once, ask a rule, multiply once.

A rule turns the norms of a step into factors. The default face of each method asks a
threshold; the published face follows its paper's recurrence to the letter, nan and
all.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .. import _checks, _trees
from .._groups import Granularity, group, group_norms, leaf_factors
from .._measure import measure, norms_over, scaled_norm, unguarded, unguarded_over
from .._record import encode
from ..responses._clip import factors
from ..thresholds._core import Scope, Threshold, judge, learn


class ClipReadings(NamedTuple):
    """What a clip did, for `metrics`; rank-0, `encode`d so that it stays finite."""

    raw_norm: jax.Array  # float32: L2 norm of what came in.
    clipped_norm: jax.Array  # float32: L2 norm of what went out.
    limit: jax.Array  # float32: the strictest limit that the step met.
    scale: jax.Array  # float32 in [0, 1]: the smallest factor.
    clipped_steps: jax.Array  # int32: steps that were shrunk, since `init`.
    dropped_steps: jax.Array  # int32: steps with a nan or inf, which became zeros.


# Fields of `ClipReadings` that may stand for a nan or an inf.
ENCODED_READINGS = ("raw_norm", "clipped_norm", "limit")


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
        judgement = judge(threshold, state, norms, scope)
        learned = learn(threshold, state, judgement)
        return Ruling(factors(judgement), judgement.limit, learned)

    return Rule(threshold.per, threshold.init, rule, threshold.of_params)


def init_readings(name: str) -> dict[str, ClipReadings]:
    """Nothing seen yet."""
    zero, none = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)
    one = jnp.ones((), jnp.float32)
    return {name: ClipReadings(zero, zero, zero, one, none, none)}


def read(
    readings, *, raw, clipped, limit, scale, finite, shrunk=None
) -> dict[str, ClipReadings]:
    """The readings after one step, `shrunk` unless the scale was 1."""
    ((name, before),) = readings.items()
    shrunk = finite & (scale < 1 if shrunk is None else shrunk)
    return {
        name: ClipReadings(
            encode(raw),
            encode(clipped),
            encode(limit),
            jnp.where(jnp.isfinite(scale), scale, 0.0).astype(jnp.float32),
            _trees.count_if(shrunk, before.clipped_steps),
            _trees.count_if(~finite, before.dropped_steps),
        )
    }


def clipping(name: str, rule: Rule) -> optax.GradientTransformationExtraArgs:
    """The transformation that applies a rule to the gradients of a chain."""

    def init_fn(params) -> ClippingState:
        count = group(rule.per, params).count
        return ClippingState(*_trees.distinct((rule.init(count), init_readings(name))))

    def update_fn(updates, state, params=None, **extra):
        del extra
        grouping = group(rule.per, updates)
        measured = unguarded(updates) if rule.published else measure(updates)
        param_norms = None
        if rule.of_params:
            if params is None:
                raise _checks.missing_params(f"`{name}`")
            leaves = _trees.inexact_leaves(params, updates)
            sizes = unguarded(params, updates)
            param_norms = group_norms(grouping, sizes, leaves, unguarded_over)
        over = unguarded_over if rule.published else norms_over
        norms = group_norms(grouping, measured, _trees.inexact_leaves(updates), over)
        ruling = rule.rule(state.clip_rule_state, norms, Scope(grouping, param_norms))
        scales = leaf_factors(grouping, ruling.factors)
        finite = jnp.isfinite(measured.norm)
        keep = None if rule.published else finite
        clipped = _trees.scale_leaves(updates, scales, updates, keep)
        readings = read(
            state.clip_readings,
            raw=measured.norm,
            clipped=jnp.where(finite, scaled_norm(measured, scales, updates), 0.0),
            limit=jnp.min(ruling.limit, initial=jnp.inf),
            scale=_trees.least(scales),
            finite=finite,
        )
        new = jax.tree.map(
            lambda after, before: after.astype(before.dtype),
            ruling.state,
            state.clip_rule_state,
        )
        return clipped, ClippingState(new, readings)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
