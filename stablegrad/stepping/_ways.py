"""Which way a step is taken."""

import jax
import numpy as np

from .._mapped_axes import Across
from ..bounds._kinds import layout_of
from ..bounds._ranges import Ranges, unknown
from ._checked import checked_step
from ._core import Situation, Taken
from ._proven import proven_step

SMALL = 65_536  # Elements up to which every step is checked in all of them.


def init_ranges(inner_state, params, exact: bool | None, over: Across) -> Ranges:
    """What the steps will carry along, without an axis if every one is checked."""
    if exact is None:
        leaves = jax.tree.leaves(params)
        shards = zip(leaves, over.shards(leaves), strict=True)
        exact = sum(np.size(leaf) * count for leaf, count in shards) <= SMALL
    return unknown(None if exact else layout_of(inner_state, params).kinds)


def take_step(now: Situation, updates, inner_state, params, ranges: Ranges) -> Taken:
    """Takes a step in place where it can be shown to be safe, else checks it after."""
    if ranges.least.ndim:
        taken = proven_step(now, updates, inner_state, params, ranges)
        if taken is not None:
            return taken
    forgotten = unknown(*ranges.least.shape)
    return checked_step(now, updates, inner_state, params, forgotten)
