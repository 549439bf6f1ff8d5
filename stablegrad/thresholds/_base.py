"""A threshold: what is normal, learned from the past steps alone.

It watches one signal (`of=`), for each group of a granularity (`per=`), and states
the largest value that it still calls normal. Statistics learn in one place, `learn`:
from the raw signal, finite values only.
"""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._trees import cast_like
from ..granularity._groups import Granularity, Grouping
from ._signals import Signal, is_norm
from ._statistics import where_groups


class Scope(NamedTuple):
    """What a threshold is applied to, besides the signal."""

    grouping: Grouping
    param_norms: Any = None  # float32 (groups,), if `of_params`.


class Family(NamedTuple):
    """What several thresholds share, so that their statistics can be one."""

    key: Hashable  # Static: thresholds of equal key differ in their settings alone.
    settings: tuple  # Numbers, each of rank 0.
    # settings, each of rank 0 or (groups,) -> init, limit, update of a threshold
    build: Callable[[tuple], tuple[Callable, Callable, Callable]]


class Threshold(NamedTuple):
    """One rule for what is normal; build it with a factory of this module."""

    name: str
    of: Signal
    per: Granularity
    init: Callable[[int], Any]  # groups -> state, every array with that leading axis.
    limit: Callable[[Any, Scope], jax.Array]  # float32 (groups,); inf while unarmed.
    update: Callable[[Any, jax.Array, jax.Array], Any]  # state, signal, exceeded.
    required: bool = True  # Whether a step without the signal is an error.
    of_params: bool = False  # Whether the limit depends on the parameters' norms.
    learns_all: bool = False  # Whether it learns from nan, inf and zero as they come.
    family: Family | None = None


class Judgement(NamedTuple):
    """A threshold's word on one step; every array has shape (groups,)."""

    signal: jax.Array  # float32, the raw value.
    limit: jax.Array  # float32, the largest normal value; inf while unarmed.
    exceeded: jax.Array  # bool: finite and above the limit.
    nonfinite: jax.Array  # bool: nan or inf, which no threshold calls normal.
    grouping: Grouping


def judge(threshold: Threshold, state, signal, scope: Scope) -> Judgement:
    """Holds a step's signal, shape (groups,), against the past."""
    grouping = scope.grouping
    limit = jnp.broadcast_to(threshold.limit(state, scope), (grouping.count,))
    limit = limit.astype(jnp.float32)
    finite = jnp.isfinite(signal)
    exceeded = finite & ~(signal <= limit)
    return Judgement(signal, limit, exceeded, ~finite, grouping)


def unobserved(threshold: Threshold, state, scope: Scope) -> Judgement:
    """The word on a step that the signal was not measured on: nothing to say."""
    nothing = jnp.zeros((scope.grouping.count,), jnp.float32)
    quiet = judge(threshold, state, nothing, scope)
    no = nothing > 0
    return quiet._replace(signal=nothing + jnp.nan, exceeded=no, nonfinite=no)


def learn(threshold: Threshold, state, judgement: Judgement):
    """Takes one step into the statistics; a group with nothing to learn stays put.

    Nothing is learned from a nan or inf, nor from a norm of exactly zero: that is no
    step at all, as between the updates of `optax.MultiSteps`, or of an unused leaf.
    """
    teaches = jnp.isfinite(judgement.signal)
    if threshold.learns_all:
        teaches |= judgement.nonfinite
    elif is_norm(threshold.of):
        teaches &= judgement.signal > 0
    signal = jnp.where(teaches, judgement.signal, 1.0)
    new = threshold.update(state, signal, judgement.exceeded)
    # Hyperparameters may be wider than the state; the state keeps its dtypes.
    return where_groups(teaches, cast_like(new, state), state)


def optional(threshold: Threshold) -> Threshold:
    """The same threshold, silent on steps that lack its signal instead of an error."""
    return threshold._replace(required=False)
