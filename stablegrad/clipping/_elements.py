"""Clips of single elements: their limits, and what is done only where needed."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .. import _trees
from .._norms import Measurement, measure
from .._platform import cond_on_cpu
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
    """Clamp every floating-point leaf to the magnitudes in `bounds`."""
    return _trees.map_inexact(clamp_leaf, updates, updates, bounds)


def clamp_leaf(leaf, bound) -> jax.Array:
    """Clamp each element to a magnitude, float32 and >= 0; keep its sign or phase.

    A nan stays, also in the bound, which is then no limit.
    """
    wide = leaf.astype(np.promote_types(np.float32, leaf.dtype))
    size = jnp.abs(wide)
    bound = bound.astype(size.dtype)
    if jnp.iscomplexobj(leaf):
        clamped = jnp.sign(wide) * bound
    else:
        clamped = jnp.where(wide < 0, -bound, bound)
    return jnp.where(size > bound, clamped, wide).astype(leaf.dtype)


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
    pairs = zip(
        _trees.inexact_leaves(updates),
        _trees.inexact_leaves(largest_squares, updates),
        strict=True,
    )
    # Counts are integers, whose sum is vectorized.
    counts = [
        jnp.sum(squares(leaf) > limit, dtype=np.int32) > 0 for leaf, limit in pairs
    ]
    return functools.reduce(jnp.logical_or, counts, jnp.zeros((), bool))


def squares_after(measured: Measurement, changed, clipped: Callable) -> jax.Array:
    """Return the sum of squares of each leaf of `clipped()`, float32 (leaves,).

    They are those in `measured` unless `changed`; a CPU then computes nothing.
    """
    return cond_on_cpu(
        changed, lambda: measure(clipped()).leaf_squares, lambda: measured.leaf_squares
    )


def changed_or_same(updates, changed, clipped: Callable):
    """Return `clipped()`, or the updates unless `changed`; a CPU then only copies."""
    return cond_on_cpu(changed, clipped, lambda: updates)
