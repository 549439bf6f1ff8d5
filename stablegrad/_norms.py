"""One measurement of a step: norms that cannot overflow, and what is not finite."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import _trees
from ._by_size import Sums, norms_from, sums_by_size
from ._mapped_axes import HERE, Across

LARGEST = float(np.finfo(np.float32).max)
# Below it, squares of float32 elements may have been rounded to zero.
SMALLEST_SAFE_SUM = 1e-30


class Measurement(NamedTuple):
    """What one pass over a pytree tells; `leaves` counts its inexact leaves."""

    leaf_norms: jax.Array  # float32 (leaves,), >= 0: L2 norms; not finite if bad.
    norm: jax.Array  # float32, >= 0: L2 norm over all leaves; nan if any is bad.
    first_bad_leaf: jax.Array  # int32: first leaf with a nan or inf, -1 if none.

    @property
    def finite(self) -> jax.Array:
        """Whether every element of every leaf is finite."""
        return self.first_bad_leaf < 0


def measure(tree, like=None, over: Across = HERE) -> Measurement:
    """Measures the norms of a pytree in float32, whatever its dtypes.

    Leaves that are not floating point (in `like`, if given) are passed over; leaves
    that are sharded `over` mapped axes are measured whole.

    n = sqrt(sum_i |x_i|^2). The usual case is one pass: a finite sum of squares also
    tells that every element is finite. Only where the sum overflows or vanishes does a
    second pass sum up large and small elements apart, so that float32 elements of 1e30
    and of 1e-30 get the right norm. A finite tree has a finite norm (at most the
    largest float32); a nan or an inf anywhere makes the norm nan and names its leaf.
    """
    leaves = _trees.inexact_leaves(tree, like)
    if not leaves:
        return unmeasured(0)
    squares = over.totals([_sum_of_squares(leaf) for leaf in leaves], leaves)
    total = jnp.sum(squares)
    usual = jnp.isfinite(total) & (total > SMALLEST_SAFE_SUM)
    return lax.cond(
        usual,
        lambda squares, leaves: _from_squares(squares),
        lambda squares, leaves: _of_any_size(leaves, over),
        squares,
        leaves,
    )


def unmeasured(leaves: int) -> Measurement:
    """Stands for the measurement of a tree that was never computed."""
    zero = jnp.zeros((), jnp.float32)
    return Measurement(
        jnp.zeros((leaves,), jnp.float32), zero, jnp.full((), -1, jnp.int32)
    )


def scaled_norm(measured: Measurement, scales, tree, like=None) -> jax.Array:
    """The norm of `tree`, of which `measured` tells, after `scale_leaves`."""
    if isinstance(scales, tuple):
        like = tree if like is None else like
        return unguarded(_trees.scale_leaves(tree, scales, like), like).norm
    if scales.ndim == 1:
        return norm_of_norms(scales * measured.leaf_norms)
    return scales * measured.norm


def unguarded(tree, like=None, over: Across = HERE) -> Measurement:
    """The same norms as published methods take them: sqrt(sum |x|^2) in float32.

    Squares may overflow to inf, and a nan or inf goes where it goes.
    """
    leaves = _trees.inexact_leaves(tree, like)
    if not leaves:
        return unmeasured(0)
    return _from_squares(
        over.totals([_sum_of_squares(leaf) for leaf in leaves], leaves)
    )


def unguarded_over(leaves, axes) -> list[jax.Array]:
    """The norms of `norms_over` as published methods take them."""
    pairs = zip(leaves, axes, strict=True)
    return [jnp.sqrt(_squares_over(leaf, over)) for leaf, over in pairs]


def norms_over(leaves, axes) -> list[jax.Array]:
    """L2 norms over some axes of each leaf, which stay with size 1; float32.

    As in `measure`, only overflow pays for a second pass; a nan or inf makes its own
    slice nan.
    """
    pairs = list(zip(leaves, axes, strict=True))
    squares = [_squares_over(leaf, over) for leaf, over in pairs]
    total = sum((jnp.sum(square) for square in squares), jnp.zeros((), jnp.float32))
    return lax.cond(
        jnp.isfinite(total),
        lambda _: [jnp.sqrt(square) for square in squares],
        lambda leaves: [
            _saturate(norms_from(sums_by_size(leaf, over)))
            for leaf, over in zip(leaves, axes, strict=True)
        ],
        list(leaves),
    )


def measure_parts(leaves, axes) -> tuple[Measurement, list[jax.Array]]:
    """What `measure` and `norms_over` tell, from one pass over every leaf."""
    pairs = list(zip(leaves, axes, strict=True))
    squares = [_squares_over(leaf, over) for leaf, over in pairs]
    # Kept apart: XLA would merge the two sums into a second one over the leaf, and
    # write down the squares for both.
    totals = jnp.stack([jnp.sum(lax.optimization_barrier(x)) for x in squares])
    total = jnp.sum(totals)

    def of_any_size(leaves):
        parts = [
            _saturate(norms_from(sums_by_size(leaf, over)))
            for leaf, over in zip(leaves, axes, strict=True)
        ]
        return _of_any_size(leaves, HERE), parts

    return lax.cond(
        jnp.isfinite(total) & (total > SMALLEST_SAFE_SUM),
        lambda _: (_from_squares(totals), [jnp.sqrt(square) for square in squares]),
        of_any_size,
        list(leaves),
    )


def newly_nonfinite(new, old, over: Across = HERE) -> jax.Array:
    """Whether `new` has a nan or inf where `old` had none, on any device.

    Optimizer states may hold an inf on purpose (a best loss not yet seen), so only
    what was finite before is checked.
    """
    pairs = [
        (jnp.asarray(after), jnp.asarray(before))
        for after, before in zip(
            jax.tree.leaves(new), jax.tree.leaves(old), strict=True
        )
        if _trees.is_inexact(before)
    ]
    if not pairs:
        return jnp.zeros((), bool)

    def look_closer(pairs):
        bad = [jnp.any(jnp.isfinite(b) & ~jnp.isfinite(a)) for a, b in pairs]
        return over.any(jnp.any(jnp.stack(bad)))

    arrays = [after for after, _ in pairs]
    total = jnp.sum(over.totals([_sum_of_squares(x) for x in arrays], arrays))
    return lax.cond(
        jnp.isfinite(total), lambda _: jnp.zeros((), bool), look_closer, pairs
    )


def _from_squares(squares) -> Measurement:
    none = jnp.full((), -1, jnp.int32)
    return Measurement(jnp.sqrt(squares), jnp.sqrt(jnp.sum(squares)), none)


def _of_any_size(leaves, over: Across) -> Measurement:
    """The same at the price of a second pass, in which no square can overflow."""
    sums = [jnp.stack(sums_by_size(leaf)) for leaf in leaves]
    parts: list = [None] * len(leaves)
    for dtype in dict.fromkeys(own.dtype for own in sums):
        chosen = [i for i, own in enumerate(sums) if own.dtype == dtype]
        totals = over.totals([sums[i] for i in chosen], [leaves[i] for i in chosen])
        found = _saturate(norms_from(Sums(*totals.T)))
        for place, i in enumerate(chosen):
            parts[i] = found[place]
    norms = jnp.stack(parts)
    bad = jnp.isnan(norms)
    first = jnp.where(jnp.any(bad), jnp.argmax(bad), -1).astype(jnp.int32)
    norm = jnp.where(jnp.any(bad), jnp.nan, norm_of_norms(norms))
    return Measurement(norms, norm, first)


def _squares_over(leaf, axes) -> jax.Array:
    wide = leaf.astype(np.promote_types(leaf.dtype, np.float32))
    square = jnp.real(wide * jnp.conj(wide))
    return jnp.sum(square, axis=axes, keepdims=True).astype(jnp.float32)


def norm_of_norms(norms) -> jax.Array:
    unit = jnp.max(norms, initial=0.0)
    unit = jnp.where(jnp.isfinite(unit) & (unit > 0), unit, 1.0)
    return _saturate(unit * jnp.sqrt(jnp.sum(jnp.square(norms / unit))))


def _saturate(norm) -> jax.Array:
    """A finite leaf has a finite norm: the largest float32 where that overflows."""
    return jnp.minimum(norm.astype(jnp.float32), LARGEST)


def _sum_of_squares(leaf) -> jax.Array:
    """Sum of |x|^2 in float32. A dot product would add up one by one in older JAX."""
    if jnp.iscomplexobj(leaf):
        return _sum_of_squares(leaf.real) + _sum_of_squares(leaf.imag)
    leaf = leaf.astype(np.promote_types(leaf.dtype, np.float32))
    return jnp.sum(jnp.square(leaf)).astype(jnp.float32)
