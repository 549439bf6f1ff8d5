"""The rule of `reduce_on_plateau`: how a value of the metric changes the scale.

    values -> mean of a window = one evaluation -> better, bad or in cooldown -> scale

The state holds all settings of the rule, so that `observe_metric` needs only the state.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from .._trees import count_if, distinct, increment, layout, names_in, select

CONVENTIONS = ("torch", "keras", "optax")
MODES = ("min", "max")
THRESHOLD_MODES = ("rel", "abs")


class PlateauSettings(NamedTuple):
    """Numeric settings of the last step; rank-0."""

    plateau_factor: jax.Array  # float32, in (0, 1).
    plateau_patience: jax.Array  # int32, >= 0.
    plateau_threshold: jax.Array  # float32, >= 0.
    plateau_cooldown: jax.Array  # int32, >= 0.
    plateau_min_scale: jax.Array  # float32, in [0, 1].
    plateau_start_after: jax.Array  # int32, >= 0.
    plateau_window: jax.Array  # int32, >= 1.


class PlateauReadings(NamedTuple):
    """Scale, best evaluation and counters; rank-0, all finite."""

    plateau_scale: jax.Array  # float32 in [0, 1]: factor on the updates.
    plateau_best: jax.Array  # float32: best evaluation, 0 before the first.
    plateau_judged: jax.Array  # bool: whether `plateau_best` is an evaluation.
    plateau_bad_evaluations: jax.Array  # int32: in a row that were not better.
    plateau_cooldown_left: jax.Array  # int32, >= 0: remaining evaluations of cooldown.
    plateau_evaluations: jax.Array  # int32: since `init`, saturating.
    plateau_cuts: jax.Array  # int32: evaluations that reduced the scale, saturating.
    plateau_ignored_metrics: jax.Array  # int32: values that were nan or inf.
    plateau_window_mean: jax.Array  # float32: mean of the values in this window.
    plateau_window_values: jax.Array  # int32: number of these values, < window.


class PlateauState(NamedTuple):
    plateau_rule: dict[str, None]  # Convention, mode and threshold mode.
    plateau_settings: PlateauSettings
    plateau_readings: PlateauReadings


def settings_of(*numbers) -> PlateauSettings:
    """Convert settings to arrays of fixed dtypes."""
    dtypes = ("float32", "int32", "float32", "int32", "float32", "int32", "int32")
    pairs = zip(numbers, dtypes, strict=True)
    return PlateauSettings(*[jnp.asarray(x).astype(dtype) for x, dtype in pairs])


def init_plateau(rule: tuple[str, ...], settings: PlateauSettings) -> PlateauState:
    """Return the state before the first evaluation."""
    zero, none = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)
    readings = PlateauReadings(
        plateau_scale=jnp.ones((), jnp.float32),
        plateau_best=zero,
        plateau_judged=jnp.zeros((), bool),
        plateau_bad_evaluations=none,
        plateau_cooldown_left=none,
        plateau_evaluations=none,
        plateau_cuts=none,
        plateau_ignored_metrics=none,
        plateau_window_mean=zero,
        plateau_window_values=none,
    )
    return PlateauState(layout(rule), *distinct((settings, readings)))


def is_zeroed(state: PlateauState) -> jax.Array:
    """Return whether a state is one of zeros: a fresh one, reset by `zeros_like`."""
    readings = state.plateau_readings
    return (readings.plateau_scale == 0) & ~readings.plateau_judged


def evaluate(state: PlateauState, value) -> PlateauState:
    """Return the state after one more value of the metric, a float32 scalar.

    A state of zeros has no settings until the next update, and stays as it is.
    """
    settings, old = state.plateau_settings, state.plateau_readings
    finite = jnp.isfinite(value)
    number = increment(old.plateau_window_values)
    # A weighted sum, because the difference from the mean may overflow.
    share = 1 / number.astype(jnp.float32)
    mean = old.plateau_window_mean * (1 - share) + value * share
    full = finite & (number >= settings.plateau_window)
    evaluations = count_if(full, old.plateau_evaluations)
    kept_mean = jnp.where(finite, mean, old.plateau_window_mean)
    kept_values = count_if(finite, old.plateau_window_values)
    counted = old._replace(
        plateau_evaluations=evaluations,
        plateau_ignored_metrics=count_if(~finite, old.plateau_ignored_metrics),
        plateau_window_mean=jnp.where(full, 0.0, kept_mean),
        plateau_window_values=jnp.where(full, 0, kept_values),
    )
    judged = _judge(counted, settings, names_in(state.plateau_rule), mean)
    started = full & (evaluations > settings.plateau_start_after)
    readings = select(started, judged, counted)
    return state._replace(plateau_readings=select(is_zeroed(state), old, readings))


def _judge(
    old: PlateauReadings, settings: PlateauSettings, rule: tuple[str, ...], metric
) -> PlateauReadings:
    """Apply the rule to one evaluation."""
    convention, mode, threshold_mode = rule
    best, scale = old.plateau_best, old.plateau_scale
    # With |best|, a better metric lies beyond a negative best, too.
    unit = jnp.abs(best) if threshold_mode == "rel" else jnp.ones((), jnp.float32)
    margin = settings.plateau_threshold * unit
    better = metric > best + margin if mode == "max" else metric < best - margin
    better |= ~old.plateau_judged
    left = jnp.maximum(old.plateau_cooldown_left - 1, 0)
    # Keras ends the cooldown one evaluation earlier.
    cooling = (left if convention == "keras" else old.plateau_cooldown_left) > 0
    bad = jnp.where(better | cooling, 0, increment(old.plateau_bad_evaluations))
    patience = settings.plateau_patience
    # With patience=0, every bad evaluation cuts under all conventions.
    needed = increment(patience) if convention == "torch" else jnp.maximum(patience, 1)
    cuts = bad >= needed
    lower = jnp.maximum(scale * settings.plateau_factor, settings.plateau_min_scale)
    if convention == "keras":
        cuts &= scale > settings.plateau_min_scale
    # The scale is kept if a traced factor is nan.
    lower = jnp.where(cuts & (lower < scale), lower, scale)
    return old._replace(
        plateau_scale=lower,
        plateau_best=jnp.where(better, metric, best),
        plateau_judged=jnp.ones((), bool),
        plateau_bad_evaluations=jnp.where(cuts, 0, bad),
        plateau_cooldown_left=jnp.where(cuts, settings.plateau_cooldown, left),
        plateau_cuts=count_if(lower < scale, old.plateau_cuts),
    )
