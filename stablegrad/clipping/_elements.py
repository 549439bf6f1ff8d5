"""Clips of single elements: sizes, limits and clamping, leaf by leaf."""

import jax
import jax.numpy as jnp
import numpy as np

from .. import _trees
from .._scales import Scales


def leaf_maxima(tree, leaf_squares) -> jax.Array:
    """Return the largest magnitude in each leaf, float32 (leaves,); nan where one is.

    A maximum may lose a nan on a CPU, which the leaf's sum of squares does not.
    """
    leaves = _trees.inexact_leaves(tree)
    if not leaves:
        return jnp.zeros((0,), jnp.float32)
    sizes = [_largest(leaf).astype(jnp.float32) for leaf in leaves]
    return jnp.where(jnp.isnan(leaf_squares), jnp.nan, jnp.stack(sizes))


def _largest(leaf) -> jax.Array:
    """Return the largest magnitude; not by `abs`, which a CPU would write to memory."""
    if jnp.iscomplexobj(leaf):
        return jnp.max(jnp.abs(leaf), initial=0)
    return jnp.maximum(jnp.max(leaf, initial=0), -jnp.min(leaf, initial=0))


def sizes(leaf) -> jax.Array:
    """Return |x| in float32."""
    return jnp.abs(leaf).astype(jnp.float32)


def clamp(updates, bounds):
    """Clamp each element to the magnitude in `bounds`, >= 0; keep its sign or phase.

    A nan stays, also in the bound, which is then no limit.
    """

    def clamped(leaf, bound) -> jax.Array:
        wide = leaf.astype(np.promote_types(np.float32, leaf.dtype))
        size = jnp.abs(wide)
        bound = bound.astype(size.dtype)
        if jnp.iscomplexobj(leaf):
            edge = jnp.sign(wide) * bound
        else:
            edge = jnp.where(wide < 0, -bound, bound)
        return jnp.where(size > bound, edge, wide).astype(leaf.dtype)

    return _trees.map_inexact(clamped, updates, updates, bounds)


def per_leaf(numbers: jax.Array, like):
    """Return one number of a vector for each floating-point leaf, as a pytree."""
    rows = iter(Scales(numbers).factors(numbers.shape[0]))
    return _trees.map_inexact(lambda leaf: next(rows), like, like)


def scale_above(updates, limits: jax.Array, factors: jax.Array):
    """Multiply the elements above their leaf's limit by the leaf's factor."""

    def scaled(leaf, limit, factor):
        wide = leaf.astype(np.promote_types(np.float32, leaf.dtype))
        size = jnp.abs(wide)
        shrunk = wide * factor.astype(wide.dtype)
        above = size > limit.astype(size.dtype)
        return jnp.where(above, shrunk, wide).astype(leaf.dtype)

    return _trees.map_inexact(
        scaled, updates, updates, per_leaf(limits, updates), per_leaf(factors, updates)
    )


def largest_ratios(updates, usual) -> jax.Array:
    """Return the largest |g| / usual in each leaf, float32 (leaves,)."""
    leaves = _trees.inexact_leaves(updates)
    usual = _trees.inexact_leaves(usual, updates)
    # Compared by leaf: an array of flags would cost a CPU more than the division.
    ratios = [
        jnp.max(sizes(leaf) / own, initial=0)
        for leaf, own in zip(leaves, usual, strict=True)
    ]
    return jnp.stack(ratios) if ratios else jnp.zeros((0,), jnp.float32)
