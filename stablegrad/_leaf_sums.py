"""Sums over each of many arrays, in few kernels.

A GPU adds up a large array in two kernels: one for partial sums and one for their
total. Here the first adds up the last axis, and the second finishes all arrays whose
partial sums have the same type.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

SHORT = 32  # A last axis below this length is not added up by itself.


def leaf_sums(arrays: list[jax.Array], dtype) -> jax.Array:
    """Return the sum of each array in `dtype`, (arrays,)."""
    groups: dict[Any, list[tuple[int, jax.Array]]] = {}
    for place, array in enumerate(arrays):
        has_rows = array.ndim > 1 and array.shape[-1] >= SHORT
        partial = jnp.sum(array, axis=-1 if has_rows else None, dtype=dtype)
        groups.setdefault(jax.typeof(partial), []).append((place, partial))
    if not groups:
        return jnp.zeros((0,), dtype)
    totals, places = [], []
    for group in groups.values():
        stacked = jnp.stack([partial for _, partial in group])
        if len(group) > 1 and stacked.ndim > 1:
            stacked = lax.optimization_barrier(stacked)  # Else XLA splits it again.
        rest = tuple(range(1, stacked.ndim))
        totals.append(jnp.sum(stacked, axis=rest, dtype=dtype))
        places += [place for place, _ in group]
    joined = jnp.concatenate(totals)
    order = np.argsort(places)
    return joined if np.all(np.diff(order) == 1) else joined[order]


def leaf_dots(lefts: list[jax.Array], rights: list[jax.Array]) -> jax.Array:
    """Return the real inner product of each pair of arrays, float32 (pairs,)."""
    products = []
    for left, right in zip(lefts, rights, strict=True):
        wide = np.promote_types(left.dtype, np.float32)
        products.append(jnp.real(jnp.conj(left.astype(wide)) * right.astype(wide)))
    return leaf_sums(products, jnp.float32)
