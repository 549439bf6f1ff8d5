"""The rule of a plateau: what one more value of the metric does to the scale.

    value -> mean of a window = one evaluation -> better? -> rest, count, or cut

Everything that the rule depends on is in the state, so that a metric can be given to
the state alone, without the transformation.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from .._trees import count_if, distinct, increment, layout, names_in

CONVENTIONS = ("torch", "keras", "optax")
MODES = ("min", "max")
THRESHOLD_MODES = ("rel", "abs")


class PlateauSettings(NamedTuple):
    """The numbers of a plateau rule as of the last step; rank-0."""

    plateau_factor: jax.Array  # float32, in (0, 1).
    plateau_patience: jax.Array  # int32, >= 0.
    plateau_threshold: jax.Array  # float32, >= 0.
    plateau_cooldown: jax.Array  # int32, >= 0.
    plateau_min_scale: jax.Array  # float32, in [0, 1].
    plateau_start_after: jax.Array  # int32, >= 0.
    plateau_window: jax.Array  # int32, >= 1.


class PlateauReadings(NamedTuple):
    """What a plateau has seen and done; rank-0, all finite."""

    plateau_scale: jax.Array  # float32 in [0, 1]: factor on the updates.
    plateau_best: jax.Array  # float32: best evaluation judged, 0 before the first.
    plateau_judged: jax.Array  # bool: whether there was one.
    plateau_bad_evaluations: jax.Array  # int32: in a row that were no better.
    plateau_cooldown_left: jax.Array  # int32, >= 0: evaluations of rest to come.
    plateau_evaluations: jax.Array  # int32: since `init`, saturating.
    plateau_cuts: jax.Array  # int32: evaluations that lowered the scale, saturating.
    plateau_ignored_metrics: jax.Array  # int32: values that were nan or inf.
    plateau_window_mean: jax.Array  # float32: of the finite values of this window.
    plateau_window_values: jax.Array  # int32: how many there are, < window.


class PlateauState(NamedTuple):
    """State of `reduce_on_plateau`."""

    plateau_rule: dict[str, None]  # Convention, mode, threshold mode.
    plateau_settings: PlateauSettings
    plateau_readings: PlateauReadings


def settings_of(*numbers) -> PlateauSettings:
    """The numbers as arrays of fixed dtypes."""
    dtypes = ("float32", "int32", "float32", "int32", "float32", "int32", "int32")
    pairs = zip(numbers, dtypes, strict=True)
    return PlateauSettings(*[jnp.asarray(x).astype(dtype) for x, dtype in pairs])


def init_plateau(rule: tuple[str, ...], settings: PlateauSettings) -> PlateauState:
    """Nothing evaluated yet."""
    zero, none = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)
    no, one = jnp.zeros((), bool), jnp.ones((), jnp.float32)
    readings = PlateauReadings(one, zero, no, none, none, none, none, none, zero, none)
    return PlateauState(layout(rule), *distinct((settings, readings)))


def plain(state: PlateauState) -> PlateauState:
    """The state with bare arrays, where NNX has wrapped each in a variable."""
    leaves = jax.tree.leaves(state)
    first = len(PlateauSettings._fields)
    return PlateauState(
        state.plateau_rule,
        PlateauSettings(*leaves[:first]),
        PlateauReadings(*leaves[first:]),
    )


def evaluate(state: PlateauState, value) -> PlateauState:
    """The state after one more value of the metric, a float32 scalar."""
    settings, old = state.plateau_settings, state.plateau_readings
    finite = jnp.isfinite(value)
    number = increment(old.plateau_window_values)
    # Not as a difference from the mean, which may overflow.
    share = 1 / number.astype(jnp.float32)
    mean = old.plateau_window_mean * (1 - share) + value * share
    whole = finite & (number >= settings.plateau_window)
    evaluations = count_if(whole, old.plateau_evaluations)
    seen = old._replace(
        plateau_evaluations=evaluations,
        plateau_ignored_metrics=count_if(~finite, old.plateau_ignored_metrics),
        plateau_window_mean=jnp.where(
            whole, 0.0, jnp.where(finite, mean, old.plateau_window_mean)
        ),
        plateau_window_values=jnp.where(
            whole, 0, count_if(finite, old.plateau_window_values)
        ),
    )
    judged = whole & (evaluations > settings.plateau_start_after)
    after = _judged(seen, settings, names_in(state.plateau_rule), mean)
    chosen = jax.tree.map(lambda new, kept: jnp.where(judged, new, kept), after, seen)
    return state._replace(plateau_readings=chosen)


def _judged(
    old: PlateauReadings, settings: PlateauSettings, rule: tuple[str, ...], metric
) -> PlateauReadings:
    """The readings after an evaluation that counts."""
    convention, mode, threshold_mode = rule
    best, scale = old.plateau_best, old.plateau_scale
    # |best|: with a negative best, too, a better metric must lie beyond it.
    unit = jnp.abs(best) if threshold_mode == "rel" else jnp.ones((), jnp.float32)
    margin = settings.plateau_threshold * unit
    better = metric > best + margin if mode == "max" else metric < best - margin
    better |= ~old.plateau_judged
    left = jnp.maximum(old.plateau_cooldown_left - 1, 0)
    # Keras counts its rest down before it looks, so the last evaluation counts.
    resting = (left if convention == "keras" else old.plateau_cooldown_left) > 0
    bad = jnp.where(better | resting, 0, increment(old.plateau_bad_evaluations))
    patience = settings.plateau_patience
    # Without patience, every bad evaluation cuts in all three.
    needed = increment(patience) if convention == "torch" else jnp.maximum(patience, 1)
    cuts = bad >= needed
    lower = jnp.maximum(scale * settings.plateau_factor, settings.plateau_min_scale)
    if convention == "keras":
        cuts &= scale > settings.plateau_min_scale
    # A factor that is traced may turn out to be nan.
    lower = jnp.where(cuts & (lower < scale), lower, scale)
    return old._replace(
        plateau_scale=lower,
        plateau_best=jnp.where(better, metric, best),
        plateau_judged=jnp.ones((), bool),
        plateau_bad_evaluations=jnp.where(cuts, 0, bad),
        plateau_cooldown_left=jnp.where(cuts, settings.plateau_cooldown, left),
        plateau_cuts=count_if(lower < scale, old.plateau_cuts),
    )
