"""Norms of groups, and scales from one factor a group.

Whatever the granularity, the norms of a step are one vector with one number a group, so
that a thousand leaves cost as many kernels as one.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from .. import _trees
from .._norms import Measurement, measure, measure_parts, root
from .._scales import Scales
from ._groups import Grouping


def group_norms(grouping: Grouping, measured: Measurement, leaves) -> jax.Array:
    """Return the L2 norm of each group, float32 (groups,).

    The norm is nan or inf where the group is not finite.
    """
    if grouping.axes is None:
        return root(sums_by_group(grouping, measured.leaf_squares))
    pairs = [(leaves[i], grouping.axes[i]) for i in grouping.members]
    _, parts = measure_parts([leaf for leaf, _ in pairs], [axes for _, axes in pairs])
    return root(_flat(parts))


def measure_groups(grouping: Grouping, tree) -> tuple[Measurement, jax.Array]:
    """Measure a tree and the norm of each group in one pass over each leaf."""
    leaves = _trees.inexact_leaves(tree)
    if grouping.axes is None or not leaves:
        measured = measure(tree)
        return measured, group_norms(grouping, measured, leaves)
    measured, parts = measure_parts(leaves, grouping.axes)
    return measured, root(_flat([parts[i] for i in grouping.members]))


def scaled_groups_norm(
    grouping: Grouping, measured: Measurement, norms, factors
) -> jax.Array:
    """Return the norm of a tree after each group is multiplied by its factor."""
    if grouping.axes is None:
        factors = group_scales(grouping, factors).by_leaf
        return root(jnp.sum(jnp.square(factors) * measured.leaf_squares))
    outside = [i for i, first in enumerate(grouping.first) if first is None]
    others = measured.leaf_squares[np.array(outside, np.int32)]
    return root(jnp.sum(jnp.square(factors * norms)) + jnp.sum(others))


def group_scales(grouping: Grouping, factors: jax.Array) -> Scales:
    """Return the scales that multiply every group by its factor."""
    if grouping.whole:
        return Scales(factors[0])
    if grouping.leafwise:
        return Scales(factors)
    one = jnp.ones((), factors.dtype)
    if grouping.axes is None:
        places = [grouping.count if i is None else i for i in grouping.first]
        return Scales(jnp.append(factors, one)[np.array(places, np.int32)])
    parts = tuple(
        one if i is None else factors[i : i + math.prod(shape)].reshape(shape)
        for i, shape in zip(grouping.first, grouping.shapes, strict=True)
    )
    return Scales(jnp.ones((), jnp.float32), parts)


def sums_by_group(grouping: Grouping, by_leaf) -> jax.Array:
    """Add up one number of each leaf over each group, (groups,)."""
    if grouping.whole:
        return jnp.sum(by_leaf)[None]
    if grouping.leafwise:
        return by_leaf
    labels = np.array([-1 if x is None else x for x in grouping.first], np.int32)
    member = labels[None, :] == np.arange(grouping.count, dtype=np.int32)[:, None]
    return jnp.sum(jnp.where(member, by_leaf[None, :], 0.0), axis=1)


def _flat(parts) -> jax.Array:
    flat = [jnp.ravel(_whole(part)) for part in parts]
    return jnp.concatenate([jnp.zeros((0,), jnp.float32), *flat])


def _whole(part) -> jax.Array:
    """Return an array that every device has whole; on explicit axes it may be split."""
    given = jax.typeof(part).sharding
    if all(axis is None for axis in given.spec):
        return part
    return jax.sharding.reshard(part, NamedSharding(given.mesh, PartitionSpec()))
