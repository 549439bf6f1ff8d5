"""Clips in a chain: measure the gradient once, multiply it once.

`transformation` makes any clip from a function of one step, and keeps its readings. A
`NormClip` turns the norms of a step into factors: the default one of each method
compares them with a threshold, the published ones follow the recurrence of a paper,
nan and inf included.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.core import Tracer

from .. import _checks, _missing, _trees
from .._compiled import compiled
from .._norms import OVERFLOW, Measurement, measure
from .._packing import Packing
from .._placing import placed_like
from .._scales import scale_leaves
from ..granularity._group_norms import (
    group_norms,
    group_scales,
    measure_groups,
    scaled_groups_norm,
)
from ..granularity._groups import Granularity, group
from ..responses._clip import factors
from ..thresholds._base import Scope, Threshold, judge, learn
from ._readings import ClipNumbers, init_readings, next_readings


class ClippingState(NamedTuple):
    clip_numbers: ClipNumbers  # Readings and statistics.


class Clipped(NamedTuple):
    """The result of one step of a clip."""

    updates: Any
    statistics: Any
    measured: Measurement  # Before clipping.
    norm: jax.Array  # float32 (): L2 norm after clipping, if it is finite.
    limit: float | jax.Array  # float32: the limits in force.
    scale: jax.Array  # float32 () in [0, 1]: the smallest factor.
    memory: tuple = ()  # The fields of the state before `clip_numbers`.
    shrunk: jax.Array | None = None  # bool (); None: whether the scale is below 1.
    finite: jax.Array | None = None  # bool (); None: what `measured` tells.
    overflows: bool = True  # Whether norms of 1e18 and more count as not finite.


def transformation(
    name: str,
    kind: type[Any],
    start: Callable[[Any], Any],
    step: Callable[..., Clipped],
    memory: Callable[[Any], tuple] = lambda params: (),
) -> optax.GradientTransformationExtraArgs:
    """Return the transformation of a clip.

    Args:
        name: Name of the clip in `metrics` and in errors.
        kind: Class of the state, whose last field is `clip_numbers`.
        start: Returns the first statistics, given parameters or updates: the layout
            depends on their structure, shapes and dtypes alone.
        step: `step(updates, statistics, memory, params, extra)`.
        memory: Returns the other fields of the first state, given parameters.
    """

    def packing(tree) -> Packing:
        return Packing(jax.eval_shape(lambda: (init_readings(), start(tree))))

    def init_fn(params):
        numbers = packing(params).pack((init_readings(), start(params)))
        state = kind(*memory(params), {name: numbers})
        # Some optimizers start with one buffer in two places, which cannot be donated.
        return placed_like(_trees.distinct(state), params)

    def update_fn(updates, state, params=None, **extra):
        *kept, numbers = state
        if params is not None:
            updates = _trees.floating_like(updates, params)
        columns = packing(updates)
        if [x.shape[-1] for x in numbers[name]] != [w for w in columns.widths if w]:
            raise ValueError(
                f"`{name}` was given another pytree in this step than to `init`, or "
                "floating-point gradients of integers: it has other groups. Call "
                "`init` again with the parameters of the step."
            )
        readings, statistics = columns.unpack(numbers[name])
        done = step(updates, statistics, kept, params, extra)
        raw, clipped = done.measured.norm, done.norm
        finite = done.measured.finite if done.finite is None else done.finite
        if done.overflows:
            clipped = jnp.where(finite, clipped, 0.0)
        else:
            finite = jnp.isfinite(raw)
        limit = jnp.min(jnp.asarray(done.limit), initial=jnp.inf)
        shrunk = done.scale < 1 if done.shrunk is None else done.shrunk
        numbers = (raw, clipped, limit, done.scale)
        readings = next_readings(readings, numbers, finite, shrunk)
        # A derivative takes limits as constants.
        packed = lax.stop_gradient(columns.pack((readings, done.statistics)))
        return done.updates, kind(*done.memory, {name: packed})

    check = lambda state: _checks.require_state(name, kind, state)
    return optax.GradientTransformationExtraArgs(init_fn, compiled(update_fn, check))


class NormStep(NamedTuple):
    """The result of a `NormClip` for one step; arrays of shape (groups,)."""

    factors: jax.Array  # float32: the factor on the gradient.
    limit: jax.Array  # float32: the largest norm that is not shrunk.
    statistics: Any


class NormClip(NamedTuple):
    """A method that turns norms into factors."""

    per: Granularity
    init: Callable[[int], Any]  # groups -> statistics
    step: Callable[[Any, jax.Array, Scope], NormStep]  # statistics, norms, scope
    of_params: bool = False  # Whether it uses the norms of the parameters.
    published: bool = False  # Whether it is given nan and inf, and passes them on.


def only_published(clip: Callable[..., Any], **settings) -> None:
    """Raise ValueError if a setting of the published method of a clip was given."""
    defaults = clip.__kwdefaults__ or {}
    for name, value in settings.items():
        default = defaults[name]
        # `optax.inject_hyperparams` passes a default as an array, in its dtype.
        if isinstance(value, jax.Array) and default is not None:
            default = jnp.asarray(default, value.dtype)
        if not isinstance(value, Tracer) and value != default:
            raise ValueError(
                f"`{name}` belongs to the published rule: pass `published=True`, or "
                f"leave it out; got {value!r}."
            )


def patience_after(warmup_steps: int) -> int:
    """Return the patience of a threshold: 50, or its warm-up if that is longer."""
    return max(50, warmup_steps) if isinstance(warmup_steps, int | np.integer) else 50


def clip_to_threshold(threshold: Threshold) -> NormClip:
    """Return the method that shrinks norms above a threshold's limit to the limit."""

    def step(statistics, norms, scope: Scope) -> NormStep:
        limit = threshold.limit(statistics, scope)
        judgement = judge(threshold, norms, limit, scope.grouping)
        learned = learn(threshold, statistics, judgement)
        return NormStep(factors(judgement), judgement.limit, learned)

    return NormClip(threshold.per, threshold.init, step, threshold.of_params)


def clip_norms(name: str, clip: NormClip) -> optax.GradientTransformationExtraArgs:
    """Return the transformation that clips the gradients of a chain by their norms."""

    def step(updates, statistics, memory, params, extra) -> Clipped:
        grouping = group(clip.per, updates)
        measured, norms = measure_groups(grouping, updates)
        param_norms = None
        if clip.of_params:
            if params is None:
                raise _missing.missing_params(f"`{name}`")
            own = _trees.inexact_leaves(params, updates)
            param_norms = group_norms(grouping, measure(params, updates), own)
        done = clip.step(statistics, norms, Scope(grouping, param_norms))
        scales = group_scales(grouping, done.factors)
        # The same number as the factors are made of: one kernel less.
        finite = norms[0] < OVERFLOW if grouping.whole else measured.finite
        keep = None if clip.published else finite
        clipped = scale_leaves(updates, scales, updates, keep)
        if grouping.whole:
            norm = scales.by_leaf * measured.norm
        else:
            norm = scaled_groups_norm(grouping, measured, norms, done.factors)
        scale = scales.smallest()
        numbers = (done.statistics, measured, norm, done.limit, scale)
        told = {"finite": finite, "overflows": not clip.published}
        return Clipped(clipped, *numbers, **told)

    start = lambda tree: clip.init(group(clip.per, tree).count)
    return transformation(name, ClippingState, start, step)
