"""Several sums over one array in one pass, in which nothing of its size is stored.

XLA fuses what is computed element by element into a reduction with several results. On
a CPU it hands a reduction with one result to a library, for which it first writes every
operand to memory, broadcast constants too.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax


def reduce_together(
    columns, starts, merge: Callable, axes: tuple[int, ...] | None = None
) -> tuple[jax.Array, ...]:
    """Reduces arrays of one shape together, over all axes or over some.

    `starts` are the neutral elements, and `merge` joins two tuples of numbers. Axes
    that are named stay with size 1. Over all axes at once, because of an array that is
    sharded the partial results are gathered.
    """
    columns = tuple(jnp.asarray(column) for column in columns)
    starts = tuple(
        jnp.asarray(start, column.dtype)
        for start, column in zip(starts, columns, strict=True)
    )
    over = tuple(range(columns[0].ndim)) if axes is None else axes
    if not over:
        return columns
    reduced = lax.reduce(columns, starts, merge, over)
    if axes is not None:
        reduced = tuple(jnp.expand_dims(column, axes) for column in reduced)
    return tuple(reduced)
