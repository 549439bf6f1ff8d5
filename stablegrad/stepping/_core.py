"""What a way of stepping is told, and what it gives back."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from .._mapped_axes import Across
from .._norms import Measurement
from ..engine._decide import Words
from ..responses._base import Foresight, Response, Verdict


class Situation(NamedTuple):
    """A step that is about to be taken, as far as it has been judged."""

    responses: tuple[Response, ...]  # Whose thresholds know their limits.
    response_states: tuple
    scopes: list[tuple]  # What each threshold is applied to.
    gradient: Measurement
    words: Words  # What every threshold said of what came in.
    verdict: Verdict  # A reason of 0 if the step may be tried.
    extra: dict[str, Any]  # What the caller passed, such as `value=`.
    over: Across
    # updates, inner state, params -> update, inner state
    inner: Callable[[Any, Any, Any], tuple[Any, Any]]
    # update, params -> what the caller gets if the step is taken
    commit: Callable[[Any, Any], Any]
    # params -> what the caller gets if it is not
    held: Callable[[Any], Any]


class Taken(NamedTuple):
    """A step as it went, taken or not."""

    ahead: Foresight  # Of all responses that look along the step.
    result: Any  # Updates or parameters, whichever the caller asked for.
    inner_state: Any
    update: Measurement  # Of the inner transformation's own update.
    applied_norm: jax.Array  # The norm of what the caller gets to add.
    words: Words  # What every threshold said in the end.
    verdict: Verdict  # A reason of 0 if the step was taken.
    ranges: Any  # What is known of state and parameters after it.
