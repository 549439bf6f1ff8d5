"""A look at every element that a step would write, without writing any.

For the steps that no proof covers: what the optimizer gives is computed and summed up
on the way, leaf by leaf, so that nothing of the size of a parameter is stored.
"""

from collections.abc import Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .. import _trees
from .._mapped_axes import Across
from .._together import reduce_together
from ..bounds._kinds import Layout, collect
from ..bounds._range import Range
from ..bounds._ranges import Ranges, by_kind, stacked


class Inspection(NamedTuple):
    """What a step would do."""

    first_bad_leaf: jax.Array  # int32: first leaf of a non-finite update, or -1.
    state_breaks: jax.Array  # bool: whether what was finite in the state no longer is.
    params_break: jax.Array  # bool: the same of the parameters.
    ranges: Ranges  # Of state and parameters after the step.


class _Array(NamedTuple):
    """One array that a step gives."""

    after: jax.Array
    before: Any  # What it replaces, None for an update.
    kind: int | None
    owner: Hashable  # Arrays of one owner and shape are summed up together.


class _Sums(NamedTuple):
    """Rank 0."""

    bad: jax.Array  # int32: elements not finite that were, or that are new.
    least: jax.Array  # float32
    most: jax.Array  # float32


def inspect(
    layout: Layout,
    ranges: Ranges,
    updates,
    new: tuple[Any, Any, Any],
    old: tuple[Any, Any],
    over: Across,
) -> Inspection:
    """Sums up `new`, (update, state, parameters or None), beside `old`, the last two.

    `updates` says which leaves count.
    """
    update, new_state, new_params = new
    state, params = old
    counts = [_trees.is_inexact(leaf) for leaf in jax.tree.leaves(updates)]
    of_update = [
        _Array(leaf, None, None, i)
        for i, leaf in enumerate(jax.tree.leaves(update))
        if counts[i]
    ]
    of_state = [
        _Array(after, before, kind, owner)
        for after, before, kind, owner in zip(
            jax.tree.leaves(new_state),
            jax.tree.leaves(state),
            layout.of_state,
            layout.owners,
            strict=True,
        )
        if _trees.is_inexact(before)
    ]
    of_params = []
    if params is not None:
        triples = zip(
            jax.tree.leaves(new_params),
            jax.tree.leaves(params),
            layout.of_params,
            strict=True,
        )
        of_params = [
            _Array(after, before, kind, i)
            for i, (after, before, kind) in enumerate(triples)
            if counts[i]
        ]
    arrays = [*of_update, *of_state, *of_params]
    sums = _sums(arrays)
    flags = over.any(jnp.stack([x.bad > 0 for x in sums]))
    first, second = len(of_update), len(of_update) + len(of_state)
    wrong = flags[:first]
    found = [
        (array.kind, Range(x.least, x.most))
        for array, x in zip(arrays, sums, strict=True)
        if array.kind is not None
    ]
    after = stacked(collect(found, by_kind(ranges, layout.kinds)))
    return Inspection(
        jnp.where(jnp.any(wrong), jnp.argmax(wrong), -1).astype(jnp.int32),
        jnp.any(flags[first:second]),
        jnp.any(flags[second:]),
        Ranges(-over.largest(-after.least), over.largest(after.most)),
    )


def _sums(arrays: list[_Array]) -> list[_Sums]:
    groups: dict[Any, list[int]] = {}
    for i, array in enumerate(arrays):
        groups.setdefault((array.owner, array.after.shape), []).append(i)
    found: list[Any] = [None] * len(arrays)
    for members in groups.values():
        own = _sums_of([arrays[i] for i in members])
        for i, sums in zip(members, own, strict=True):
            found[i] = sums
    return found


def _sums_of(arrays: list[_Array]) -> list[_Sums]:
    """Of arrays of one shape, in one reduction: what they share is computed once."""
    columns = []
    for after, before, _, _ in arrays:
        finite = jnp.isfinite(after)
        bad = ~finite if before is None else jnp.isfinite(before) & ~finite
        # An inf that stays has no range; a maximum may lose a nan, but no inf.
        wide = jnp.where(finite, jnp.real(after).astype(jnp.float32), jnp.inf)
        columns += [bad.astype(jnp.int32), wide, wide]
    sums = reduce_together(columns, ("sum", "min", "max") * len(arrays))
    return [_Sums(*sums[i : i + 3]) for i in range(0, len(sums), 3)]
