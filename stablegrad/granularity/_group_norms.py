"""The norms of groups, and back from one number a group to the leaves.

Whatever the granularity, the norms of a step are one vector with one number a group,
so that a thousand leaves cost one small kernel.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import _trees
from .._norms import Measurement, measure, measure_parts, norm_of_norms, norms_over
from ._groups import Grouping


def group_norms(
    grouping: Grouping, measured: Measurement, leaves, over=norms_over
) -> jax.Array:
    """The L2 norm of each group, float32 (groups,); nan where the group is not finite.

    `over` takes the norms within leaves, as `norms_over` does.
    """
    norms = measured.leaf_norms
    if grouping.whole:
        return measured.norm[None]
    if grouping.leafwise:
        return norms
    if not grouping.by_leaf:
        judged = [
            (leaf, axes)
            for leaf, axes, first in zip(
                leaves, grouping.axes, grouping.first, strict=True
            )
            if first is not None
        ]
        parts = over([leaf for leaf, _ in judged], [axes for _, axes in judged])
        return _flat(parts)
    return _norms_by_label(norms, grouping)


def measure_groups(grouping: Grouping, tree) -> tuple[Measurement, jax.Array]:
    """A tree's measurement and the norm of each group, from one pass over each leaf."""
    leaves = _trees.inexact_leaves(tree)
    if grouping.by_leaf or not leaves:
        measured = measure(tree)
        return measured, group_norms(grouping, measured, leaves)
    measured, parts = measure_parts(leaves, grouping.axes)
    pairs = zip(parts, grouping.first, strict=True)
    return measured, _flat([part for part, first in pairs if first is not None])


def scaled_groups_norm(
    grouping: Grouping, measured: Measurement, norms, factors
) -> jax.Array:
    """The norm of a tree after each group is multiplied by its factor."""
    if grouping.whole:
        return factors[0] * measured.norm
    if grouping.leafwise:
        return norm_of_norms(factors * norms)
    scales = leaf_factors(grouping, factors)
    if grouping.by_leaf:
        return norm_of_norms(scales * measured.leaf_norms)
    outside = [first is None for first in grouping.first]
    others = measured.leaf_norms[np.flatnonzero(outside)]
    return norm_of_norms(jnp.concatenate([factors * norms, others]))


def leaf_factors(grouping: Grouping, factors) -> Any:
    """Factors (groups,) as `scale_leaves` takes them: (), (leaves,), or a tuple."""
    if grouping.whole:
        return factors[0]
    if grouping.leafwise:
        return factors
    if grouping.by_leaf:
        places = [0 if first is None else first + 1 for first in grouping.first]
        with_one = jnp.concatenate([jnp.ones((1,), factors.dtype), factors])
        return with_one[np.array(places, np.int32)]
    spread = []
    for first, kept in zip(grouping.first, grouping.kept, strict=True):
        if first is None:
            spread.append(jnp.ones((), factors.dtype))
        else:
            last = first + int(np.prod(kept, dtype=np.int64))
            spread.append(factors[first:last].reshape(kept))
    return tuple(spread)


def _flat(parts) -> jax.Array:
    return jnp.concatenate([jnp.zeros((0,), jnp.float32), *map(jnp.ravel, parts)])


def _norms_by_label(norms, grouping: Grouping) -> jax.Array:
    """Norms of groups of leaves, each with its own unit so that none overflows."""
    members = [i for i, first in enumerate(grouping.first) if first is not None]
    label = np.array([grouping.first[i] for i in members], np.int32)
    norms = norms[np.array(members, np.int32)]
    finite = jnp.isfinite(norms)
    known = jnp.where(finite, norms, 0.0)
    unit = jax.ops.segment_max(known, label, grouping.count)
    unit = jnp.where(unit > 0, unit, 1.0)
    total = jax.ops.segment_sum(jnp.square(known / unit[label]), label, grouping.count)
    bad = jax.ops.segment_sum((~finite).astype(jnp.int32), label, grouping.count)
    largest = float(np.finfo(np.float32).max)
    return jnp.where(bad > 0, jnp.nan, jnp.minimum(unit * jnp.sqrt(total), largest))
