"""Norms of groups, and scales from one factor a group.

Whatever the granularity, the norms of a step are one vector with one number a group, so
that a thousand leaves cost as many kernels as one.
"""

import jax
import jax.numpy as jnp
import numpy as np

from .. import _trees
from .._norms import Measurement, measure, measure_parts
from .._scales import Scales
from ._groups import Grouping


def group_norms(grouping: Grouping, measured: Measurement, leaves) -> jax.Array:
    """Return the L2 norm of each group, float32 (groups,).

    The norm is nan or inf where the group is not finite.
    """
    if grouping.by_leaf:
        return jnp.sqrt(_squares_by_leaf(grouping, measured.leaf_squares))
    judged = [
        (leaf, axes)
        for leaf, axes, first in zip(leaves, grouping.axes, grouping.first, strict=True)
        if first is not None
    ]
    _, parts = measure_parts([x for x, _ in judged], [axes for _, axes in judged])
    return jnp.sqrt(_flat(parts))


def measure_groups(grouping: Grouping, tree) -> tuple[Measurement, jax.Array]:
    """Measure a tree and the norm of each group in one pass over each leaf."""
    leaves = _trees.inexact_leaves(tree)
    if grouping.by_leaf or not leaves:
        measured = measure(tree)
        return measured, group_norms(grouping, measured, leaves)
    measured, parts = measure_parts(leaves, grouping.axes)
    pairs = zip(parts, grouping.first, strict=True)
    flat = _flat([part for part, first in pairs if first is not None])
    return measured, jnp.sqrt(flat)


def scaled_groups_norm(
    grouping: Grouping, measured: Measurement, norms, factors
) -> jax.Array:
    """Return the norm of a tree after each group is multiplied by its factor."""
    squares = jnp.square(factors * norms)
    if grouping.by_leaf:
        scales = group_scales(grouping, factors)
        squares = jnp.square(scales.by_leaf) * measured.leaf_squares
        return jnp.sqrt(jnp.sum(squares))
    outside = np.flatnonzero([first is None for first in grouping.first])
    others = measured.leaf_squares[outside]
    return jnp.sqrt(jnp.sum(squares) + jnp.sum(others))


def group_scales(grouping: Grouping, factors: jax.Array) -> Scales:
    """Return the scales that multiply every group by its factor."""
    if grouping.whole:
        return Scales(factors[0])
    if grouping.leafwise:
        return Scales(factors)
    one = jnp.ones((), factors.dtype)
    if grouping.by_leaf:
        places = [0 if first is None else first + 1 for first in grouping.first]
        with_one = jnp.concatenate([one[None], factors])
        return Scales(with_one[np.array(places, np.int32)])
    spread = []
    for first, kept in zip(grouping.first, grouping.kept, strict=True):
        if first is None:
            spread.append(one)
        else:
            last = first + int(np.prod(kept, dtype=np.int64))
            spread.append(factors[first:last].reshape(kept))
    return Scales(jnp.ones((), jnp.float32), tuple(spread))


def _squares_by_leaf(grouping: Grouping, squares) -> jax.Array:
    """Add up the leaf sums of each group, (groups,)."""
    if grouping.whole:
        return jnp.sum(squares)[None]
    if grouping.leafwise:
        return squares
    labels = np.array([-1 if x is None else x for x in grouping.first], np.int32)
    member = labels[None, :] == np.arange(grouping.count, dtype=np.int32)[:, None]
    return jnp.sum(jnp.where(member, squares[None, :], 0.0), axis=1)


def _flat(parts) -> jax.Array:
    return jnp.concatenate([jnp.zeros((0,), jnp.float32), *map(jnp.ravel, parts)])
