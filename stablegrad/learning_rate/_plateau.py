"""Reduce on plateau: lower the learning rate once a metric no longer improves."""

from typing import Any

import jax
import optax

from .. import _trees
from .._checks import require, require_steps
from ..thresholds._signals import scalar_signal
from ._evaluations import (
    CONVENTIONS,
    MODES,
    THRESHOLD_MODES,
    evaluate,
    init_plateau,
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
    """Multiplies updates by a scale that is cut when a metric stops improving.

    With a_t an evaluation, b the best so far, m = threshold * |b| (or threshold for
    threshold_mode="abs"), n the evaluations in a row that were not better:

        better_t = a_t < b - m   (mode="max": a_t > b + m);    the first always is
        k_t = max(factor * k_{t-1}, min_scale)  if n_t > patience, then n = 0 and rest

    Published: torch and optax take b where this takes |b|, so that with a negative best
    a worse metric counts as better; a nan counts as bad, so that a few failed
    evaluations cut; optax with patience=0 cuts at every improvement and never else.
    The scale only falls, as in all three; see `back_off` for one that regrows.

    Args:
        factor: One cut. Dimensionless, in (0, 1).
        patience: Evaluations in a row that may be bad, >= 0. 0: every bad one cuts.
        mode: "min" for a metric such as a loss, "max" for one such as accuracy.
        threshold: What an improvement must exceed, >= 0.
        threshold_mode: "rel" for a share of |b|, "abs" for the metric's unit. Keras
            has "abs" only.
        cooldown: Evaluations of rest after a cut, in which none counts as bad, >= 0.
        min_scale: Smallest scale, in [0, 1].
        start_after: The first evaluations, which are not looked at at all, >= 0; in
            evaluations, each of `window` values.
        window: Values of the metric of which the mean is one evaluation, >= 1. 1 for a
            validation metric; a training loss wants as many as drown its noise.
        convention: Whose counting to follow: "torch": n > patience, rest `cooldown`;
            "keras": n >= patience, rest `cooldown` - 1, and at min_scale n is kept;
            "optax": n >= patience, rest `cooldown`.
        metric: Name of the extra argument that `update` reads at every step that brings
            it, and that cuts its updates at once; a step without it only applies the
            scale. `observe_metric` feeds the plateau besides. None: nothing else does,
            so that no training loss passed as `value=` for another transformation is
            taken for a validation metric.

    Returns:
        A transformation for `optax.chain`. It keeps structure, shapes and dtypes, and
        its state is float32 and int32 for parameters of any dtype. A metric of nan or
        inf is counted, and otherwise ignored: it is no evaluation. A nan or inf in
        the updates passes. Inside a guard, the metric of a rejected step is not seen.

    Raises:
        ValueError: If a concrete argument is out of range; when a step is traced, if
            the metric is no scalar.

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
        `torch.optim.lr_scheduler.ReduceLROnPlateau`, Keras's `ReduceLROnPlateau`,
        `optax.contrib.reduce_on_plateau`.
    """
    require("factor", factor, "in (0, 1)", lambda x: 0 < x < 1)
    require_steps("patience", patience, 0)
    require("mode", mode, f"one of {MODES}", lambda x: x in MODES)
    require("threshold", threshold, ">= 0", lambda x: 0 <= x < float("inf"))
    require(
        "threshold_mode",
        threshold_mode,
        f"one of {THRESHOLD_MODES}",
        lambda x: x in THRESHOLD_MODES,
    )
    require_steps("cooldown", cooldown, 0)
    require("min_scale", min_scale, "in [0, 1]", lambda x: 0 <= x <= 1)
    require_steps("start_after", start_after, 0)
    require_steps("window", window, 1)
    require(
        "convention", convention, f"one of {CONVENTIONS}", lambda x: x in CONVENTIONS
    )
    require(
        "metric",
        metric,
        "the name of an argument, or None",
        lambda x: x is None or str.isidentifier(x),
    )
    rule = (convention, mode, threshold_mode)

    def settings():
        return settings_of(
            factor, patience, threshold, cooldown, min_scale, start_after, window
        )

    def init_fn(params) -> Any:
        del params
        return init_plateau(rule, settings())

    def update_fn(updates, state, params=None, **extra) -> Any:
        del params
        state = state._replace(plateau_settings=settings())
        if metric is not None and extra.get(metric) is not None:
            (value,) = scalar_signal(metric, extra[metric])
            state = evaluate(state, value)
        scale = state.plateau_readings.plateau_scale
        return _trees.scale_leaves(updates, scale, updates), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
