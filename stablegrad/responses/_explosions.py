"""The state machine of a back-off: a rise cuts a factor once, calm steps regrow it.

    k at 1 --rise--> cut --hold_steps calm--> regrow, geometrically --> k at 1
              ^        |                             |
              |        +--a further rise             +--another rise
              +--------+-----------------------------+

`back_off`, `scale_by_explosion_aware_schedule` and `explosion_aware_schedule` use it.
It knows nothing of gradients or thresholds: a step is an `Explosion`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from .._checks import require, require_steps
from .._norms import LARGEST
from .._trees import increment

MOST_EXCESS = LARGEST / 4  # Also that of a signal that is not finite.
FURTHER = 2.0  # A rise is a further one if its excess is that many times the last.


class Explosion(NamedTuple):
    """What a step tells a back-off."""

    exploded: jax.Array  # bool, (): some threshold is exceeded.
    unknown: jax.Array  # bool, (): some signal is not finite.
    # float32 (thresholds,), in [0, MOST_EXCESS]: how far above its limit a signal is.
    excess: jax.Array
    height: jax.Array  # float32 (thresholds,): the largest signal, bounded likewise.


class ExplosionState(NamedTuple):
    """Where a back-off stands."""

    scale_at_cut: jax.Array  # float32, in [min_scale, 1]: just after the last cut.
    regrown_steps: jax.Array  # int32: calm steps of regrowth since then, saturating.
    hold_left: jax.Array  # int32, >= 0: calm steps before it regrows.
    explosion_run: jax.Array  # int32: taken explosions in a row, none fading.
    may_cut: jax.Array  # bool: a step was taken since the last cut.
    excess_at_cut: jax.Array  # float32 (thresholds,): `excess` at the last cut.
    last_height: jax.Array  # float32 (thresholds,): `height` of the last explosion.


class ExplosionSettings(NamedTuple):
    """How far to cut, and how fast to regrow; `back_off` documents each."""

    factor: float | jax.Array
    confirm_steps: int | jax.Array
    hold_steps: int | jax.Array
    regrow_steps: int | jax.Array
    min_scale: float | jax.Array


def check_settings(settings: ExplosionSettings) -> None:
    """Raise ValueError if a concrete setting is out of range."""
    require("factor", settings.factor, "in (0, 1)", lambda x: 0 < x < 1)
    for name, least in (("confirm_steps", 1), ("hold_steps", 0), ("regrow_steps", 1)):
        require_steps(name, getattr(settings, name), least)
    least = float(jnp.finfo(jnp.float32).tiny)  # Below, a scale may become 0.
    expected = f"in [{least:.2g}, 1]"
    require("min_scale", settings.min_scale, expected, lambda x: least <= x <= 1)


def init_explosions(thresholds: int) -> ExplosionState:
    """Return the state before any explosion, with no step to blame for one."""
    return ExplosionState(
        scale_at_cut=jnp.ones((), jnp.float32),
        regrown_steps=jnp.zeros((), jnp.int32),
        hold_left=jnp.zeros((), jnp.int32),
        explosion_run=jnp.zeros((), jnp.int32),
        may_cut=jnp.zeros((), bool),
        excess_at_cut=jnp.zeros((thresholds,), jnp.float32),
        last_height=jnp.zeros((thresholds,), jnp.float32),
    )


def scale_now(settings: ExplosionSettings, state: ExplosionState, seen: Explosion):
    """Return the factor on this step, whether an explosion is confirmed, and cuts."""
    # From the count, not step by step: float32 would lose a slow regrowth.
    regrown = state.regrown_steps.astype(jnp.float32) / settings.regrow_steps
    # A state that was reset to zeros has cut nothing yet.
    at_cut = jnp.where(state.scale_at_cut > 0, state.scale_at_cut, 1.0)
    scale = at_cut * jnp.asarray(settings.factor, jnp.float32) ** -regrown
    # A factor that is traced may turn out to be nan.
    scale = jnp.where(jnp.isfinite(scale), jnp.minimum(scale, 1.0), 1.0)
    cut = jnp.maximum(scale * settings.factor, settings.min_scale)
    confirmed = seen.exploded & (_run(state, seen) >= settings.confirm_steps)
    further = jnp.any(seen.excess > FURTHER * state.excess_at_cut)
    armed = state.may_cut & ((state.hold_left == 0) | further)
    cuts = confirmed & armed & jnp.isfinite(cut)
    return jnp.where(cuts, cut, scale).astype(jnp.float32), confirmed, cuts


def _run(state: ExplosionState, seen: Explosion) -> jax.Array:
    """Return the explosions in a row with this one; a fading one starts anew."""
    rises = jnp.any(seen.height > state.last_height)
    fades = jnp.any(seen.height < state.last_height) & ~rises
    return increment(jnp.where(fades, 0, state.explosion_run))


def after_step(
    settings: ExplosionSettings, state: ExplosionState, seen: Explosion, taken
) -> ExplosionState:
    """Return the state after a step, taken or not."""
    scale, confirmed, cuts = scale_now(settings, state, seen)
    calm = taken & ~seen.exploded & ~seen.unknown
    held = jnp.where(calm, jnp.maximum(state.hold_left - 1, 0), state.hold_left)
    regrows = calm & (state.hold_left == 0)
    regrown = jnp.where(regrows, increment(state.regrown_steps), state.regrown_steps)
    return ExplosionState(
        scale_at_cut=jnp.where(cuts, scale, state.scale_at_cut),
        regrown_steps=jnp.where(cuts, 0, regrown),
        hold_left=jnp.where(confirmed, settings.hold_steps, held).astype(jnp.int32),
        explosion_run=jnp.where(
            seen.exploded,
            # A refused step is tried again at the same parameters: no further evidence.
            jnp.where(taken, _run(state, seen), state.explosion_run),
            jnp.where(seen.unknown, state.explosion_run, 0),
        ),
        may_cut=taken | (state.may_cut & ~cuts),
        excess_at_cut=jnp.where(cuts, seen.excess, state.excess_at_cut),
        last_height=jnp.where(seen.exploded, seen.height, state.last_height),
    )
