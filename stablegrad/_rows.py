"""Several sums over one array in one pass, in which nothing of its size is stored.

XLA fuses what is computed element by element into a reduction with several results. On
a CPU it hands a reduction with one result to a library, for which it first writes every
operand to memory, broadcast constants too.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax


def reduce_rows(columns, starts, merge: Callable) -> tuple[jax.Array, ...]:
    """Reduces arrays of one shape together, along the last axis and then the others.

    `starts` are the neutral elements, and `merge` joins two tuples of numbers. A
    reduction straight to one number would run on one core.
    """
    columns = tuple(jnp.asarray(column) for column in columns)
    starts = tuple(
        jnp.asarray(start, column.dtype)
        for start, column in zip(starts, columns, strict=True)
    )
    rank = columns[0].ndim
    if not rank:
        return columns
    rows = lax.reduce(columns, starts, merge, (rank - 1,))
    if rank > 1:
        rows = lax.reduce(tuple(rows), starts, merge, tuple(range(rank - 1)))
    return tuple(rows)
