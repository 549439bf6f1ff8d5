"""Packing: many small numbers in one float32 and one int32 array.

A state of a hundred rank-0 arrays costs a hundred arguments, results and kernels. A
packed one costs two. Which column holds which number is static.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ._norms import LARGEST

Packed = tuple[jax.Array, ...]


class Packing:
    """The columns of a pytree of arrays.

    Floating-point arrays go to the first packed array, as float32. Integers and bools
    go to the second one, as int32. A packed array without columns is left out.
    """

    def __init__(self, structs: Any):
        """Lay out the columns of arrays, or of their shapes and dtypes."""
        leaves, self._structure = jax.tree.flatten(structs)
        self._columns = []  # (0: floating, 1: integer; dtype, shape, start, stop)
        self.widths = [0, 0]  # Columns of either array.
        for leaf in leaves:
            kind = 0 if jnp.issubdtype(leaf.dtype, jnp.floating) else 1
            shape = leaf.shape
            start, size = self.widths[kind], int(np.prod(shape, dtype=np.int64))
            self._columns.append((kind, leaf.dtype, shape, start, start + size))
            self.widths[kind] = start + size

    def pack(self, tree: Any) -> Packed:
        """Return the packed arrays, each of shape (columns,)."""
        parts: tuple[list, list] = ([], [])
        dtypes = (jnp.float32, jnp.int32)
        leaves = self._structure.flatten_up_to(tree)
        for (kind, *_), leaf in zip(self._columns, leaves, strict=True):
            parts[kind].append(jnp.ravel(leaf).astype(dtypes[kind]))
        return tuple(jnp.concatenate(own) for own in parts if own)

    def unpack(self, packed: Packed) -> Any:
        """Return the pytree that was packed.

        The packed arrays may have more columns, and leading axes of an ensemble.
        """
        arrays = iter(packed)
        by_kind = [next(arrays) if width else None for width in self.widths]
        leaves = []
        for kind, dtype, shape, start, stop in self._columns:
            array: Any = by_kind[kind]
            part = array[..., start:stop]
            leaves.append(part.reshape((*part.shape[:-1], *shape)).astype(dtype))
        return self._structure.unflatten(leaves)


def on_host(packed: Packed) -> Any:
    """Return packed arrays as NumPy arrays, unless they are traced."""
    if any(isinstance(array, Tracer) for array in packed):
        return packed
    return tuple(np.asarray(array) for array in packed)


def encode(number) -> jax.Array:
    """Return a finite float32: the largest for inf, its negative for -inf and nan."""
    number = jnp.asarray(number).astype(jnp.float32)
    finite = jnp.where(number > 0, jnp.float32(LARGEST), jnp.float32(-LARGEST))
    return jnp.where(jnp.isfinite(number), number, finite)


def decode(number) -> Any:
    """Undo `encode`, up to -inf, which comes back as nan; of any shape.

    A concrete number is decoded by NumPy on the host, so that `jax_debug_nans` finds no
    device operation that yields nan.
    """
    if isinstance(number, Tracer):
        number = jnp.where(number >= LARGEST, jnp.inf, number)
        return jnp.where(number <= -LARGEST, jnp.nan, number)
    host = np.array(number)
    host = np.where(host >= LARGEST, np.float32(np.inf), host)
    return np.where(host <= -LARGEST, np.float32(np.nan), host).astype(np.float32)
