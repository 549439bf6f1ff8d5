"""The ranges of an optimizer's state and of the parameters, carried from step to step.

They are numbers of the guard's own state, one pair for each kind of leaf. A step that
was shown to stay finite moves them by the same arithmetic; one that had to be inspected
sets them to what was found.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from .._norms import LARGEST
from ._range import Range


class Ranges(NamedTuple):
    """State: for each kind, bounds of all elements; the largest float32 if unknown."""

    least: jax.Array  # float32 (kinds,)
    most: jax.Array  # float32 (kinds,)


def unknown(count: int | None = None) -> Ranges:
    """Nothing known of any kind; without a count, of rank 0 and not in use."""
    most = jnp.full(() if count is None else (count,), LARGEST, jnp.float32)
    return Ranges(-most, most)


def by_kind(ranges: Ranges, count: int) -> list[Range]:
    """One range a kind."""
    return [Range(ranges.least[i], ranges.most[i]) for i in range(count)]


def stacked(ranges: list[Range]) -> Ranges:
    """Undoes `by_kind`; what is not finite is unknown."""
    least = jnp.stack([x.lo for x in ranges])
    most = jnp.stack([x.hi for x in ranges])
    known = jnp.isfinite(least) & jnp.isfinite(most)
    return Ranges(jnp.where(known, least, -LARGEST), jnp.where(known, most, LARGEST))
