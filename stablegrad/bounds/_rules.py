"""What elementwise primitives make of ranges; the rest is left unknown.

Every rule gets the equation and the ranges of its operands, and returns the range of
its result, widened by what rounding may add. Where a result could be a nan, a bound
becomes a nan or an inf, which no step passes.
"""

import math
from collections.abc import Callable

import jax.numpy as jnp

from ._range import Range, join, widened


def _magnitude(x: Range):
    return jnp.maximum(jnp.abs(x.lo), jnp.abs(x.hi))


def _rounded(lo, hi, eqn) -> Range:
    """The range of a result that is rounded once, by a unit of its own size."""
    return widened(lo, hi, (jnp.abs(lo), jnp.abs(hi)), eqn.outvars[0].aval.dtype)


def _corners(eqn, a: Range, b: Range, function) -> Range:
    ends = [function(x, y) for x in a for y in b]
    lo = jnp.minimum(jnp.minimum(ends[0], ends[1]), jnp.minimum(ends[2], ends[3]))
    hi = jnp.maximum(jnp.maximum(ends[0], ends[1]), jnp.maximum(ends[2], ends[3]))
    return _rounded(lo, hi, eqn)


def _add(eqn, a: Range, b: Range) -> Range:
    low, high = jnp.abs(a.lo) + jnp.abs(b.lo), jnp.abs(a.hi) + jnp.abs(b.hi)
    dtype = eqn.outvars[0].aval.dtype
    return widened(a.lo + b.lo, a.hi + b.hi, (low, high), dtype)


def _sub(eqn, a: Range, b: Range) -> Range:
    return _add(eqn, a, Range(-b.hi, -b.lo))


def _square(eqn, x: Range) -> Range:
    low, high = jnp.square(x.lo), jnp.square(x.hi)
    across = (x.lo <= 0) & (x.hi >= 0)
    least = jnp.where(across, 0.0, jnp.minimum(low, high))
    return _rounded(least, jnp.maximum(low, high), eqn)


def _mul(eqn, a: Range, b: Range) -> Range:
    if eqn.invars[0] is eqn.invars[1]:
        return _square(eqn, a)
    return _corners(eqn, a, b, jnp.multiply)


def _div(eqn, a: Range, b: Range) -> Range:
    apart = (b.lo > 0) | (b.hi < 0)
    b = Range(jnp.where(apart, b.lo, jnp.nan), jnp.where(apart, b.hi, jnp.nan))
    return _corners(eqn, a, b, jnp.divide)


def _monotone(function) -> Callable[..., Range]:
    return lambda eqn, x: _rounded(function(x.lo), function(x.hi), eqn)


def _rsqrt(eqn, x: Range) -> Range:
    low = jnp.where(x.lo > 0, x.lo, jnp.nan)
    return _rounded(1 / jnp.sqrt(x.hi), 1 / jnp.sqrt(low), eqn)


def _abs(eqn, x: Range) -> Range:
    del eqn
    across = (x.lo <= 0) & (x.hi >= 0)
    least = jnp.minimum(jnp.abs(x.lo), jnp.abs(x.hi))
    return Range(jnp.where(across, 0.0, least), _magnitude(x))


def _integer_pow(eqn, x: Range) -> Range | None:
    power = eqn.params["y"]
    if power < 1:
        return None
    low, high = x.lo**power, x.hi**power
    if power % 2:
        return _rounded(low, high, eqn)
    across = (x.lo <= 0) & (x.hi >= 0)
    least = jnp.where(across, 0.0, jnp.minimum(low, high))
    return _rounded(least, jnp.maximum(low, high), eqn)


def _pow(eqn, base: Range, exponent: Range) -> Range:
    # A power is monotone in each, from a base of 0 on; below that it may be a nan.
    base = Range(jnp.where(base.lo >= 0, base.lo, jnp.nan), base.hi)
    return _corners(eqn, base, exponent, jnp.power)


def _reduce_sum(eqn, x: Range) -> Range:
    count = math.prod(eqn.invars[0].aval.shape)
    terms = max(count // max(math.prod(eqn.outvars[0].aval.shape), 1), 1)
    # However the terms are grouped, rounding adds less than the sum of their sizes.
    slack = min(terms * 2.0**-22, 1.0)
    lo, hi = terms * x.lo, terms * x.hi
    return Range(lo - slack * jnp.abs(lo), hi + slack * jnp.abs(hi))


def _select(eqn, which: Range, *cases: Range) -> Range:
    if len(cases) != 2:
        return join(*cases)
    off, on = cases
    # Where the predicate is one known value, only its case counts.
    never, always = which.hi <= 0, which.lo >= 1
    both = join(off, on)
    lo = jnp.where(never, off.lo, jnp.where(always, on.lo, both.lo))
    hi = jnp.where(never, off.hi, jnp.where(always, on.hi, both.hi))
    return Range(lo, hi)


def _clamp(eqn, low: Range, x: Range, high: Range) -> Range:
    del eqn
    return Range(
        jnp.minimum(jnp.maximum(x.lo, low.lo), high.lo),
        jnp.minimum(jnp.maximum(x.hi, low.hi), high.hi),
    )


def _same(eqn, x: Range, *rest: Range) -> Range:
    del eqn, rest
    return x


def _truth(eqn, *operands: Range) -> Range:
    del eqn, operands
    return Range(jnp.zeros((), jnp.float32), jnp.ones((), jnp.float32))


def _logic(eqn, *operands: Range) -> Range | None:
    """Of truth values; of integers, bitwise logic is left unknown."""
    return _truth(eqn) if eqn.outvars[0].aval.dtype == jnp.bool_ else None


RULES: dict[str, Callable[..., Range | None]] = {
    "neg": lambda eqn, x: Range(-x.hi, -x.lo),
    "add": _add,
    "add_any": _add,
    "sub": _sub,
    "mul": _mul,
    "div": _div,
    "square": _square,
    "integer_pow": _integer_pow,
    "pow": _pow,
    "abs": _abs,
    "sign": lambda eqn, x: Range(jnp.sign(x.lo), jnp.sign(x.hi)),
    "sqrt": _monotone(jnp.sqrt),
    "rsqrt": _rsqrt,
    "exp": _monotone(jnp.exp),
    "log": _monotone(jnp.log),
    "tanh": _monotone(jnp.tanh),
    "logistic": lambda eqn, x: _truth(eqn),
    "max": lambda eqn, a, b: Range(jnp.maximum(a.lo, b.lo), jnp.maximum(a.hi, b.hi)),
    "min": lambda eqn, a, b: Range(jnp.minimum(a.lo, b.lo), jnp.minimum(a.hi, b.hi)),
    "clamp": _clamp,
    "select_n": _select,
    "reduce_sum": _reduce_sum,
    "reduce_max": _same,
    "reduce_min": _same,
    "convert_element_type": lambda eqn, x: _rounded(x.lo, x.hi, eqn),
    "reduce_precision": lambda eqn, x: _rounded(x.lo, x.hi, eqn),
    "concatenate": lambda eqn, *parts: join(*parts),
    "pad": lambda eqn, x, filler: join(x, filler),
    **dict.fromkeys(
        (
            "broadcast_in_dim",
            "copy",
            "expand_dims",
            "reshape",
            "rev",
            "slice",
            "squeeze",
            "stop_gradient",
            "transpose",
        ),
        _same,
    ),
    **dict.fromkeys(("eq", "ne", "lt", "le", "gt", "ge", "is_finite"), _truth),
    **dict.fromkeys(("and", "or", "not", "xor", "reduce_and", "reduce_or"), _logic),
}
