"""The radius: the longest step, and the law that probes move it by.

    log R  moves by  0.3 clip(target - r, -1, 1)   at each probe, slower while growing
                                                   where the loss does not fall
    target moves by  0.03 balance                  at each probe, within [0.2, 2]

There is no region of rest: R grows while r is below the target, which rises while the
loss falls and sinks where gains on own batches are not real (see `_progress`). So a
healthy run, at the edge of stability too, raises the target above its own r and is soon
free of an early cut; steps too long for the noise lower it until the loss falls again.
On a plateau no length helps: steps of a small r are left alone.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..._norms import LARGEST
from ..._trees import count_if, increment
from ._probe import Look, ratio
from ._progress import Progress, after_gain, after_loss, balance, init_progress

DENSE = 5  # The first probes, one a step: R has to be found.
DECAY = 0.8  # Weight of the past in averages over probes: five of them.
GAIN = 0.3  # Change of log R per unit of r: one probe moves R by a third at most.
FIRST_TARGET = 1 / 2  # The minimum along the step.
LEAST_TARGET = 0.2  # Two fifths of the way to that minimum are never too long.
PACE = 0.03  # Change of the target per unit of `balance`: 17 good probes pass 1.
LONGER = 4.0  # A step so many times as long as the last one resets the search for R.
ACCEPT = 1 / 2  # Largest r of the first step; one that is shortened aims at half of it.
SHOWN = ("ratio", "scale", "probes", "cuts", "mismatch", "target")  # For `metrics`.
NEVER = LARGEST  # A radius that does not bind; the state stays finite.


class TrustRegionState(NamedTuple):
    trust_radius: jax.Array  # float32, > 0: the longest step; `NEVER` if free.
    trust_ratio: jax.Array  # float32: r, averaged over probes.
    trust_scale: jax.Array  # float32 in [0, 1]: on the last step.
    trust_probes: jax.Array  # int32: probes made, each a forward pass at least.
    trust_cuts: jax.Array  # int32: steps that a probe shortened at once.
    trust_mismatch: jax.Array  # bool: gradients are not those of `value`.
    trust_target: jax.Array  # float32 in [0.2, 2]: the r that R aims at.
    own_length: jax.Array  # float32: length of the optimizer's last step.
    mean_excess: jax.Array  # float32: over probes, for steps as long as the last.
    mean_slope: jax.Array  # float32: over probes, for steps as long as the last.
    progress: Progress
    steps_tried: jax.Array  # int32: steps with a length.
    probes_known: jax.Array  # int32: probes with a finite result that descend.
    probes_blind: jax.Array  # int32: probes in a row within the loss's rounding error.


def init_radius() -> TrustRegionState:
    """Return the state before the first step, without a limit."""
    number = lambda x: jnp.full((), x, jnp.float32)
    none, zero = jnp.zeros((), jnp.int32), number(0.0)
    return TrustRegionState(
        trust_radius=number(NEVER),
        trust_ratio=zero,
        trust_scale=number(1.0),
        trust_probes=none,
        trust_cuts=none,
        trust_mismatch=jnp.zeros((), bool),
        trust_target=number(FIRST_TARGET),
        own_length=zero,
        mean_excess=zero,
        mean_slope=zero,
        progress=init_progress(),
        steps_tried=none,
        probes_known=none,
        probes_blind=none,
    )


def readings(state: TrustRegionState) -> dict[str, jax.Array]:
    """Return the numbers of a trust region by name, for `metrics`."""
    radius = jnp.where(binds(state), state.trust_radius, NEVER)  # Shown as inf.
    shown = {f"trust_{name}": getattr(state, f"trust_{name}") for name in SHOWN}
    return {"trust_radius": radius, **shown}


def binds(state: TrustRegionState) -> jax.Array:
    """Return whether the optimizer's last step was longer than the radius."""
    return state.trust_radius < state.own_length


def before_step(state: TrustRegionState, length) -> TrustRegionState:
    """Return the state before a step of `length`: a much longer one starts anew."""
    anew = jnp.isfinite(length) & (length > LONGER * state.own_length)
    known = jnp.where(anew, 0, state.probes_known)
    blind = jnp.where(anew, 0, state.probes_blind)
    # A radius of 0, from a state reset to zeros, is no limit.
    radius = jnp.where(state.trust_radius > 0, state.trust_radius, NEVER)
    target = jnp.where(anew, FIRST_TARGET, state.trust_target)
    return state._replace(
        trust_radius=radius,
        trust_target=target,
        probes_known=known,
        probes_blind=blind,
    )


