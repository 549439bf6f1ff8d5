"""One measurement of a step: norms that cannot overflow, and what is not finite."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import _trees

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


def measure(tree, like=None) -> Measurement:
    """Measures the norms of a pytree in float32, whatever its dtypes.

    Leaves that are not floating point (in `like`, if given) are passed over.

    n = sqrt(sum_i |x_i|^2). The usual case is one pass: a finite sum of squares also
    tells that every element is finite. Only where the sum overflows or vanishes does a
    second pass divide by the largest element first, so that float32 elements of 1e30
    and of 1e-30 get the right norm. A finite tree has a finite norm (at most the
    largest float32); a nan or an inf anywhere makes the norm nan and names its leaf.
    """
    leaves = _trees.inexact_leaves(tree, like)
    if not leaves:
        return unmeasured(0)
    squares = jnp.stack([_sum_of_squares(leaf) for leaf in leaves])
    total = jnp.sum(squares)
    usual = jnp.isfinite(total) & (total > SMALLEST_SAFE_SUM)
    return lax.cond(usual, _from_squares, _rescaled, squares, leaves)


def unmeasured(leaves: int) -> Measurement:
    """Stands for the measurement of a tree that was never computed."""
    zero = jnp.zeros((), jnp.float32)
    return Measurement(
        jnp.zeros((leaves,), jnp.float32), zero, jnp.full((), -1, jnp.int32)
    )


def scaled_norm(measured: Measurement, scales, tree, like=None) -> jax.Array:
    """The norm of `tree`, of which `measured` tells, after `scale_leaves`."""
    if not isinstance(scales, tuple):
        return scales * measured.norm
    if all(scale.ndim == 0 for scale in scales):
        return _norm_of_norms(
            jnp.stack([*scales, jnp.ones((), jnp.float32)])[:-1] * measured.leaf_norms
        )
    return measure(
        _trees.scale_leaves(tree, scales, tree if like is None else like), like
    ).norm


def unguarded(tree) -> Measurement:
    """The same norms as published methods take them: sqrt(sum |x|^2) in float32.

    Squares may overflow to inf, and a nan or inf goes where it goes.
    """
    leaves = _trees.inexact_leaves(tree)
    if not leaves:
        return unmeasured(0)
    return _from_squares(jnp.stack([_sum_of_squares(leaf) for leaf in leaves]), leaves)


def unguarded_over(leaf, axes: tuple[int, ...]) -> jax.Array:
    """The norms of `norms_over` as published methods take them."""
    return jnp.sqrt(_squares_over(leaf, axes))


def norms_over(leaf, axes: tuple[int, ...]) -> jax.Array:
    """L2 norms over some axes of a leaf, which stay with size 1; float32.

    As in `measure`, a finite slice has its right norm whatever its size, a nan or inf
    makes its own slice nan, and only overflow pays for a second pass.
    """
    square = _squares_over(leaf, axes)
    return lax.cond(
        jnp.all(jnp.isfinite(square)),
        lambda leaf: jnp.sqrt(square),
        lambda leaf: _rescaled_over(leaf, axes),
        leaf,
    )


def newly_nonfinite(new, old) -> jax.Array:
    """Whether `new` has a nan or inf where `old` had none.

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
        return jnp.any(jnp.stack(bad))

    total = sum(_sum_of_squares(after) for after, _ in pairs)
    return lax.cond(
        jnp.isfinite(total), lambda _: jnp.zeros((), bool), look_closer, pairs
    )


def _from_squares(squares, leaves) -> Measurement:
    del leaves
    none = jnp.full((), -1, jnp.int32)
    return Measurement(jnp.sqrt(squares), jnp.sqrt(jnp.sum(squares)), none)


def _rescaled(squares, leaves) -> Measurement:
    del squares
    bad = jnp.stack([~jnp.all(jnp.isfinite(leaf)) for leaf in leaves])
    norms = jnp.stack([_safe_norm(leaf) for leaf in leaves])
    norms = jnp.where(bad, jnp.nan, norms)
    first = jnp.where(jnp.any(bad), jnp.argmax(bad), -1).astype(jnp.int32)
    norm = jnp.where(jnp.any(bad), jnp.nan, _norm_of_norms(norms))
    return Measurement(norms, norm, first)


def _squares_over(leaf, axes) -> jax.Array:
    wide = leaf.astype(np.promote_types(leaf.dtype, np.float32))
    square = jnp.real(wide * jnp.conj(wide))
    return jnp.sum(square, axis=axes, keepdims=True).astype(jnp.float32)


def _rescaled_over(leaf, axes) -> jax.Array:
    size = jnp.abs(leaf).astype(jnp.float32)
    fine = jnp.isfinite(leaf)
    peak = jnp.max(jnp.where(fine, size, 0), axis=axes, keepdims=True, initial=0)
    unit = jnp.where(peak > 0, jnp.minimum(peak, LARGEST), 1)
    norm = _saturate(unit * jnp.sqrt(_squares_over(size / unit, axes)))
    return jnp.where(jnp.all(fine, axis=axes, keepdims=True), norm, jnp.nan)


def _norm_of_norms(norms) -> jax.Array:
    unit = jnp.max(norms, initial=0.0)
    unit = jnp.where(jnp.isfinite(unit) & (unit > 0), unit, 1.0)
    return _saturate(unit * jnp.sqrt(jnp.sum(jnp.square(norms / unit))))


def _safe_norm(leaf) -> jax.Array:
    """The norm of a finite leaf, at the price of a second reduction."""
    parts = [leaf.real, leaf.imag] if jnp.iscomplexobj(leaf) else [leaf]
    # Not max(|x|) alone: XLA's CPU maximum of a large array can lose a nan, and the
    # caller has asked for finiteness already.
    peaks = [
        jnp.max(jnp.where(jnp.isfinite(part), jnp.abs(part), 0), initial=0)
        for part in parts
    ]
    peak = peaks[0] if len(peaks) == 1 else jnp.maximum(*peaks)
    unit = jnp.where(peak > 0, peak, 1).astype(np.promote_types(peak.dtype, np.float32))
    total = sum(_sum_of_squares(part.astype(unit.dtype) / unit) for part in parts)
    return _saturate(unit * jnp.sqrt(total).astype(unit.dtype))


def _saturate(norm) -> jax.Array:
    """A finite leaf has a finite norm: the largest float32 where that overflows."""
    return jnp.minimum(norm.astype(jnp.float32), LARGEST)


def _sum_of_squares(leaf) -> jax.Array:
    """Sum of |x|^2 in float32. A dot product is XLA's fastest full reduction."""
    if jnp.iscomplexobj(leaf):
        return _sum_of_squares(leaf.real) + _sum_of_squares(leaf.imag)
    leaf = leaf.astype(np.promote_types(leaf.dtype, np.float32))
    axes = tuple(range(leaf.ndim))
    square = lax.dot_general(
        leaf, leaf, ((axes, axes), ((), ())), precision=lax.Precision.HIGHEST
    )
    return square.astype(jnp.float32)
