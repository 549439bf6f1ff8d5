"""Several sums over one array in one pass, in which nothing of its size is stored.

XLA fuses what is computed element by element into a reduction with several results. On
a CPU it hands a reduction with one result to a library, for which it first writes every
operand to memory, broadcast constants too. Elsewhere reductions with one result each
are fused as well, and those over a sharded array end in a sum over the devices, where
one with several results would gather what every device has.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# Neutral among finite float32 numbers; of two numbers; of an array.
_LARGEST = float(np.finfo(np.float32).max)
KINDS = {
    "sum": (0.0, jnp.add, jnp.sum),
    "min": (_LARGEST, jnp.minimum, jnp.min),
    "max": (-_LARGEST, jnp.maximum, jnp.max),
}


def reduce_together(
    columns, kinds: tuple[str, ...], axes: tuple[int, ...] | None = None
) -> tuple[jax.Array, ...]:
    """The sum, least or largest of each of several arrays of one shape.

    Over all axes, or over some, which stay with size 1. No number may be a nan.
    """
    columns = tuple(jnp.asarray(column) for column in columns)
    if not (range(columns[0].ndim) if axes is None else axes):
        return columns
    return lax.platform_dependent(
        *columns,
        cpu=functools.partial(_in_one_pass, kinds, axes),
        default=functools.partial(_one_by_one, kinds, axes),
    )


def _in_one_pass(kinds, axes, *columns) -> tuple[jax.Array, ...]:
    rules = [KINDS[kind] for kind in kinds]
    starts = [
        jnp.asarray(start, column.dtype)
        for (start, *_), column in zip(rules, columns, strict=True)
    ]

    def merge(left, right):
        pairs = zip(rules, left, right, strict=True)
        return tuple(join(a, b) for (_, join, _), a, b in pairs)

    over = tuple(range(columns[0].ndim)) if axes is None else axes
    reduced = lax.reduce(columns, tuple(starts), merge, over)
    kept = () if axes is None else axes
    return tuple(jnp.expand_dims(column, kept) for column in reduced)


def _one_by_one(kinds, axes, *columns) -> tuple[jax.Array, ...]:
    return tuple(
        KINDS[kind][2](column, axis=axes, keepdims=axes is not None).astype(
            column.dtype
        )
        for kind, column in zip(kinds, columns, strict=True)
    )
