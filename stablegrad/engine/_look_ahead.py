"""Looking along a step before it is taken, for the responses that do."""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from .. import _checks, _trees
from .._mapped_axes import Across
from ..responses._base import Foresight, Response
from ..responses.trust_region._probe import Attempt
from ._decide import loss_of


def unlooked(states: tuple) -> Foresight:
    """Of a step that nothing looked along: it is taken as it is."""
    return Foresight(jnp.ones((), jnp.float32), jnp.zeros((), bool), states)


def look_ahead(
    responses: tuple[Response, ...],
    states: tuple,
    gradient: Any,
    step: Callable[[], Any],
    length,
    params: Any,
    extra: dict[str, Any],
    over: Across,
) -> Foresight:
    """One foresight for all: scales multiply, and `state` holds every response's.

    `step` is only called where a response does look, in a branch of its own.
    """
    ahead, loss = unlooked(states), loss_of(extra, over)
    for i, response in enumerate(responses):
        if response.look_ahead is None or not _may_look(response, params, extra):
            continue
        assert loss is not None
        attempt = Attempt(
            gradient,
            functools.partial(_scaled, step, ahead.step_scale, gradient),
            params,
            ahead.step_scale * length,
            loss,
            _checked(extra["value_fn"], over),
            _resolution(extra["value"]),
            over,
        )
        found = response.look_ahead(ahead.state[i], attempt)
        ahead = Foresight(
            ahead.step_scale * found.step_scale,
            ahead.alarm | found.alarm,
            (*ahead.state[:i], found.state, *ahead.state[i + 1 :]),
        )
    return ahead


def _scaled(step: Callable[[], Any], scale, gradient):
    return _trees.scale_leaves(step(), scale, gradient)


def will_look(responses: tuple[Response, ...], params, extra) -> bool:
    """Whether any response looks along this step."""
    return any(
        response.look_ahead is not None and _may_look(response, params, extra)
        for response in responses
    )


def _may_look(response: Response, params, extra) -> bool:
    """Whether a step brings all that a probe takes; an error where it must."""
    absent = [name for name in ("value", "value_fn") if extra.get(name) is None]
    if absent and (response.needs_value_fn or "value_fn" not in absent):
        raise _checks.missing_value_fn(f"`{response.name}`", absent[-1])
    if not absent and params is None:
        raise _checks.missing_params(f"`{response.name}`")
    return not absent


def _checked(value_fn, over: Across) -> Callable[[Any], Any]:
    """The same function, with an error of its own for what is no loss."""
    if not callable(value_fn):
        raise _checks.not_a_loss(f"it is {_checks.described(value_fn)}")

    def loss_fn(params):
        loss = value_fn(params)
        if isinstance(loss, (tuple, list, dict)) or loss is None:
            raise _checks.not_a_loss(f"it returns a {type(loss).__name__}")
        return over.mean(jnp.asarray(loss)) if over.names else loss

    return loss_fn


def _resolution(loss) -> float:
    """The relative unit in the last place of a loss, as it was computed."""
    dtype = jnp.asarray(loss).dtype
    return float(jnp.finfo(dtype if _trees.is_inexact(loss) else jnp.float32).eps)
