"""A threshold: a rule for which values of a signal are normal.

A threshold watches one signal (`of=`) for each group of a granularity (`per=`). Its
limit depends on past steps alone. `learn` updates its statistics after each step, with
finite values of the raw signal only. `limit` is computed element by element from the
statistics, so that a decision costs no reduction.
"""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._norms import OVERFLOW
from .._trees import cast_like
from ..granularity._groups import Granularity, Grouping
from ._signals import Signal, is_norm
from ._statistics import where_groups


class Scope(NamedTuple):
    """The groups that a threshold is applied to."""

    grouping: Grouping
    param_norms: Any = None  # float32 (groups,), if `of_params`.


class Family(NamedTuple):
    """A kind of threshold whose statistics can be kept in one array."""

    key: Hashable  # Static: thresholds of equal key differ in their settings alone.
    settings: tuple  # Numbers, each of rank 0.
    # settings, each of rank 0 or (groups,) -> init, limit, update of a threshold
    build: Callable[[tuple], tuple[Callable, Callable, Callable]]


class Threshold(NamedTuple):
    """One rule for which values are normal; the factories of this package build it."""

    name: str
    of: Signal
    per: Granularity
    init: Callable[[int], Any]  # groups -> state, every array with that leading axis.
    limit: Callable[[Any, Scope], jax.Array]  # float32 (groups,); inf while unarmed.
    update: Callable[[Any, jax.Array, jax.Array], Any]  # state, signal, exceeded.
    required: bool = True  # Whether a step without the signal is an error.
    unless: str = ""  # An argument of the step with which it is not judged.
    of_params: bool = False  # Whether the limit depends on the parameters' norms.
    learns_all: bool = False  # Whether it also learns from nan, inf and zero.
    family: Family | None = None


class Judgement(NamedTuple):
    """A threshold's judgement of one step; every array has shape (groups,)."""

    signal: jax.Array  # float32: the raw value.
    limit: jax.Array  # float32: the largest normal value; inf while there is none yet.
    exceeded: jax.Array  # bool: finite and above the limit.
    nonfinite: jax.Array  # bool: nan, inf or overflow, which no threshold calls normal.
    teaches: jax.Array  # bool: whether the statistics learn from the signal.
    grouping: Grouping


def as_float32(settings: tuple) -> tuple:
    """Return settings as float32; numbers stay NumPy's, to outlive a trace."""
    with np.errstate(over="ignore"):  # A number beyond float32 is an inf.
        return tuple(
            x.astype(jnp.float32) if isinstance(x, jax.Array) else np.float32(x)
            for x in settings
        )


def judge(
    threshold: Threshold,
    signal,
    limit,
    grouping: Grouping,
    observed: bool | jax.Array = True,
) -> Judgement:
    """Compare a step's signal, shape (groups,), with the limit set by past steps."""
    limit = jnp.broadcast_to(limit, (grouping.count,)).astype(jnp.float32)
    observed = jnp.broadcast_to(jnp.asarray(observed), (grouping.count,))
    norm = is_norm(threshold.of)
    finite = signal < OVERFLOW if norm else jnp.isfinite(signal)
    teaches = observed
    if not threshold.learns_all:
        teaches &= finite & (signal > 0) if norm else finite
    exceeded = observed & finite & ~(signal <= limit)
    return Judgement(signal, limit, exceeded, observed & ~finite, teaches, grouping)


def unobserved(threshold: Threshold, limit, grouping: Grouping) -> Judgement:
    """Return the judgement of a step in which the signal was not measured."""
    nothing = jnp.zeros((grouping.count,), jnp.float32)
    return judge(threshold, nothing, limit, grouping, observed=False)


def learn(threshold: Threshold, state, judgement: Judgement):
    """Update the statistics; a group with nothing to learn keeps its state.

    Nothing is learned from a signal that is not finite, nor from a norm of exactly
    zero: between the updates of `optax.MultiSteps`, and for unused leaves, there is no
    gradient.
    """
    signal = jnp.where(judgement.teaches, judgement.signal, 1.0)
    new = threshold.update(state, signal, judgement.exceeded)
    # Hyperparameters may be wider than the state; the state keeps its dtypes.
    new = cast_like(new, state)
    if not threshold.learns_all:  # A traced setting may be nan in one step.
        finite = lambda x, old: jnp.where(jnp.isfinite(x), x, old)
        new = jax.tree.map(finite, new, state)
    return where_groups(judgement.teaches, new, state)


def optional(threshold: Threshold, unless: str = "") -> Threshold:
    """Return a threshold that ignores steps without its signal instead of raising.

    It also ignores steps to which the argument `unless` is passed.
    """
    return threshold._replace(required=False, unless=unless)
