"""The radius: the longest step, adjusted by the probes.

    r > high: shorter, at once     low <= r <= high: as it is     r < low: longer

`care` multiplies `high` and `low`. It rises while the radius does not bind. Where the
radius binds, it falls with the number of binding probes without progress, because
noise, which probes on one batch do not see, limits a long run.

A healthy step may gain nothing, at the edge of stability or with momentum. So after the
first probes nothing is cut while the loss improves.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..._norms import LARGEST
from ..._trees import count_if
from ._probe import Look, ratio
from ._progress import LONGEST, Progress, after_loss, gain, init_progress, window

DENSE = 5  # The first probes, one a step.
DECAY = 0.85  # Weight of the past in averages over probes.
AIM = 0.7  # A cut aims at this share of `high`.
SHORTEST_CUT = 0.5  # Smallest factor of one cut without an alarm.
FASTER = 2.0  # Growth while r is below a tenth of `low`.
SLOWER, NEAR_A_CUT = 1.1, 0.5  # Growth beyond this share of the last cut's length.
EARLY = 30  # The first probes, during which the care is constant.
CARE, LEAST_CARE = 0.7, 0.3  # Factor on `high` while a radius binds; its minimum.
CARE_OVER = 50  # Later binding probes that halve the care.
RELIEF = 3.0  # Binding probes that one probe with progress takes back at most.
MOST_BOUND = 1e4  # Largest count of binding probes.
LOOSE_OVER, LOOSE = 50, 1.6  # Free probes that raise `high`, and by how much.
RELEASE = 4.0  # A radius of so many optimizer's steps does not bind.
SHOWN = ("ratio", "scale", "probes", "cuts", "mismatch")  # Numbers for `metrics`.
NEVER = LARGEST  # A radius that does not bind; the state stays finite.


class TrustRegionState(NamedTuple):
    trust_radius: jax.Array  # float32, > 0: the longest step; `NEVER` if free.
    trust_ratio: jax.Array  # float32: r, averaged over probes.
    trust_scale: jax.Array  # float32 in [0, 1]: on the last step.
    trust_probes: jax.Array  # int32: probes made, each a forward pass at least.
    trust_cuts: jax.Array  # int32: times the radius was cut.
    trust_mismatch: jax.Array  # bool: gradients are not those of `value`.
    own_length: jax.Array  # float32: length of the optimizer's last step.
    cut_length: jax.Array  # float32: step length at the last cut; `NEVER` if none.
    mean_excess: jax.Array  # float32: over probes, for steps as long as the last.
    mean_slope: jax.Array  # float32: over probes, for steps as long as the last.
    progress: Progress
    steps_tried: jax.Array  # int32: steps with a length.
    probes_known: jax.Array  # int32: probes with a finite result that descend.
    probes_bound: jax.Array  # float32: binding probes; see `_bound`.
    probes_free: jax.Array  # int32: probes in a row while the radius did not bind.


def init_radius() -> TrustRegionState:
    """Return the state before the first step, without a limit."""
    zero, none = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)
    never, one = jnp.full((), NEVER, jnp.float32), jnp.ones((), jnp.float32)
    shown = (never, zero, one, none, none, jnp.zeros((), bool))
    lengths = (zero, never, zero, zero)
    return TrustRegionState(*shown, *lengths, init_progress(), none, none, zero, none)


def readings(state: TrustRegionState) -> dict[str, jax.Array]:
    """Return the numbers of a trust region by name, for `metrics`."""
    binds = state.trust_radius < RELEASE * state.own_length
    radius = jnp.where(binds, state.trust_radius, jnp.inf)
    shown = {f"trust_{name}": getattr(state, f"trust_{name}") for name in SHOWN}
    return {"trust_radius": radius, **shown}


def is_due(state: TrustRegionState, every) -> jax.Array:
    """Return whether this step is probed."""
    due = (state.probes_known < DENSE) | (state.steps_tried % every == 0)
    return due & ~state.trust_mismatch


def care(state: TrustRegionState, is_bound) -> jax.Array:
    """Return the factor on `high` and `low`."""
    late = jnp.maximum(state.probes_bound - EARLY, 0.0)
    binding = jnp.maximum(CARE / (1 + late / CARE_OVER), LEAST_CARE)
    free = jnp.minimum(state.probes_free.astype(jnp.float32) / LOOSE_OVER, 1.0)
    return jnp.where(is_bound, binding, CARE + (LOOSE - CARE) * free)


def longest_rise(state: TrustRegionState, loss) -> jax.Array:
    """Return the rise that is an alarm: the loss doubles, or leaves its usual range."""
    usual = jnp.maximum(jnp.abs(state.progress.far), 4 * state.progress.spread)
    return jnp.maximum(jnp.abs(loss), jnp.where(state.steps_tried > 0, usual, 0.0))


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
    state: TrustRegionState, found: Look, length, own_length, high, low, grow
) -> tuple[TrustRegionState, jax.Array]:
    """Return the state after a probe of a step of `length`, and whether it is an alarm.

    `own_length` is the length that the optimizer asked for, before the radius.
    """
    alarm = ((found.looks > 1) | ~found.accepted) & ~found.mismatch
    harmful = alarm & found.accepted
    bound = state.trust_radius < RELEASE * own_length
    careful = care(state, bound)
    high, low = high * careful, low * careful
    settled = state.probes_known >= EARLY
    won = gain(state.progress, state.steps_tried)
    improves, worsens = settled & (won > 1), settled & (won < -1)
    excess, slope = _averages(state, found, alarm)
    # Steps that on average do not descend count as too long, but only once: shorter
    # ones do not turn momentum round.
    climbs = slope >= 0
    r = jnp.where(climbs, 2.0, ratio(excess, slope))
    climbed = climbs & (state.mean_slope >= 0) & (state.probes_known > 0)

    cut = found.known & ~alarm & (r > high) & ~improves & ~climbed
    factor = jnp.clip(AIM * high / jnp.maximum(r, 1e-9), SHORTEST_CUT, 1.0)
    cut_length = jnp.where(cut & bound, length, state.cut_length)
    descends = found.known & (found.slope < 0)
    # A step whose change cannot be seen is short enough to grow.
    grows = ((descends & (r < low)) | found.blind) & ~alarm & ~worsens
    # While the loss improves, a little more may be tried.
    tries = descends & (r < high) & ~alarm & improves & bound
    far_too_short = found.blind | (r < 0.1 * low)
    growth = jnp.where(far_too_short, jnp.maximum(grow, FASTER), grow)
    near_a_cut = state.trust_radius > NEAR_A_CUT * cut_length
    growth = jnp.where(near_a_cut | ~grows, SLOWER, growth)
    growth = jnp.where(grows | tries, growth, 1.0)

    longer = state.trust_radius * growth
    radius = jnp.where(state.trust_radius < NEVER / growth, longer, NEVER)
    radius = jnp.where(cut, length * factor, radius)
    # If no part may be taken, the length is not the cause, and the radius stays.
    radius = jnp.where(harmful, length * found.part, radius)
    radius = jnp.where(found.mismatch, NEVER, jnp.maximum(radius, 1e-30))
    shorter = jnp.where(cut, factor, 1.0)
    free = count_if(found.known, state.probes_free)
    return (
        state._replace(
            trust_radius=radius,
            trust_ratio=jnp.clip(r, -LARGEST, LARGEST),
            trust_probes=state.trust_probes + found.looks,
            trust_cuts=count_if(cut | harmful, state.trust_cuts),
            trust_mismatch=found.mismatch,
            cut_length=jnp.where(radius < RELEASE * own_length, cut_length, NEVER),
            mean_excess=excess * shorter**2,
            mean_slope=slope * shorter,
            probes_known=count_if(descends, state.probes_known),
            probes_bound=jnp.where(bound, _bound(state, improves), state.probes_bound),
            probes_free=jnp.where(bound, 0, free),
        ),
        alarm,
    )


def _averages(state: TrustRegionState, found: Look, alarm):
    """Return the mean excess and slope, for steps as long as this one."""
    part = jnp.where(alarm, found.part, 1.0)
    weight = jnp.where(state.probes_known == 0, 0.0, DECAY)
    # The excess goes with the square of the length.
    excess = weight * state.mean_excess * part**2 + (1 - weight) * found.excess
    slope = weight * state.mean_slope * part + (1 - weight) * found.slope
    excess = jnp.where(found.known, excess, state.mean_excess)
    slope = jnp.where(found.known, slope, state.mean_slope)
    return jnp.clip(excess, -LARGEST, LARGEST), jnp.clip(slope, -LARGEST, LARGEST)


def _bound(state: TrustRegionState, improves):
    """Return the count of binding probes; progress takes some back after the start."""
    relief = RELIEF * window(state.steps_tried) / LONGEST
    least = jnp.minimum(state.probes_bound, float(EARLY))
    relieved = jnp.maximum(state.probes_bound + 1 - relief, least)
    count = jnp.where(improves, relieved, state.probes_bound + 1)
    return jnp.minimum(count, MOST_BOUND)
