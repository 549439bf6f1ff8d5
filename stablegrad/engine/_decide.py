"""The decision on a step: signals to judgements, judgements to one verdict."""

import difflib
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax

from .. import _missing, _trees
from .._mapped_axes import MappedAxes, warn_of_replicas
from .._norms import Measurement, measure
from .._scales import Scales, scale_leaves
from ..granularity._group_norms import group_norms
from ..granularity._groups import group
from ..responses._base import Response, Verdict, combine
from ..thresholds._base import Judgement, Scope, Threshold, judge, unobserved
from ..thresholds._signals import is_norm, is_outgoing, scalar_signal, signal_name
from ._families import PerThreshold, Statistics


class StepContext(NamedTuple):
    """What one step is given."""

    updates: Any  # The incoming gradient.
    params: Any
    like: Any  # Its floating-point leaves select those of the other trees.
    extra: dict[str, Any]  # Further arguments, such as `value=`.
    axes: MappedAxes
    # Of gradient, inner state and parameters. A schedule has none.
    inner_update: Callable[[Any, Any, Any], tuple[Any, Any]] | None = None
    inner_state: Any = None

    @property
    def operands(self) -> tuple[Any, Any, Any]:
        """Gradient, inner state and parameters."""
        return self.updates, self.inner_state, self.params

    def run_inner(
        self, scales: Scales | None, operands: tuple[Any, Any, Any]
    ) -> tuple[Any, Any]:
        """Return the inner optimizer's update of a scaled gradient, and its state."""
        assert self.inner_update is not None
        updates, inner_state, params = operands
        gradient = scale_leaves(updates, scales, self.like)
        return self.inner_update(gradient, inner_state, params)


def overlooked(responses: tuple[Response, ...], extra: dict[str, Any]) -> str | None:
    """Return the warning for a step whose loss, or probe, goes unseen; else None."""
    every = (t for response in responses for t in response.thresholds)
    watches = any(t.of == "value" and not t.required for t in every)
    # With `value_fn=` alone, the trust region raises an error.
    passed = {"value", "value_fn"} & extra.keys()
    if watches and not passed:
        return _missing.unseen_value(extra)
    if "value_fn" in passed or not any(response.look_ahead for response in responses):
        return None
    alike = difflib.get_close_matches("value_fn", extra.keys() - passed, n=1)
    return _missing.misspelt_value_fn(*alike) if alike else None


def limits_of(
    responses: tuple[Response, ...],
    statistics: Statistics,
    states: tuple,
    step: StepContext,
) -> tuple[PerThreshold, PerThreshold]:
    """Return the scope of each threshold, and its limit in this step."""
    norms, leaves = None, []
    if any(t.of_params for response in responses for t in response.thresholds):
        if step.params is None:
            raise _missing.missing_params("`param_ratio`")
        leaves = _trees.inexact_leaves(step.params, step.like)
        norms = measure(step.params, step.like, step.axes)

    def scope(threshold: Threshold) -> Scope:
        grouping = group(threshold.per, step.like)
        if not threshold.of_params or norms is None:
            return Scope(grouping)
        return Scope(grouping, group_norms(grouping, norms, leaves))

    scopes = [tuple(scope(t) for t in response.thresholds) for response in responses]
    return scopes, statistics.limits(states, scopes)


def judge_incoming(
    responses: tuple[Response, ...],
    scopes: PerThreshold,
    limits: PerThreshold,
    gradient: Measurement,
    step: StepContext,
) -> PerThreshold:
    """Judge the signals that are known before the inner optimizer has run."""
    leaves = _trees.inexact_leaves(step.updates, step.like)

    def judged(threshold: Threshold, scope: Scope, limit) -> Judgement:
        if is_outgoing(threshold.of):
            return unobserved(threshold, limit, scope.grouping)
        if is_norm(threshold.of):
            signal = group_norms(scope.grouping, gradient, leaves)
        else:
            signal = _scalar(threshold, step)
        if signal is None:
            return unobserved(threshold, limit, scope.grouping)
        return judge(threshold, signal, limit, scope.grouping)

    return [
        tuple(map(judged, response.thresholds, own, own_limits))
        for response, own, own_limits in zip(responses, scopes, limits, strict=True)
    ]


def judge_outgoing(
    responses: tuple[Response, ...],
    judgements: PerThreshold,
    update: Measurement,
    leaves: list[jax.Array],
    reached,
) -> PerThreshold:
    """Judge the update's norm as well, if the step has `reached` the optimizer."""

    def judged(threshold: Threshold, earlier: Judgement) -> Judgement:
        if not is_outgoing(threshold.of):
            return earlier
        signal = group_norms(earlier.grouping, update, leaves)
        return judge(threshold, signal, earlier.limit, earlier.grouping, reached)

    return [
        tuple(map(judged, response.thresholds, own))
        for response, own in zip(responses, judgements, strict=True)
    ]


def watches_update(responses: tuple[Response, ...]) -> bool:
    """Return whether any threshold watches the norm of the update."""
    return any(is_outgoing(t.of) for response in responses for t in response.thresholds)


def verdict_on(responses, states: tuple, judgements: PerThreshold) -> Verdict:
    """Return the strictest verdict of all responses."""
    return combine(
        response.propose(state, own)
        for response, state, own in zip(responses, states, judgements, strict=True)
    )


def limit_names(responses: Iterable[Response]) -> list[str]:
    """Return one name a threshold, as `skip_zscore_value_limit`, repeats numbered."""
    names: list[str] = []
    uses: Counter[str] = Counter()
    for response in responses:
        for threshold in response.thresholds:
            of = signal_name(threshold.of)
            base = f"{response.name}_{threshold.name}_{of}_limit"
            uses[base] += 1
            names.append(f"{base}_{uses[base]}" if uses[base] > 1 else base)
    return names


def loss_of(extra: dict[str, Any], axes: MappedAxes) -> jax.Array | None:
    """Return the step's loss, float32 (), or None if no `value=` was passed."""
    loss = extra.get("value")
    return None if loss is None else axes.mean(scalar_signal("value", loss))[0]


def _scalar(threshold: Threshold, step: StepContext) -> jax.Array | None:
    """Return the signal of a threshold that watches no norm; None if it is absent."""
    if step.extra.get(threshold.unless) is not None:
        return None
    if callable(threshold.of):
        value = threshold.of(step.updates, step.params, step.extra)
        if not step.axes.names:  # A loss of one's own has been warned of.
            blind = bool(step.extra) and step.extra.get("value") is None
            warn_of_replicas(
                f"the signal `{signal_name(threshold.of)}`",
                value,
                step.updates,
                blind=blind,
            )
        return step.axes.mean(scalar_signal(signal_name(threshold.of), value))
    if step.extra.get("value") is not None:
        return step.axes.mean(scalar_signal("value", step.extra["value"]))
    if threshold.required:
        raise _missing.missing_value(f"`{threshold.name}(..., of='value')`")
    return None
