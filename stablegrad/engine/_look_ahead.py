"""The update, evaluated once before the step is taken, if anything needs it.

Thresholds on `update_norm` judge it, and some responses probe the loss along it.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .. import _checks, _missing, _trees
from .._mapped_axes import MappedAxes, manual_axes, warn_of_replicas
from .._norms import Measurement, measure
from .._scales import Scales, scale_leaves, scaled_norm, uniform
from ..responses._base import ProbeResult, Response, Verdict
from ..responses._layers import LayerHealth, LayerInputs
from ..responses._reasons import first_reason
from ..responses.trust_region._probe import Attempt
from . import _decide
from ._decide import StepContext, loss_of
from ._families import PerThreshold
from ._line_search import has_line_search


class Decision(NamedTuple):
    """What is decided about a step before it is committed."""

    judgements: PerThreshold
    verdict: Verdict
    ahead: ProbeResult
    # Norms of the update, before and after it is scaled; None: nothing measured it.
    update_norms: tuple[jax.Array, jax.Array] | None


def decide_on_update(
    responses: tuple[Response, ...],
    step: StepContext,
    states: tuple,
    judgements: PerThreshold,
    verdict: Verdict,
) -> Decision:
    """Evaluate the update once if a threshold or a response needs it.

    Where none does, the update is computed in the commit alone.
    """
    decision = Decision(judgements, verdict, unprobed(states), None)
    watched = _decide.watches_update(responses)
    searched = has_line_search(step.inner_state)
    looking = [i for i, r in enumerate(responses) if _may_probe(r, step, searched)]
    looks = bool(looking)
    if not (watched or looks):
        return decision
    # Behind a barrier, so that XLA does not keep this update for the commit.
    operands = lax.optimization_barrier(step.operands)
    gradient_scales, reached = verdict.gradient_scales, verdict.reason == 0
    evaluate = lambda: step.run_inner(gradient_scales, operands)[0]
    takeable = lambda: finite_part(evaluate(), step.like)
    update = evaluate() if watched else takeable()
    measured = measure(update, step.like, step.axes)
    if watched:
        judgements = _decide.judge_outgoing(
            responses,
            judgements,
            measured,
            _trees.inexact_leaves(update, step.like),
            reached,
        )
        after = _decide.verdict_on(responses, states, judgements)
        reason = first_reason((verdict.reason, after.reason))
        verdict = after._replace(reason=reason)
        decision = decision._replace(judgements=judgements, verdict=verdict)
        reached = verdict.reason == 0
    scales = update_scales(decision)
    length = scaled_norm(measured, scales, update, step.like)
    if looks:
        if watched:  # Of what would be written, without elements that are kept out.
            rest = finite_part(update, step.like)
            written = measure(rest, step.like, step.axes)
            length = scaled_norm(written, scales, rest, step.like)
        ahead = look_ahead(
            {i: responses[i] for i in looking},
            states,
            lambda: scale_leaves(takeable(), scales, step.like),
            jnp.where(reached, length, 0.0),
            step,
        )
        ahead = _trees.select(reached, ahead, decision.ahead)
        length = ahead.step_scale * length
        decision = decision._replace(ahead=ahead)
    norms = (measured.norm, jnp.where(reached, length, 0.0)) if watched else None
    return decision._replace(update_norms=norms)


def update_scales(decision: Decision) -> Scales:
    """Return the factors on the update: clips, learning rate and probes."""
    verdict = decision.verdict
    scales = verdict.update_scales or uniform()
    return scales.times(verdict.lr_scale * decision.ahead.step_scale)


def layer_inputs(
    step: StepContext, gradient: Measurement, decision: Decision
) -> LayerInputs:
    """Return what `layer_health` can see of a step."""
    if step.params is None:
        raise _missing.missing_params("`layer_health`")

    def update():
        made, _ = step.run_inner(decision.verdict.gradient_scales, step.operands)
        return scale_leaves(made, update_scales(decision), step.like)

    return LayerInputs(
        gradient=step.updates,
        measured=gradient,
        update=update,
        params=step.params,
        like=step.like,
        taken=decision.verdict.reason == 0,
        axes=step.axes,
    )


def unprobed(states: tuple) -> ProbeResult:
    """Return the result when no response probes the step."""
    return ProbeResult(jnp.ones((), jnp.float32), jnp.zeros((), bool), states)


def look_ahead(
    responses: dict[int, Response],
    states: tuple,
    update: Callable[[], Any],
    length,
    step: StepContext,
) -> ProbeResult:
    """Ask the given responses, by their index in the guard, and join what they ask for.

    Scales multiply, and `state` holds every response's state. `update()` evaluates the
    step; only a response that probes in this step calls it, within a condition.
    """
    ahead, loss = unprobed(states), loss_of(step.extra, step.axes)
    loss_fn = _checked(step.extra["value_fn"], step.axes)
    if manual_axes() and not step.axes.names:
        probe = jax.eval_shape(loss_fn, step.params)
        warn_of_replicas("`value_fn=`", probe, step.updates, blind=False)
    for i, response in responses.items():
        assert loss is not None and response.look_ahead is not None
        attempt = Attempt(
            step.updates,
            functools.partial(_shortened, update, ahead.step_scale, step.like),
            step.params,
            ahead.step_scale * length,
            loss,
            loss_fn,
            _resolution(step.extra["value"]),
            step.axes,
        )
        found = response.look_ahead(ahead.state[i], attempt)
        ahead = ProbeResult(
            ahead.step_scale * found.step_scale,
            ahead.alarm | found.alarm,
            (*ahead.state[:i], found.state, *ahead.state[i + 1 :]),
        )
    return ahead


def finite_part(update, like):
    """Return the update with zeros for what the commit would keep out."""
    keep_finite = lambda leaf: jnp.where(jnp.isfinite(leaf), leaf, 0).astype(leaf.dtype)
    return _trees.map_inexact(keep_finite, like, update)


def _shortened(update: Callable[[], Any], scale, like):
    return scale_leaves(update(), uniform(scale), like)


def _may_probe(response: Response, step: StepContext, searched: bool) -> bool:
    """Return whether a response probes along a step; raise if it lacks what it needs.

    An optional probe is off beside a line search, which has evaluated the loss already.
    """
    if response.look_ahead is None or (searched and not response.needs_value_fn):
        return False
    absent = [name for name in ("value", "value_fn") if step.extra.get(name) is None]
    if absent and (response.needs_value_fn or "value_fn" not in absent):
        raise _missing.missing_value_fn(f"`{response.name}`", absent[-1])
    if not absent and step.params is None:
        raise _missing.missing_params(f"`{response.name}`")
    return not absent


def _checked(value_fn, axes: MappedAxes) -> Callable[[Any], Any]:
    """Return `value_fn` with a clear error if it does not return a scalar loss."""
    if not callable(value_fn):
        raise _missing.not_a_loss(f"it is {_checks.short_repr(value_fn)}")
    try:
        inspect.signature(value_fn).bind(None)
    except TypeError as error:
        raise _missing.not_a_loss(f"it needs more than them: {error}") from error
    except ValueError:
        pass  # It has no signature to look at.

    def loss_fn(params):
        loss = value_fn(params)
        if isinstance(loss, (tuple, list, dict)) or loss is None:
            raise _missing.not_a_loss(f"it returns a {type(loss).__name__}")
        return axes.mean(jnp.asarray(loss)) if axes.names else loss

    return loss_fn


def _resolution(loss) -> float:
    """Return the relative unit in the last place of a loss, float32's at least."""
    least = float(jnp.finfo(jnp.float32).eps)
    dtype = jnp.asarray(loss).dtype
    return max(least, float(jnp.finfo(dtype).eps)) if _trees.is_inexact(loss) else least


def only_layers(responses: tuple[Response, ...]) -> LayerHealth | None:
    """Return what measures layers, if a response does; raise ValueError for two."""
    found = [response.layers for response in responses if response.layers is not None]
    if len(found) > 1:
        raise ValueError(f"`guard` takes one `layer_health`, got {len(found)}.")
    return found[0] if found else None
