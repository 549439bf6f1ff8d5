"""Scales: the factors that the leaves of one pytree are multiplied by."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import _trees
from ._norms import Measurement, measure, root


class Scales(NamedTuple):
    """Factors on the floating-point leaves of a tree, or on parts of them."""

    by_leaf: jax.Array  # float32 (leaves,), or () if all leaves have the same.
    # A further factor for each leaf, which broadcasts to it. Then `by_leaf` is ().
    within: tuple[jax.Array, ...] | None = None

    def times(self, factor) -> "Scales":
        """Multiply every factor by one number, in the wider of the two dtypes."""
        factor = jnp.asarray(factor)
        wide = np.promote_types(self.by_leaf.dtype, factor.dtype)
        return self._replace(by_leaf=self.by_leaf.astype(wide) * factor.astype(wide))

    def where(self, flag) -> "Scales":
        """Return the same scales if `flag` is set, else ones."""
        choose = lambda scale: jnp.where(flag, scale, 1.0)
        return jax.tree.map(choose, self)

    def smallest(self) -> jax.Array:
        """Return the smallest factor, float32 (), or 1 if none is below 1."""
        least = jnp.ones((), jnp.float32)
        parts = (1.0,) if self.within is None else self.within
        for part in parts:
            least = jnp.minimum(least, jnp.min(self.by_leaf * part, initial=1.0))
        return least

    def factors(self, count: int) -> list[jax.Array]:
        """Return the factor of each of `count` leaves, which broadcasts to it."""
        if self.within is not None:
            return [self.by_leaf * part for part in self.within]
        if not self.by_leaf.ndim:
            return [self.by_leaf] * count
        # Behind a barrier, so that XLA does not join the kernels of leaves that share
        # the vector: joined ones copy what they write.
        each = [lax.index_in_dim(self.by_leaf, i, keepdims=False) for i in range(count)]
        return lax.optimization_barrier(each)


def uniform(factor: float | jax.Array = 1.0) -> Scales:
    """Return scales that multiply every leaf by the same number."""
    return Scales(jnp.asarray(factor, jnp.float32))


def minimum(first: Scales, second: Scales) -> Scales:
    """Return the smaller factor of two scales, leaf by leaf and part by part."""
    if first.within is None and second.within is None:
        return Scales(jnp.minimum(first.by_leaf, second.by_leaf))
    count = len(first.within or second.within or ())
    rows = map(jnp.minimum, first.factors(count), second.factors(count))
    return Scales(jnp.ones((), jnp.float32), tuple(rows))


def scale_leaves(tree, scales: Scales | None, like, keep=None):
    """Multiply every leaf that is floating point in `like` by its factor.

    The product is taken in float32 or wider and returned in the leaf's own dtype. XLA
    fuses it into the optimizer's kernels. Where a rank-0 `keep` is given and false,
    the leaves become zeros instead.
    """
    if scales is None:
        return tree
    factors = iter(scales.factors(sum(_trees.inexact_flags(like))))

    def scaled(leaf):
        leaf = jnp.asarray(leaf)
        wide = np.promote_types(np.float32, leaf.dtype)
        factor = next(factors).astype(wide)
        product = (factor * leaf.astype(wide)).astype(leaf.dtype)
        if keep is None:
            return product
        return jnp.where(keep, product, jnp.zeros((), leaf.dtype))

    return _trees.map_inexact(scaled, like, tree)


def scaled_norm(measured: Measurement, scales: Scales, tree, like=None) -> jax.Array:
    """Return the norm of `scale_leaves(tree, ...)`; `measured` is that of `tree`."""
    if scales.within is not None:
        like = tree if like is None else like
        return measure(scale_leaves(tree, scales, like), like).norm
    squares = jnp.square(scales.by_leaf) * measured.leaf_squares
    return root(jnp.sum(squares))
