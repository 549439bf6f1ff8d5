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


def scaled_norm(measured: Measurement, scales) -> jax.Array:
    """The norm after leaf i, or the whole tree if rank-0, is multiplied by `scales`."""
    if scales.ndim == 0:
        return scales * measured.norm
    return _norm_of_norms(scales * measured.leaf_norms)


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
