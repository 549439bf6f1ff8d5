"""Judging a step: signals to judgements, judgements to one verdict."""

from collections.abc import Iterable
from typing import Any

import jax

from . import _checks
from ._measure import Measurement
from ._signals import (
    groups_of,
    is_norm,
    is_outgoing,
    norm_signal,
    scalar_signal,
    signal_name,
)
from .responses._core import Response, Verdict, combine
from .thresholds._core import Judgement, Threshold, judge, learn, unobserved

# For each response, one judgement a threshold.
Words = list[tuple[Judgement, ...]]


def judge_incoming(
    responses: tuple[Response, ...],
    states: tuple,
    gradient: Measurement,
    updates: Any,
    params: Any,
    extra: dict[str, Any],
) -> Words:
    """What every threshold says before the inner optimizer has run."""
    leaves = gradient.leaf_norms.shape[0]

    def word(threshold: Threshold, state) -> Judgement:
        groups = groups_of(threshold.per, leaves)
        if is_outgoing(threshold.of):
            return unobserved(threshold, state, groups)
        if is_norm(threshold.of):
            signal = norm_signal(threshold.per, gradient)
        else:
            signal = _scalar(threshold, updates, params, extra)
        if signal is None:
            return unobserved(threshold, state, groups)
        return judge(threshold, state, signal, groups)

    return _each(word, responses, states)


def judge_outgoing(
    responses: tuple[Response, ...], states: tuple, words: Words, update: Measurement
) -> Words:
    """The same words, completed by those on the inner optimizer's update."""

    def word(threshold: Threshold, pair) -> Judgement:
        state, earlier = pair
        if not is_outgoing(threshold.of):
            return earlier
        signal = norm_signal(threshold.per, update)
        return judge(threshold, state, signal, signal.shape[0])

    pairs = tuple(
        tuple(zip(own, earlier, strict=True))
        for own, earlier in zip(states, words, strict=True)
    )
    return _each(word, responses, pairs)


def verdict_on(responses, response_states, words: Words) -> Verdict:
    """The strictest verdict of all responses."""
    return combine(
        response.propose(state, own)
        for response, state, own in zip(responses, response_states, words, strict=True)
    )


def learned(responses, states, words: Words) -> tuple:
    """The threshold states after this step."""

    def after(threshold: Threshold, pair):
        state, judgement = pair
        return learn(threshold, state, judgement)

    pairs = tuple(
        tuple(zip(own, judged, strict=True))
        for own, judged in zip(states, words, strict=True)
    )
    return tuple(_each(after, responses, pairs))


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


def _scalar(threshold: Threshold, updates, params, extra) -> jax.Array | None:
    """The signal of a threshold that watches the loss or a function; None if absent."""
    if callable(threshold.of):
        value = threshold.of(updates, params, extra)
        return scalar_signal(signal_name(threshold.of), value)
    if extra.get("value") is not None:
        return scalar_signal("value", extra["value"])
    if threshold.required:
        raise _checks.missing_value(f"`{threshold.name}(..., of='value')`")
    return None
