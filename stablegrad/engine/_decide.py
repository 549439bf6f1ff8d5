"""Judging a step: signals to judgements, judgements to one verdict."""

from collections.abc import Iterable
from typing import Any

import jax

from .. import _checks, _trees
from .._mapped_axes import HERE, Across
from .._norms import Measurement, unguarded, unguarded_over
from ..granularity._group_norms import group_norms
from ..granularity._groups import group
from ..responses._base import Response, Verdict, combine
from ..thresholds._base import Judgement, Scope, Threshold, judge, unobserved
from ..thresholds._signals import is_norm, is_outgoing, scalar_signal, signal_name

# For each response, one judgement a threshold.
Words = list[tuple[Judgement, ...]]


def scopes_of(
    responses: tuple[Response, ...], updates, params, over: Across = HERE
) -> list[tuple]:
    """What each threshold of each response is applied to, in this step."""
    leaves, measured = [], None
    if any(t.of_params for response in responses for t in response.thresholds):
        if params is None:
            raise _checks.missing_params("`param_ratio`")
        leaves = _trees.inexact_leaves(params, updates)
        measured = unguarded(params, updates, over)

    def scope(threshold: Threshold, _) -> Scope:
        grouping = group(threshold.per, updates)
        if not threshold.of_params or measured is None:
            return Scope(grouping)
        norms = group_norms(grouping, measured, leaves, unguarded_over)
        return Scope(grouping, norms)

    return _each(scope, responses, [response.thresholds for response in responses])


def judge_incoming(
    responses: tuple[Response, ...],
    scopes: list[tuple],
    gradient: Measurement,
    updates: Any,
    params: Any,
    extra: dict[str, Any],
    over: Across = HERE,
) -> Words:
    """What every threshold says before the inner optimizer has run.

    The thresholds of `responses` know their limits: `thresholds._batches.with_limits`.
    """
    leaves = _trees.inexact_leaves(updates)

    def word(threshold: Threshold, scope: Scope) -> Judgement:
        if is_outgoing(threshold.of):
            return unobserved(threshold, None, scope)
        if is_norm(threshold.of):
            signal = group_norms(scope.grouping, gradient, leaves)
        else:
            signal = _scalar(threshold, updates, params, extra, over)
        if signal is None:
            return unobserved(threshold, None, scope)
        return judge(threshold, None, signal, scope)

    return _each(word, responses, scopes)


def judge_outgoing(
    responses: tuple[Response, ...],
    scopes: list[tuple],
    words: Words,
    update: Measurement,
    leaves: list[jax.Array],
) -> Words:
    """The same words, completed by those on the inner optimizer's update."""

    def word(threshold: Threshold, item) -> Judgement:
        scope, earlier = item
        if not is_outgoing(threshold.of):
            return earlier
        signal = group_norms(scope.grouping, update, leaves)
        return judge(threshold, None, signal, scope)

    paired = [tuple(zip(*own, strict=True)) for own in zip(scopes, words, strict=True)]
    return _each(word, responses, paired)


def verdict_on(responses, response_states, words: Words) -> Verdict:
    """The strictest verdict of all responses."""
    return combine(
        response.propose(state, own)
        for response, state, own in zip(responses, response_states, words, strict=True)
    )


def limit_names(responses: Iterable[Response]) -> list[str]:
    """One name a threshold, as `skip_zscore_value_limit`; repeats are numbered."""
    names: list[str] = []
    for response in responses:
        for threshold in response.thresholds:
            of = signal_name(threshold.of)
            base = f"{response.name}_{threshold.name}_{of}_limit"
            repeats = sum(name.startswith(base) for name in names)
            names.append(f"{base}_{repeats + 1}" if repeats else base)
    return names


def _each(function, responses, items) -> list:
    """`function(threshold, item)` for every threshold of every response."""
    return [
        tuple(
            function(threshold, item)
            for threshold, item in zip(response.thresholds, own, strict=True)
        )
        for response, own in zip(responses, items, strict=True)
    ]


def loss_of(extra: dict[str, Any], over: Across) -> jax.Array | None:
    """The step's loss, float32 (), or None if no `value=` was passed."""
    loss = extra.get("value")
    return None if loss is None else over.mean(scalar_signal("value", loss))[0]


def _scalar(
    threshold: Threshold, updates, params, extra, over: Across
) -> jax.Array | None:
    """The signal of a threshold that watches the loss or a function; None if absent."""
    if callable(threshold.of):
        value = threshold.of(updates, params, extra)
        return over.mean(scalar_signal(signal_name(threshold.of), value))
    if extra.get("value") is not None:
        return over.mean(scalar_signal("value", extra["value"]))
    if threshold.required:
        raise _checks.missing_value(f"`{threshold.name}(..., of='value')`")
    return None
