"""Running statistics that single outliers do not distort.

Every state here is a NamedTuple of arrays whose leading axis is the group, so that a
thousand leaves cost as many kernels as one. Further axes, such as the scales of
`zscore`, follow.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .._norms import LARGEST
from .._platform import cond_on_cpu
from .._trees import increment

# Turns a median absolute deviation into the standard deviation of a normal law.
MAD_TO_STD = 1.4826
# Residuals enter at no more than this many spreads: far enough out to keep most of a
# normal law, and to let the spread grow at every outlier.
WINSOR = 2.5
# Makes up for what bounded and left-out residuals take from a normal law's variance.
CONSISTENCY = 1.06
# While a statistic of norms warms up, its spread counts as no less than this, in log
# units: a factor of e per deviation, which healthy first steps stay well below.
EARLY_SPREAD = 1.0
# The longest rows whose quantiles are found without a sort.
RANKED = 64
# Keeps squares and differences of any two values inside float32.
BOUND = 1e37


class Recent(NamedTuple):
    """The last values of each group, and how long they have all been on one side.

    A statistic starts from them, and starts again from them where the signal has moved
    for good: this ends lock-in.
    """

    recent_values: jax.Array  # float32 (groups, ..., width): a ring of values.
    finite_seen: jax.Array  # int32 (groups, ...): finite steps so far, saturating.
    outside_run: jax.Array  # int32: steps in a row above normal, or minus those below.


def init_recent(shape: tuple[int, ...], width: int) -> Recent:
    """Return the state before the first value."""
    none = jnp.zeros(shape, jnp.int32)
    return Recent(jnp.zeros((*shape, width), jnp.float32), none, none)


def remember(recent: Recent, value, above, below, patience: int, like):
    """Remember one more value, which lay above what is normal, below, or neither.

    Returns the new `Recent`; which groups have been on one side for `patience` steps;
    and the median and spread of what is remembered, or `like` if no group needs them.
    """
    run = recent.outside_run
    longer = jnp.where(above, jnp.maximum(run, 0) + 1, jnp.minimum(run, 0) - 1)
    longer = jnp.clip(longer, -patience, patience)
    width = recent.recent_values.shape[-1]
    fresh = Recent(
        write(recent.recent_values, recent.finite_seen % width, value),
        increment(recent.finite_seen),
        jnp.where(above | below, longer, 0),
    )
    moved = jnp.abs(fresh.outside_run) >= patience
    # A CPU sorts only while a group needs it.
    level, spread = cond_on_cpu(
        jnp.any(moved | warming(recent)),
        lambda: median_and_spread(fresh.recent_values, fresh.finite_seen),
        lambda: like,
    )
    return fresh, moved, level, spread


def in_order(recent: Recent) -> jax.Array:
    """Return the remembered values of a full ring, oldest first."""
    width = recent.recent_values.shape[-1]
    place = jnp.arange(width, dtype=jnp.int32)
    place = (recent.finite_seen[:, None] + place[None, :]) % width
    return jnp.take_along_axis(recent.recent_values, place, axis=-1)


def warming(recent: Recent) -> jax.Array:
    """Return which groups have not yet filled their ring."""
    return recent.finite_seen < recent.recent_values.shape[-1]


def follow(center, level, reach) -> jax.Array:
    """Move half of the way to a level, or all of it where that is near.

    The limit follows by degrees, so that it does not let go all at once of what it held
    back. Near is within twice the reach.
    """
    near = jnp.abs(level - center) <= 2 * reach
    return jnp.where(near, level, center + (level - center) / 2)


def quantiles(values, seen, *fractions) -> tuple[jax.Array, ...]:
    """Return quantiles over the last axis of the first `seen` entries.

    Linearly interpolated between the two nearest entries; zero where none is seen.
    """
    width = values.shape[-1]
    place = lax.broadcasted_iota(np.int32, values.shape, values.ndim - 1)
    known = jnp.where(place < seen[..., None], values, LARGEST)
    # The place of each entry in sorted order. Short rows are ranked by comparison,
    # which is one kernel where a sort is several.
    if width <= RANKED:
        rank, ordered = _ranks(known), known
    else:
        rank, ordered = place, jnp.sort(known, axis=-1)
    last = jnp.maximum(jnp.minimum(seen, width) - 1, 0)
    found = []
    for fraction in fractions:
        target = last.astype(jnp.float32) * fraction
        distance = jnp.abs(rank.astype(jnp.float32) - target[..., None])
        weight = jnp.maximum(1 - distance, 0.0)  # Of the two nearest entries.
        value = jnp.sum(weight * ordered, axis=-1)
        found.append(jnp.where(seen > 0, value, 0.0).astype(values.dtype))
    return tuple(found)


def _ranks(values) -> jax.Array:
    """Return the place of each entry in a stable sort."""
    own, other = values[..., :, None], values[..., None, :]
    square = (*values.shape, values.shape[-1])
    place = lax.broadcasted_iota(np.int32, square, values.ndim - 1)
    earlier = lax.broadcasted_iota(np.int32, square, values.ndim) < place
    return jnp.sum((other < own) | ((other == own) & earlier), axis=-1, dtype=np.int32)


def median(values, seen) -> jax.Array:
    """Return the median of the first `seen` entries of each group."""
    return quantiles(values, seen, 0.5)[0]


def median_and_spread(values, seen) -> tuple[jax.Array, jax.Array]:
    """Return median and normalised median absolute deviation.

    Up to half of the entries may be outliers.
    """
    center = median(values, seen)
    return center, MAD_TO_STD * median(jnp.abs(values - center[..., None]), seen)


def floored(spread, center, relative, in_log) -> jax.Array:
    """Return the spread, or `relative` of the level if that is larger."""
    level = jnp.where(in_log, 1.0, jnp.abs(center))
    least = jnp.maximum(relative * level, 1e-30)
    return jnp.maximum(spread, least).astype(spread.dtype)


def to_scale(signal, in_log) -> jax.Array:
    """Return a signal on the scale where it is close to normal."""
    bounded = jnp.clip(signal, -BOUND, BOUND)
    return jnp.log(jnp.maximum(bounded, 1e-30)) if in_log else bounded


def from_scale(value, in_log) -> jax.Array:
    return jnp.exp(value) if in_log else value


def early_limit(seen, center, spread, deviations) -> jax.Array:
    """Return a wide limit on norms, for few values seen on the log scale."""
    wide = jnp.exp(center + deviations * jnp.maximum(spread, EARLY_SPREAD))
    return jnp.where(seen > 0, wide, jnp.inf)


def write(buffer, slot, value) -> jax.Array:
    """Write one value a group at `slot`; a slot beyond the width writes nothing."""
    place = lax.broadcasted_iota(np.int32, buffer.shape, buffer.ndim - 1)
    return jnp.where(place == slot[..., None], value[..., None], buffer)


def where_groups(mask, on_true, on_false):
    """Leafwise `where` with one decision a group, over the leading axis."""

    def choose(new, old):
        return jnp.where(mask.reshape(mask.shape + (1,) * (old.ndim - 1)), new, old)

    return jax.tree.map(choose, on_true, on_false)
