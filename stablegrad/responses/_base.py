"""A response: what to do about a step that its thresholds do not call normal.

The guard asks each response twice in a step. `propose` turns the judgements known so
far into a verdict, before the step is taken; `settle` updates the response's state
once the guard has decided. Neither touches a gradient: the guard multiplies and
selects once, for all of them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._checks import described
from .._trees import smallest
from ..thresholds._base import Judgement, Threshold
from ._reasons import first_reason
from .trust_region._probe import Attempt


class Verdict(NamedTuple):
    """What a response asks for in this step."""

    gradient_scale: Any  # In [0, 1], on the gradient: float32 (), or one a leaf.
    update_scale: Any  # In [0, 1], on the update: float32 (), or one a leaf.
    lr_scale: jax.Array  # float32 in (0, 1], (): on the update, as a learning rate.
    reason: jax.Array  # int32, (): why the step must not be taken; 0 takes it.


class Foresight(NamedTuple):
    """What a response that looks along a step asks for, before it is taken."""

    step_scale: jax.Array  # float32 in [0, 1], (): on the step.
    alarm: jax.Array  # bool, (): whether taking the whole step would have done harm.
    state: Any  # The response's state, which has learned from it.


class Response(NamedTuple):
    """One answer to steps that are not normal; build it with `clip`, `skip`, ..."""

    name: str
    thresholds: tuple[Threshold, ...]
    init: Callable[[], Any]
    propose: Callable[[Any, tuple[Judgement, ...]], Verdict]
    # state, judgements, reason (0: taken) -> state
    settle: Callable[[Any, tuple[Judgement, ...], jax.Array], Any]
    halts: Callable[[Any], jax.Array] = lambda state: jnp.zeros((), bool)
    # state, attempt -> foresight; only responses that look ahead have one.
    look_ahead: Callable[[Any, Attempt], Foresight] | None = None
    needs_value_fn: bool = False  # Whether a step without `value_fn=` is an error.


def proceed(**changes) -> Verdict:
    """The verdict that changes nothing, but for `changes`."""
    one = jnp.ones((), jnp.float32)
    return Verdict(one, one, one, jnp.zeros((), jnp.int32))._replace(**changes)


def combine(verdicts) -> Verdict:
    """The strictest of all verdicts.

    Clips take the minimum, not the product: each limit was set for the raw norm, and
    the smallest factor meets them all. Learning-rate factors multiply.
    """
    strictest = proceed()
    for verdict in verdicts:
        strictest = Verdict(
            smallest(strictest.gradient_scale, verdict.gradient_scale),
            smallest(strictest.update_scale, verdict.update_scale),
            strictest.lr_scale * verdict.lr_scale,
            first_reason((strictest.reason, verdict.reason)),
        )
    return strictest


def check_thresholds(asker: str, thresholds) -> None:
    """Raises TypeError unless every argument is a threshold."""
    for threshold in thresholds:
        if not isinstance(threshold, Threshold):
            raise TypeError(
                f"`{asker}` takes thresholds, such as `zscore(6.0)` or `nonfinite()`, "
                f"got {described(threshold)}."
            )


def any_true(judgements, field: str) -> jax.Array:
    """Whether any group of any judgement has `field` set."""
    flags = [jnp.any(getattr(judgement, field)) for judgement in judgements]
    return jnp.any(jnp.stack(flags)) if flags else jnp.zeros((), bool)
