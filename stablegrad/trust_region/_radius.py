"""The radius: how long a step may be, from what the probes found.

    r > high: shorter, at once     low <= r <= high: as it is     r < low: longer

Where the schedule's own steps stay calm, nothing binds, and the longer that lasts the
more is left to the schedule. Where the radius does bind, it is careful at the start,
when curvature changes fastest, and grows careful again the longer it binds: what holds
a long run back is noise, which probes on one batch do not see.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from .._measure import LARGEST
from .._trees import count_if, increment
from ._probe import Look, ratio

DENSE = 5  # Probes at the start, one a step.
DECAY = 0.85  # Of the averages over probes.
AIM = 0.7  # Of `high`: where a cut leads to.
SHORTEST_CUT = 0.5  # What one cut may shorten the radius by, but for an alarm.
FASTER = 2.0  # Growth while r is below a tenth of `low`: the radius is far too short.
EARLY, EARLY_CARE = 30, 0.7  # Probes of the start, and their factor on `high`.
CARE_OVER, LEAST_CARE = 50, 0.3  # Binding probes that halve `high`, and its floor.
LOOSE_OVER, LOOSE = 50, 1.6  # Free probes that raise `high`, and by how much.
RELEASE = 4.0  # Times the optimizer's own length: from where a radius is no bound.
LOSS_DECAY = 0.98
NEVER = LARGEST  # A radius that does not bind; the state stays finite.


class TrustRegionState(NamedTuple):
    """State of `trust_region`; every array has rank 0."""

    trust_radius: jax.Array  # float32, > 0: the longest step; `NEVER` if free.
    trust_ratio: jax.Array  # float32: r, averaged over probes.
    trust_scale: jax.Array  # float32 in [0, 1]: on the last step.
    trust_probes: jax.Array  # int32: probes made, each a forward pass at least.
    trust_cuts: jax.Array  # int32: times the radius was cut.
    mean_excess: jax.Array  # float32: of the probes, for steps as long as the last.
    mean_slope: jax.Array  # float32: the same.
    loss_level: jax.Array  # float32: running mean of the loss.
    loss_spread: jax.Array  # float32: running mean of its distance from the level.
    steps_tried: jax.Array  # int32
    probes_known: jax.Array  # int32: probes that told something.
    probes_bound: jax.Array  # int32: of them, while the radius was set.
    probes_free: jax.Array  # int32: in a row, while it was not.


def init_radius() -> TrustRegionState:
    """No limit yet, nothing known."""
    zero, none = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)
    return TrustRegionState(
        trust_radius=jnp.full((), NEVER, jnp.float32),
        trust_ratio=zero,
        trust_scale=jnp.ones((), jnp.float32),
        trust_probes=none,
        trust_cuts=none,
        mean_excess=zero,
        mean_slope=zero,
        loss_level=zero,
        loss_spread=zero,
        steps_tried=none,
        probes_known=none,
        probes_bound=none,
        probes_free=none,
    )


def is_due(state: TrustRegionState, every) -> jax.Array:
    """Whether this step is probed."""
    return (state.probes_known < DENSE) | (state.steps_tried % every == 0)


def care(state: TrustRegionState, is_bound) -> jax.Array:
    """The factor on `high` and `low`."""
    bound = state.probes_bound.astype(jnp.float32) - EARLY
    late = jnp.maximum(1 / (1 + jnp.maximum(bound, 0.0) / CARE_OVER), LEAST_CARE)
    binding = jnp.where(bound < 0, EARLY_CARE, late)
    free = jnp.minimum(state.probes_free.astype(jnp.float32) / LOOSE_OVER, 1.0)
    loose = EARLY_CARE + (LOOSE - EARLY_CARE) * free
    return jnp.where(is_bound, binding, loose)


def longest_rise(state: TrustRegionState, loss) -> jax.Array:
    """The rise of the loss that is an alarm: it doubles, or leaves its usual range."""
    usual = jnp.maximum(jnp.abs(state.loss_level), 4 * state.loss_spread)
    return jnp.maximum(jnp.abs(loss), jnp.where(state.steps_tried > 0, usual, 0.0))


def with_loss(state: TrustRegionState, loss) -> TrustRegionState:
    """The state that has seen a step's loss, if that is finite."""
    first = state.steps_tried == 0
    distance = jnp.abs(loss - state.loss_level)
    level = LOSS_DECAY * state.loss_level + (1 - LOSS_DECAY) * loss
    spread = LOSS_DECAY * state.loss_spread + (1 - LOSS_DECAY) * distance
    level, spread = jnp.where(first, loss, level), jnp.where(first, 0.0, spread)
    seen = jnp.isfinite(loss)
    return state._replace(
        loss_level=_bounded(jnp.where(seen, level, state.loss_level)),
        loss_spread=_bounded(jnp.where(seen, spread, state.loss_spread)),
        steps_tried=increment(state.steps_tried),
    )


