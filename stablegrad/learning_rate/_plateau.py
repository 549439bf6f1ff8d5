"""Reduce the learning rate when a metric stops improving."""

from typing import Any

import jax
import optax

from .. import _trees
from .._checks import require, require_state, require_steps
from .._mapped_axes import warn_of_replicas
from .._scales import scale_leaves, uniform
from ..thresholds._signals import scalar_signal
from ._evaluations import (
    CONVENTIONS,
    MODES,
    THRESHOLD_MODES,
    PlateauState,
    evaluate,
    init_plateau,
    is_zeroed,
    settings_of,
)


def reduce_on_plateau(
    factor: float | jax.Array = 0.1,
    patience: int | jax.Array = 10,
    *,
    mode: str = "min",
    threshold: float | jax.Array = 1e-4,
    threshold_mode: str = "rel",
    cooldown: int | jax.Array = 0,
    min_scale: float | jax.Array = 0.0,
    start_after: int | jax.Array = 0,
    window: int | jax.Array = 1,
    convention: str = "torch",
    metric: str | None = "value",
) -> optax.GradientTransformationExtraArgs:
    """Multiply updates by a scale that is reduced when a metric stops improving.

    With a_t an evaluation, b the best so far, m = threshold * |b| (or threshold if
    threshold_mode="abs"), and n_t the evaluations in a row that were not better:

        better_t = a_t < b - m   (mode="max": a_t > b + m);    the first always is
        k_t = max(factor * k_{t-1}, min_scale)  if n_t > patience, then n = 0

    and a cooldown follows. The scale never grows; see `back_off` for one that does.
    Unlike here, Torch and Optax use b instead of |b| and count a nan as bad, and Optax
    with patience=0 reduces the scale at every improvement and at no other time.

    Args:
        factor: Factor of one reduction. Dimensionless, in (0, 1).
        patience: Bad evaluations in a row that are tolerated, >= 0.
        mode: "min" for a metric such as a loss, "max" for one such as accuracy.
        threshold: Margin that an improvement must exceed, >= 0.
        threshold_mode: "rel" for a share of |b|, "abs", as in Keras, for the metric's
            unit.
        cooldown: Evaluations after a reduction that do not count as bad, >= 0.
        min_scale: Smallest scale, in [0, 1].
        start_after: Number of first evaluations that are ignored, >= 0.
        window: Number of values of the metric that are averaged to one evaluation,
            >= 1. Use 1 for a validation metric, and more for a noisy training loss.
        convention: Whose counting to follow. "torch": n > patience and a cooldown of
            `cooldown`. "keras": n >= patience, a cooldown of `cooldown` - 1, and n is
            kept at min_scale. "optax": n >= patience and a cooldown of `cooldown`.
        metric: Name of the extra argument of `update` to read; a step without it only
            applies the scale. If None, only `observe_metric` passes values, so that a
            training loss in `value=` is not mistaken for a validation metric.

    Returns:
        A transformation for `optax.chain`. Its state is float32, int32 and bool for
        parameters of any dtype. A metric of nan or inf is counted and ignored. A nan or
        inf in the updates passes. In a guard, the metric of a rejected step is ignored.

    Raises:
        ValueError: If a concrete argument is out of range; when a step is traced, if
            the metric is not a scalar, or the state has another `mode`, `convention` or
            `threshold_mode`.

    Example:
        >>> import optax
        >>> import stablegrad as sg
        >>> plateau = sg.reduce_on_plateau(0.5, patience=2, metric=None)
        >>> tx = optax.chain(optax.adamw(1e-3), plateau)
        >>> state = tx.init({"w": 1.0})
        >>> for validation_loss in (2.0, 2.0, 2.0, 2.0):  # Once an epoch.
        ...     state = sg.observe_metric(state, value=validation_loss)
        >>> sg.metrics(state)["plateau_scale"].item()
        0.5

    Reference:
        `ReduceLROnPlateau` of Torch and Keras, `optax.contrib.reduce_on_plateau`.
    """
    require("factor", factor, "in (0, 1)", lambda x: 0 < x < 1)
    require_steps("patience", patience, 0)
    choices = {
        "mode": (mode, MODES),
        "threshold_mode": (threshold_mode, THRESHOLD_MODES),
        "convention": (convention, CONVENTIONS),
    }
    for name, (value, known) in choices.items():
        require(name, value, f"one of {known}", known.__contains__)
    require("threshold", threshold, ">= 0", lambda x: 0 <= x < float("inf"))
    require_steps("cooldown", cooldown, 0)
    require("min_scale", min_scale, "in [0, 1]", lambda x: 0 <= x <= 1)
    require_steps("start_after", start_after, 0)
    require_steps("window", window, 1)
    named = lambda x: x is None or str.isidentifier(x)
    require("metric", metric, "the name of an argument, or None", named)
    rule = (convention, mode, threshold_mode)

    def settings():
        return settings_of(
            factor, patience, threshold, cooldown, min_scale, start_after, window
        )

    def init_fn(params) -> Any:
        return init_plateau(rule, settings())

    def update_fn(updates, state, params=None, **extra) -> Any:
        require_state("reduce_on_plateau", PlateauState, state)
        fresh = init_plateau(rule, settings())
        if _trees.names_in(state.plateau_rule) != rule:
            raise ValueError(
                f"the state is one of {_trees.names_in(state.plateau_rule)}, but this "
                f"`reduce_on_plateau` has {rule} as convention, mode and "
                "threshold_mode. Keep these settings, or take a new state by `init`."
            )
        state = state._replace(plateau_settings=fresh.plateau_settings)
        was, new = state.plateau_readings, fresh.plateau_readings
        started = _trees.select(is_zeroed(state), new, was)
        state = state._replace(plateau_readings=started)
        if metric is not None and extra.get(metric) is not None:
            (value,) = scalar_signal(metric, extra[metric])
            warn_of_replicas(f"`{metric}=`", value, updates)
            state = evaluate(state, value)
        scale = state.plateau_readings.plateau_scale
        return scale_leaves(updates, uniform(scale), updates), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
