"""The measurement: one float32 sum of squares a leaf, and what follows from it.

    n_i = sqrt(sum |x|^2) over leaf i;    n = sqrt(sum_i n_i^2)

One pass over the leaves and no condition. A finite sum of squares shows that every
element is finite. A norm of `OVERFLOW` or more counts as overflow, so no later square
of a measured number can overflow. Norms below about 1e-19 count as zero.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import _trees
from ._leaf_sums import leaf_sums
from ._mapped_axes import LOCAL, MappedAxes

LARGEST = float(np.finfo(np.float32).max)
OVERFLOW = 1e18  # The smallest norm that is refused as an overflow.


@jax.custom_jvp
def root(square: jax.Array) -> jax.Array:
    """Return the square root, whose derivative at 0 is 0: that of a norm of zeros."""
    return jnp.sqrt(square)


@root.defjvp
def _root_jvp(primals, tangents):
    (square,), (tangent,) = primals, tangents
    norm = root(square)
    positive = norm > 0
    slope = 0.5 / jnp.where(positive, norm, 1.0)
    return norm, jnp.where(positive, slope * tangent, 0.0)


class Measurement(NamedTuple):
    """Sums of squares of the floating-point leaves of a pytree."""

    leaf_squares: jax.Array  # float32 (leaves,): nan or inf if the leaf is not finite.

    @property
    def leaf_norms(self) -> jax.Array:
        """L2 norm of each leaf, float32 (leaves,)."""
        return root(self.leaf_squares)

    @property
    def norm(self) -> jax.Array:
        """L2 norm over all leaves, float32 ()."""
        return root(jnp.sum(self.leaf_squares))

    @property
    def finite(self) -> jax.Array:
        """Return whether every element is finite and the norm is below `OVERFLOW`."""
        return self.norm < OVERFLOW

    @property
    def largest_leaf(self) -> jax.Array:
        """Leaf with the largest norm, int32 (); -1 if there is no leaf.

        The first leaf that is not finite counts as the largest.
        """
        if not self.leaf_squares.shape[0]:
            return jnp.full((), -1, jnp.int32)
        bad = ~(self.leaf_squares < OVERFLOW**2)
        ranked = jnp.where(bad, LARGEST, self.leaf_squares)
        return jnp.argmax(ranked).astype(jnp.int32)


def first_true(flags: jax.Array) -> jax.Array:
    """Index of the first true flag of a vector, int32 (); -1 if none is."""
    count = flags.shape[0]
    if not count:
        return jnp.full((), -1, jnp.int32)
    places = jnp.where(flags, lax.iota(np.int32, count), count)
    first = jnp.min(places)
    return jnp.where(first < count, first, -1)


def measure(tree, like=None, axes: MappedAxes = LOCAL) -> Measurement:
    """Measure a pytree in float32, whatever its dtypes.

    Leaves that are not floating point (in `like`, if given) are left out. Leaves that
    are sharded over mapped `axes` are measured whole.
    """
    leaves = _trees.inexact_leaves(tree, like)
    sums = leaf_sums([_squares(leaf) for leaf in leaves], np.float32)
    return Measurement(axes.totals(sums, leaves))


def measure_parts(leaves, sum_axes) -> tuple[Measurement, list[jax.Array]]:
    """Measure leaves and their parts in one pass over each leaf.

    Returns the measurement and, for each leaf, the sums of squares over its
    `sum_axes`, which stay with size 1.
    """
    parts = [
        jnp.sum(_squares(leaf), over, keepdims=True).astype(np.float32)
        for leaf, over in zip(leaves, sum_axes, strict=True)
    ]
    # The barrier keeps XLA from merging both sums into a second pass over the leaf.
    totals = leaf_sums([lax.optimization_barrier(part) for part in parts], np.float32)
    return Measurement(totals), parts


def vanishing_sums(leaves: list) -> jax.Array:
    """Return 0 for each leaf whose elements are all finite, whatever their size.

    For others it is nan; float32 (leaves,).
    """
    # 0 * inf is nan. XLA adds this up without an array of flags, also on a CPU.
    vanishing = lambda part: part * jnp.zeros((), part.dtype)
    parts = [
        vanishing(leaf.real) + vanishing(leaf.imag)
        if jnp.iscomplexobj(leaf)
        else vanishing(leaf)
        for leaf in leaves
    ]
    return leaf_sums(parts, np.float32)


def _squares(leaf) -> jax.Array:
    """Return |x|^2 in float32, or wider for wider leaves."""
    if jnp.iscomplexobj(leaf):
        return _squares(leaf.real) + _squares(leaf.imag)
    return jnp.square(leaf.astype(np.promote_types(leaf.dtype, np.float32)))
