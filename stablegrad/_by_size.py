"""Norms of any size in one pass: large, middling and small numbers are summed apart.

    n = sqrt(sum over middling |x|^2),  u sqrt(sum over large |x / u|^2), ...

No square overflows or vanishes, so no pass for the largest element must come first.

Reference: Blue, A portable Fortran program to find the Euclidean norm of a vector
(1978), ACM Transactions on Mathematical Software 4(1).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ._together import reduce_together


class Sums(NamedTuple):
    """Of one array, or along some of its axes."""

    bad: jax.Array  # How many elements are nan or inf.
    large: jax.Array  # Sum of |x / u|^2 over |x| > sqrt(u).
    middle: jax.Array  # Sum of |x|^2 over what is in between.
    small: jax.Array  # Sum of |u x|^2 over |x| < 1 / sqrt(u).


def unit_of(dtype) -> float:
    """u: its square, that of any number over it, and their sums are within range."""
    return 2.0**80 if np.finfo(dtype).bits <= 32 else 2.0**640


def sums_by_size(leaf, axes: tuple[int, ...] | None = None) -> Sums:
    """The sums over all of a leaf, or over some axes, which stay with size 1."""
    wide = np.promote_types(leaf.dtype, np.float32)
    parts = [leaf.real, leaf.imag] if jnp.iscomplexobj(leaf) else [leaf.astype(wide)]
    unit = unit_of(parts[0].dtype)
    edge = unit**0.5
    found = []
    for part in parts:
        finite = jnp.isfinite(part)
        size = jnp.where(finite, jnp.abs(part), 0)
        large, small = size > edge, size < 1 / edge
        # Chosen, not divided: XLA would turn (x / u)^2 into x^2 / u^2, and overflow.
        scale = jnp.where(large, 1 / unit, jnp.where(small, unit, 1.0))
        square = jnp.square(size * scale.astype(size.dtype))
        own = (
            (~finite).astype(size.dtype),
            jnp.where(large, square, 0),
            jnp.where(large | small, 0, square),
            jnp.where(small, square, 0),
        )
        found.append(own)
    columns = [sum(own[1:], own[0]) for own in zip(*found, strict=True)]
    return Sums(*reduce_together(columns, ("sum",) * 4, axes))


def norms_from(sums: Sums) -> jax.Array:
    """The L2 norms, in the dtype of the sums; nan where anything is not finite."""
    unit = unit_of(sums.middle.dtype)
    large = unit * jnp.sqrt(sums.large + sums.middle / unit / unit)
    middle = jnp.sqrt(sums.middle + sums.small / unit / unit)
    small = jnp.sqrt(sums.small) / unit
    norm = jnp.where(sums.middle > 0, middle, small)
    norm = jnp.where(sums.large > 0, large, norm)
    return jnp.where(sums.bad > 0, jnp.nan, norm)
