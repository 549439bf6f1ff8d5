"""Responses: what to do about a step that its thresholds do not call normal.

The engine calls `propose` before the step is taken, and `settle` once it has decided.
Responses never touch a gradient: the engine multiplies and selects once, for all.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._checks import short_repr
from .._scales import Scales, minimum
from ..thresholds._base import Judgement, Threshold
from ._reasons import first_reason
from .roll_back._machine import RollBackSettings
from .trust_region._probe import Attempt


class Verdict(NamedTuple):
    """The request of a response for this step."""

    gradient_scales: Scales | None  # Factors in [0, 1] on the gradient; None: ones.
    update_scales: Scales | None  # Factors in [0, 1] on the update.
    lr_scale: jax.Array  # float32 in (0, 1], (): on the update, as a learning rate.
    reason: jax.Array  # int32, (): why the step must not be taken; 0 takes it.


class ProbeResult(NamedTuple):
    """The request of a response that probes the loss along the step."""

    step_scale: jax.Array  # float32 in [0, 1], (): on the step.
    alarm: jax.Array  # bool, (): whether taking the whole step would have done harm.
    state: Any  # The response's state after the probe.


class Response(NamedTuple):
    """One answer to steps that are not normal; build it with `clip`, `skip`, ..."""

    name: str
    thresholds: tuple[Threshold, ...]
    # () -> state: a pytree of rank-0 float32, int32 and bool arrays.
    init_state: Callable[[], Any] = lambda: ()
    # state, judgements -> verdict
    propose: Callable[[Any, tuple[Judgement, ...]], Verdict] = lambda *_: proceed()
    # state, judgements, reason (0: taken) -> state
    settle: Callable[[Any, tuple[Judgement, ...], jax.Array], Any] = lambda *x: x[0]
    halts: Callable[[Any], jax.Array] = lambda state: jnp.zeros((), bool)
    # state, attempt -> foresight; only responses that probe the step have one.
    look_ahead: Callable[[Any, Attempt], ProbeResult] | None = None
    needs_value_fn: bool = False  # Whether a step without `value_fn=` is an error.
    # state -> name: rank-0 array, what `metrics` shows of the response.
    readings: Callable[[Any], dict[str, jax.Array]] = lambda state: {}
    # Of a response that keeps snapshots; the engine takes and restores them.
    roll_back: RollBackSettings | None = None
    layers: Any = None  # A `LayerHealth`, of the one response that measures layers.

    def init(self, params) -> Any:
        """Explain that a response is no optax transformation."""
        raise TypeError(
            f"`{self.name}(...)` is a response of a guard, not an optax "
            f"transformation. Give it to a guard instead of a chain: "
            f"`sg.guard(optax.adam(1e-3), sg.{self.name}(...))`."
        )

    update = init


def proceed(**changes) -> Verdict:
    """Return the verdict that changes nothing, but for `changes`.

    NumPy's constants tell, while a step is traced, what a response never asks for.
    """
    one: Any = np.float32(1)
    none: Any = np.int32(0)
    return Verdict(None, None, one, none)._replace(**changes)


def combine(verdicts) -> Verdict:
    """Return the strictest of all verdicts.

    Clips take the minimum: each limit is one on the raw norm, and the smallest factor
    meets them all. Learning-rate factors multiply.
    """
    strictest = proceed()
    for verdict in verdicts:
        strictest = Verdict(
            _smaller(strictest.gradient_scales, verdict.gradient_scales),
            _smaller(strictest.update_scales, verdict.update_scales),
            strictest.lr_scale * verdict.lr_scale,
            first_reason((strictest.reason, verdict.reason)),
        )
    return strictest


def _smaller(first: Scales | None, second: Scales | None) -> Scales | None:
    if first is None or second is None:
        return second if first is None else first
    return minimum(first, second)


def check_thresholds(asker: str, thresholds) -> None:
    """Raise TypeError unless every argument is a threshold."""
    for threshold in thresholds:
        if not isinstance(threshold, Threshold):
            raise TypeError(
                f"`{asker}` takes thresholds, such as `zscore(6.0)` or `nonfinite()`, "
                f"got {short_repr(threshold)}."
            )


def any_true(judgements, field: str) -> jax.Array:
    """Return whether any group of any judgement has `field` set."""
    flags = [jnp.any(getattr(judgement, field)) for judgement in judgements]
    return functools.reduce(jnp.logical_or, flags, jnp.zeros((), bool))
