"""Putting carried arrays into a guard's fresh state, snapshots included."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from .. import _trees
from .._packing import Packed
from .._placing import placed_like
from ..engine._step import GuardState, is_guard
from ..responses.roll_back._snapshots import unnamed

# A guard's fresh state -> the same with its numbers, without the inner state.
Refill = Callable[[GuardState], GuardState]


def rebuilt(fresh: Any, unguarded: Any, refill: Refill, params: Any) -> Any:
    """Return a fresh state with the arrays of the same state without guards.

    Args:
        fresh: A state from `init`, with guards anywhere.
        unguarded: What `unwrap` would return of it, with other arrays.
        refill: Fills each guard, an outer one before an inner one.
        params: The state is placed on their devices.
    """
    leaves = iter(jax.tree.leaves(unguarded))
    return placed_like(_put(fresh, leaves, refill), params)


def _put(fresh: Any, leaves: Iterator, refill: Refill) -> Any:
    def put(node):
        if not is_guard(node):
            return next(leaves)
        refilled = refill(node)
        inner = _put(node.guarded_inner, leaves, refill)
        kept = tuple(_snapshot(x, inner, refilled.numbers) for x in node.snapshots)
        return refilled._replace(guarded_inner=inner, snapshots=kept)

    return jax.tree.map(put, fresh, is_leaf=is_guard)


def _snapshot(fresh, inner, numbers: Packed):
    """Return a snapshot of the present, in new buffers, placed as the fresh one is."""
    # The statistics are the last of the numbers.
    by_dtype = {array.dtype: array for array in numbers}
    statistics = tuple(
        by_dtype[own.dtype][..., by_dtype[own.dtype].shape[-1] - own.shape[-1] :]
        for own in fresh.statistics
    )
    now = unnamed(fresh._replace(guarded_inner=inner, statistics=statistics))

    def place(new, old):
        new = jnp.array(new)
        traced = isinstance(old, Tracer) or isinstance(new, Tracer)
        # Committed snapshots beside uncommitted parameters would compile a step anew.
        return new if traced or not old.committed else jax.device_put(new, old.sharding)

    return jax.tree.map(place, now, fresh)


def require_finite(asker: str, params: Any) -> None:
    """Raise ValueError, naming the leaf, if a parameter is not finite."""
    for path, leaf in _trees.paths_and_leaves(params):
        if not isinstance(leaf, Tracer) and not np.isfinite(np.asarray(leaf)).all():
            raise ValueError(
                f"`{asker}` got parameters that are not finite: leaf "
                f"{_trees.path_name(path)}. Restore an earlier checkpoint."
            )
