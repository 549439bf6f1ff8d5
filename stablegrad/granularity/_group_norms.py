"""The norms of all groups as one vector, and its factors spread over the leaves."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import _norms, _trees
from .._norms import Measurement
from ._groups import Grouping


def group_norms(
    grouping: Grouping, measured: Measurement, leaves, over=_norms.norms_over
) -> jax.Array:
    """The L2 norm of each group, float32 (groups,); nan where a group is not finite.

    `over(leaves, axes)` computes the norms within leaves, as `norms_over` does.
    """
    if grouping.whole:
        return measured.norm[None]
    if grouping.leafwise:
        return measured.leaf_norms
    if grouping.axes is None:
        return _norms_by_label(measured.leaf_norms, grouping)
    pairs = [(leaves[i], grouping.axes[i]) for i in grouping.members]
    return _flat(over([leaf for leaf, _ in pairs], [axes for _, axes in pairs]))


def measure_groups(grouping: Grouping, tree) -> tuple[Measurement, jax.Array]:
    """A tree's measurement and the norm of each group, in one pass over each leaf."""
    leaves = _trees.inexact_leaves(tree)
    if grouping.axes is None or not leaves:
        measured = _norms.measure(tree)
        return measured, group_norms(grouping, measured, leaves)
    measured, parts = _norms.measure_parts(leaves, grouping.axes)
    return measured, _flat([parts[i] for i in grouping.members])


def scaled_groups_norm(
    grouping: Grouping, measured: Measurement, norms, factors
) -> jax.Array:
    """The norm of a tree after each group is multiplied by its factor."""
    if grouping.whole:
        return factors[0] * measured.norm
    if grouping.axes is None:
        scaled = leaf_factors(grouping, factors) * measured.leaf_norms
        return _norms.norm_of_norms(scaled)
    outside = [i for i, first in enumerate(grouping.first) if first is None]
    others = measured.leaf_norms[np.array(outside, np.int32)]
    return _norms.norm_of_norms(jnp.concatenate([factors * norms, others]))


def leaf_factors(grouping: Grouping, factors) -> Any:
    """Factors (groups,) as `scale_leaves` takes them; 1 for a leaf without a group."""
    if grouping.whole:
        return factors[0]
    if grouping.leafwise:
        return factors
    one = jnp.ones((), factors.dtype)
    if grouping.axes is None:
        places = [grouping.count if i is None else i for i in grouping.first]
        return jnp.append(factors, one)[np.array(places, np.int32)]
    return tuple(
        one if i is None else factors[i : i + math.prod(shape)].reshape(shape)
        for i, shape in zip(grouping.first, grouping.shapes, strict=True)
    )


def _flat(parts) -> jax.Array:
    return jnp.concatenate([jnp.zeros((0,), jnp.float32), *map(jnp.ravel, parts)])


def _norms_by_label(norms, grouping: Grouping) -> jax.Array:
    """Norms of groups of leaves, each scaled by its largest so that none overflows."""
    members = np.array(grouping.members, np.int32)
    label = np.array([grouping.first[i] for i in members], np.int32)
    norms = norms[members]
    known = jnp.where(jnp.isfinite(norms), norms, 0.0)
    peak = jax.ops.segment_max(known, label, grouping.count)
    peak = jnp.where(peak > 0, peak, 1.0)
    total = jax.ops.segment_sum(jnp.square(norms / peak[label]), label, grouping.count)
    found = jnp.minimum(peak * jnp.sqrt(total), _norms.LARGEST)
    return jnp.where(jnp.isfinite(total), found, jnp.nan)