def is_due(state: TrustRegionState, every) -> jax.Array:
    """Return whether this step is probed: half as often while R does not bind."""
    interval = jnp.where(binds(state), every, 2 * every)
    dense = (state.probes_known < DENSE) & (state.probes_blind < DENSE)
    due = dense | (state.steps_tried % interval == 0)
    return due & ~state.trust_mismatch


def longest_rise(state: TrustRegionState, loss) -> jax.Array:
    """Return the rise that is an alarm: the loss doubles, or leaves its usual range."""
    usual = jnp.maximum(jnp.abs(state.progress.far), 2 * state.progress.spread)
    return jnp.maximum(jnp.abs(loss), usual)


def after_step(
    state: TrustRegionState, loss, own_length, scale, is_sound
) -> TrustRegionState:
    """Return the state after a step; one of no length counts for the loss alone."""
    return state._replace(
        progress=after_loss(state.progress, loss, state.steps_tried),
        steps_tried=count_if(is_sound, state.steps_tried),
        own_length=jnp.where(is_sound, own_length, state.own_length),
        trust_scale=scale,
    )


def after_probe(
    state: TrustRegionState, found: Look, length, own_length, every
) -> tuple[TrustRegionState, jax.Array]:
    """Return the state after a probe of a step of `length`, and whether it is an alarm.

    `own_length` is the length that the optimizer asked for, before the radius.
    """
    alarm = ((found.looks > 1) | ~found.accepted) & ~found.mismatch
    harmful = alarm & found.accepted
    excess, slope = _averages(state, found)
    # Steps that do not descend are too long if the loss rises; else R may stay.
    beyond = jnp.where(excess + slope > 0, 2.0, state.trust_target)
    r = jnp.where(slope < 0, ratio(excess, slope), beyond)

    won = balance(state.progress, state.steps_tried)
    target = jnp.clip(state.trust_target + PACE * won, LEAST_TARGET, 2.0)
    target = jnp.where(found.known, target, state.trust_target)
    move = jnp.clip(target - r, -1.0, 1.0)
    move = jnp.where(move > 0, move * (1 + won) / 2, move)
    # A step whose change cannot be seen is short enough to grow.
    move = jnp.where(found.known, move, jnp.where(found.blind, 1.0, 0.0))
    # A radius far above the step shrinks from twice its length.
    felt = jnp.minimum(state.trust_radius, 2 * own_length)
    radius = jnp.where(move < 0, felt, state.trust_radius) * jnp.exp(GAIN * move)
    # If no part may be taken, the length is not the cause, and the radius stays.
    radius = jnp.where(alarm, state.trust_radius, radius)
    radius = jnp.where(harmful, length * found.part, radius)
    # Later, gradients that differ from the loss's are those of rounding.
    mismatch = found.mismatch & (state.steps_tried < DENSE)
    radius = jnp.where(mismatch, NEVER, jnp.clip(radius, 1e-30, NEVER))
    shorter = jnp.minimum(1.0, radius / (length * found.part))
    gain = jnp.where(alarm, jnp.nan, -(found.excess + found.slope))
    unseen = found.blind & found.accepted
    progress = after_gain(
        state.progress, gain, state.probes_known, state.steps_tried, every
    )
    return (
        state._replace(
            trust_radius=radius,
            trust_ratio=jnp.clip(r, -LARGEST, LARGEST),
            trust_probes=state.trust_probes + found.looks,
            trust_cuts=count_if(harmful, state.trust_cuts),
            trust_mismatch=mismatch,
            trust_target=target,
            mean_excess=excess * shorter**2,
            mean_slope=slope * shorter,
            progress=progress,
            probes_known=count_if(found.known & (found.slope < 0), state.probes_known),
            probes_blind=jnp.where(unseen, increment(state.probes_blind), 0),
        ),
        alarm,
    )


def _averages(state: TrustRegionState, found: Look):
    """Return the mean excess and slope, for steps as long as the part taken."""
    known = state.probes_known.astype(jnp.float32)
    weight = jnp.minimum(DECAY, known / (known + 1))
    # The excess goes with the square of the length.
    excess = weight * state.mean_excess * found.part**2 + (1 - weight) * found.excess
    slope = weight * state.mean_slope * found.part + (1 - weight) * found.slope
    excess = jnp.where(found.known, excess, state.mean_excess)
    slope = jnp.where(found.known, slope, state.mean_slope)
    return jnp.clip(excess, -LARGEST, LARGEST), jnp.clip(slope, -LARGEST, LARGEST)
