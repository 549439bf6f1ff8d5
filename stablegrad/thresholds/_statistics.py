"""Running statistics that no outlier poisons, masks behind, or locks in.

Every state here is a NamedTuple of arrays whose leading axis is the group (the whole
tree, or one leaf), so that a thousand leaves cost one small kernel.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

# Turns a median absolute deviation into the standard deviation of a normal law.
MAD_TO_STD = 1.4826
# Residuals enter at no more than this many spreads: far enough out to leave a normal
# law's spread within 2 % of the truth, and to let the spread grow at every outlier.
WINSOR = 2.5
# Keeps squares and differences of any two values inside float32.
BOUND = 1e37


class Run(NamedTuple):
    """Consecutive exceedances, per group: what ends lock-in."""

    run_length: jax.Array  # int32 (groups,), in [0, patience].
    run_lowest: jax.Array  # float32 (groups,): smallest value of the current run.


def init_run(groups: int) -> Run:
    """No exceedance yet."""
    return Run(jnp.zeros((groups,), jnp.int32), jnp.zeros((groups,), jnp.float32))


def extend_run(run: Run, value, exceeded, patience) -> Run:
    """Counts one more step."""
    lowest = jnp.minimum(value, jnp.where(run.run_length > 0, run.run_lowest, value))
    length = jnp.minimum(run.run_length + 1, patience).astype(jnp.int32)
    return Run(jnp.where(exceeded, length, 0), lowest)


def rebased(center, run: Run, patience) -> jax.Array:
    """The level, moved half of the way to a run that has lasted `patience` steps.

    Half at every further exceedance, not all at once: what the limit held back is let
    go by degrees. To its smallest value, because the rest may be outliers of it.
    """
    return jnp.where(
        run.run_length >= patience, center + (run.run_lowest - center) / 2, center
    )


def median(values, seen) -> jax.Array:
    """Median over the last axis of the first `seen` entries of each group."""
    width = values.shape[-1]
    valid = jnp.arange(width)[None, :] < seen[:, None]
    ordered = jnp.sort(jnp.where(valid, values, jnp.inf), axis=-1)
    last = jnp.maximum(jnp.minimum(seen, width) - 1, 0)
    low = jnp.take_along_axis(ordered, (last // 2)[:, None], axis=-1)[:, 0]
    high = jnp.take_along_axis(ordered, ((last + 1) // 2)[:, None], axis=-1)[:, 0]
    return jnp.where(seen > 0, low + (high - low) / 2, 0.0)


def median_and_spread(values, seen) -> tuple[jax.Array, jax.Array]:
    """Median and normalised median absolute deviation: half the entries may lie."""
    center = median(values, seen)
    return center, MAD_TO_STD * median(jnp.abs(values - center[:, None]), seen)


def floored(spread, center, relative, in_log) -> jax.Array:
    """A spread is never zero: at least `relative` of the level it is a spread of."""
    level = 1.0 if in_log else jnp.abs(center)
    return jnp.maximum(spread, jnp.maximum(relative * level, 1e-12))


def to_scale(signal, in_log) -> jax.Array:
    """The scale on which a signal is close to normal: norms are close to lognormal."""
    bounded = jnp.clip(signal, -BOUND, BOUND)
    return jnp.log(jnp.maximum(bounded, 1e-30)) if in_log else bounded


def from_scale(value, in_log) -> jax.Array:
    return jnp.exp(value) if in_log else value


def write(buffer, slot, value) -> jax.Array:
    """Writes one value a group at `slot`; a slot beyond the width writes nothing."""
    at = jnp.arange(buffer.shape[-1])[None, :] == slot[:, None]
    return jnp.where(at, value[:, None], buffer)


def where_groups(mask, on_true, on_false):
    """Leafwise `where` with one decision a group, over the leading axis."""

    def choose(new, old):
        return jnp.where(mask.reshape(mask.shape + (1,) * (old.ndim - 1)), new, old)

    return jax.tree.map(choose, on_true, on_false)


def per_group(warming, warm_up, track, *operands):
    """`warm_up` for the groups that are warming, `track` for the others.

    Warming sorts, so it runs only while a group needs it.
    """

    def mixed(*operands):
        return where_groups(warming, warm_up(*operands), track(*operands))

    return lax.cond(jnp.any(warming), mixed, track, *operands)
