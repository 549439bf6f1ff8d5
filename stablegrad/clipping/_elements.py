"""Clips of single elements: sizes, limits and clamping, leaf by leaf."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .. import _trees
from .._scales import Scales


def leaf_maxima(tree) -> jax.Array:
    """Return the largest magnitude in each leaf, float32 (leaves,); nan where one is.

    The bits of nonnegative floats are ordered as the floats are, with nan above inf. A
    maximum of integers is vectorized, and does not lose a nan.
    """
    leaves = _trees.inexact_leaves(tree)
    if not leaves:
        return jnp.zeros((0,), jnp.float32)
    sizes = [jnp.abs(leaf).astype(jnp.float32) for leaf in leaves]
    bits = [lax.bitcast_convert_type(size, np.int32) for size in sizes]
    largest = jnp.stack([jnp.max(x, initial=0) for x in bits])
    return lax.bitcast_convert_type(largest, np.float32)


def squares(leaf) -> jax.Array:
    """Return |x|^2 in float32."""
    return jnp.square(jnp.abs(leaf).astype(jnp.float32))


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


def any_above(updates, largest_squares) -> jax.Array:
    """Return whether the square of any element exceeds its limit."""
    leaves = _trees.inexact_leaves(updates)
    limits = _trees.inexact_leaves(largest_squares, updates)
    # Counts are integers, whose sum is vectorized.
    counts = [
        jnp.sum(squares(leaf) > limit, dtype=np.int32) > 0
        for leaf, limit in zip(leaves, limits, strict=True)
    ]
    return functools.reduce(jnp.logical_or, counts, jnp.zeros((), bool))