def after_probe(
    state: TrustRegionState, found: Look, length, own_length, high, low, grow
) -> tuple[TrustRegionState, jax.Array]:
    """The state after a probe of a step of `length`, and whether it was an alarm.

    `own_length` is what the optimizer asked for, before the radius.
    """
    alarm = (found.looks > 1) | ~found.accepted
    shorter = jnp.where(alarm, found.part, 1.0)
    weight = jnp.where(state.probes_known == 0, 0.0, DECAY)
    # Both are kept for steps as long as this one: excess goes with its square.
    excess = weight * state.mean_excess * shorter**2 + (1 - weight) * found.excess
    slope = weight * state.mean_slope * shorter + (1 - weight) * found.slope
    excess = _bounded(jnp.where(found.known, excess, state.mean_excess))
    slope = _bounded(jnp.where(found.known, slope, state.mean_slope))
    # Steps that on average do not descend count as too long.
    r = jnp.where(slope < 0, ratio(excess, slope), 2.0)
    bound = state.trust_radius < RELEASE * own_length
    careful = care(state, bound)
    factor = jnp.clip(AIM * high * careful / jnp.maximum(r, 1e-9), SHORTEST_CUT, 1.0)
    cut = found.known & ~alarm & (r > high * careful)
    # What is too short to be seen is too short to do harm.
    grows = found.known & (found.slope < 0) & (r < low * careful)
    grows = (grows | found.blind) & ~alarm
    far_too_short = found.blind | (r < 0.1 * low * careful)
    growth = jnp.where(far_too_short, jnp.maximum(grow, FASTER), grow)
    may_grow = state.trust_radius < NEVER / growth
    longer = jnp.where(may_grow, state.trust_radius * growth, NEVER)
    radius = jnp.where(grows, longer, state.trust_radius)
    radius = jnp.where(cut, length * factor, radius)
    # Where no part may be taken, the length is not to blame, and the radius stays.
    radius = jnp.where(alarm & found.accepted, length * found.part, radius)
    radius = jnp.maximum(radius, 1e-30)
    factor = jnp.where(cut, factor, 1.0)
    cuts = count_if(cut | (alarm & found.accepted), state.trust_cuts)
    free = found.known & ~bound
    descends = found.known & (found.slope < 0)
    return (
        state._replace(
            trust_radius=radius,
            trust_ratio=jnp.clip(r, -LARGEST, LARGEST),
            trust_probes=state.trust_probes + found.looks,
            trust_cuts=cuts,
            mean_excess=excess * factor**2,
            mean_slope=slope * factor,
            probes_known=count_if(descends, state.probes_known),
            probes_bound=count_if(bound, state.probes_bound),
            probes_free=jnp.where(bound, 0, count_if(free, state.probes_free)),
        ),
        alarm,
    )


def numbers_of_trust(response_states) -> dict[str, jax.Array]:
    """What `metrics` shows of the first trust region among a guard's responses."""
    for state in response_states:
        if isinstance(state, TrustRegionState):
            # Bare arrays, where NNX has wrapped each in a variable.
            state = TrustRegionState(*jax.tree.leaves(state))
            radius = jnp.where(state.trust_radius < NEVER, state.trust_radius, jnp.inf)
            shown = {"trust_radius": radius}
            for name in ("ratio", "scale", "probes", "cuts"):
                shown[f"trust_{name}"] = getattr(state, f"trust_{name}")
            return shown
    return {}


def _bounded(number) -> jax.Array:
    return jnp.clip(number, -LARGEST, LARGEST)
