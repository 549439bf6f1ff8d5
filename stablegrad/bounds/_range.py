"""What is known of an array without looking at its elements."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .. import _trees


class Range(NamedTuple):
    """No element is nan, and lo <= x <= hi; float32, rank 0."""

    lo: jax.Array
    hi: jax.Array


class Known(NamedTuple):
    """An array of one element, which is at hand."""

    value: jax.Array


Fact = Range | Known | None  # None: nothing is known.


def span(fact: Fact) -> Range | None:
    """The range of a fact."""
    if isinstance(fact, Known):
        if not _is_real(fact.value.dtype):
            return None
        only = jnp.reshape(fact.value, ()).astype(jnp.float32)
        return Range(only, only)
    return fact


def given(array) -> Fact:
    """The fact about a constant: its value, or the range of a short one."""
    array = jnp.asarray(array)
    if not _is_real(array.dtype):
        return None
    if array.size == 1:
        return Known(array)
    if not 1 < array.size <= 4096:
        return None
    wide = array.astype(jnp.float32)
    return Range(jnp.min(wide), jnp.max(wide))


def join(*ranges: Range) -> Range:
    """The smallest range that holds all of several."""
    first, *rest = ranges
    for other in rest:
        if other is not first:
            lo, hi = jnp.minimum(first.lo, other.lo), jnp.maximum(first.hi, other.hi)
            first = Range(lo, hi)
    return first


def widened(lo, hi, terms, dtype) -> Range:
    """What rounding to `dtype` may make of a result between `lo` and `hi`.

    `terms` bounds the magnitude of what was added up, at either end; a sum of terms of
    one sign keeps its sign.
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        return Range(lo, hi)
    coarse = jnp.bfloat16 if jnp.finfo(dtype).bits <= 16 else jnp.float32
    unit = 4 * float(jnp.finfo(coarse).eps)
    low, high = terms
    return Range(lo - unit * low, hi + unit * high)


def largest(dtype) -> float:
    """Half of the largest number of a dtype, within float32; integers wrap beyond."""
    if jnp.issubdtype(dtype, jnp.integer):
        return float(jnp.iinfo(dtype).max) / 2
    return min(float(jnp.finfo(dtype).max), float(np.finfo(np.float32).max)) / 2


def _is_real(dtype) -> bool:
    if jnp.issubdtype(dtype, jax.dtypes.extended):
        return False
    return dtype != jax.dtypes.float0 and not jnp.issubdtype(dtype, jnp.complexfloating)


def fact_of(leaf: Any, known: Range | None) -> Fact:
    """The fact about a leaf: its value if it is one number, or a range."""
    if not np.ndim(leaf) and _is_real(jax.dtypes.result_type(leaf)):
        return Known(jnp.asarray(leaf))
    return known if _trees.is_inexact(leaf) else None
