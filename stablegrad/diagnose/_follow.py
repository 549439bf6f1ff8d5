"""Following a value through operations that change little."""

import jax.numpy as jnp

from ._elementwise import PASSING
from ._program import Op, Value


def after_bias(value: Value, axis: int) -> tuple[Value, int]:
    """Follow a result through casts and through sums with parameters."""
    while len(value.users) == 1:
        (op,) = value.users
        others = [v for v in op.ins if v is not value]
        out = op.outs[0]
        if op.name == "transpose":
            axis = list(op.eqn.params["permutation"]).index(axis)
        elif op.name in PASSING and out.aval.size == value.aval.size:
            if out.aval.shape != value.aval.shape:
                kept = out.aval.shape[-1:] == value.aval.shape[-1:]
                if axis != value.aval.ndim - 1 or not kept:
                    break
                axis = out.aval.ndim - 1
        elif not (op.name in ("add", "sub", "mul") and _all_parameters(others)):
            break
        if not jnp.issubdtype(out.aval.dtype, jnp.inexact):
            break
        value = out
    return value, axis


def _all_parameters(values: list[Value]) -> bool:
    return len(values) == 1 and values[0].is_parameter


def after_shift(value: Value) -> Value:
    """Follow a scaled result to the sum with the shift, or to the last product."""
    last = value
    for _ in range(8):
        if len(value.users) != 1:
            break
        (op,) = value.users
        others = [v for v in op.ins if v is not value]
        if op.name in ("add", "sub"):
            return op.outs[0] if _all_parameters(others) else last
        if op.name not in (*PASSING, "mul", "div"):
            break
        value = op.outs[0]
        if value.aval.size >= last.aval.size:
            last = value
    return last


def walk_back(value: Value, stop: Value | None = None) -> Value:
    """Follow logits back through masks, scales and casts.

    In a sum, follow the operand that is a product of two arrays of data: the other
    operand is a mask from the batch.
    """
    through = (*PASSING, "mul", "div", "add", "select_n", "tanh", "max")
    while value is not stop and value.maker is not None:
        if value.maker.name not in through:
            break
        before = _data(value)
        if len(before) > 1 and value.maker.name in ("add", "select_n"):
            before = [v for v in before if _is_product(walk_back(v, stop))]
        if len(before) != 1:
            break
        value = before[0]
    return value


def before_mask(value: Value) -> Value:
    """Follow masked logits back to the last array of logits that no mask changed."""
    before, seen = value, value
    while seen.maker is not None and seen.maker.name in (*PASSING, "add", "select_n"):
        operands = [v for v in _data(seen) if _is_product(walk_back(v))]
        if len(operands) != 1:
            break
        seen = operands[0]
        if seen.aval.shape == value.aval.shape:
            before = seen
    return before


def _data(value: Value) -> list[Value]:
    """Return the operands that are numbers of data."""
    assert value.maker is not None
    return [v for v in value.maker.ins if v.is_data and v.aval.dtype != bool]


def _is_product(value: Value) -> bool:
    """Whether two arrays of data make it, as queries and keys make logits."""
    maker = value.maker
    return (
        maker is not None
        and maker.name == "dot_general"
        and all(operand.is_data for operand in maker.ins)
    )


def is_passed_on(value: Value, target: Value) -> bool:
    while value is not target:
        if value.maker is None or value.maker.name not in PASSING:
            return False
        before = [v for v in value.maker.ins if v.is_data]
        if len(before) != 1:
            return False
        value = before[0]
    return True


def is_standardised(product: Op) -> bool:
    """Whether one factor was divided by a deviation: a parameter scales it again."""
    seen, frontier = set(), list(product.ins)
    while frontier:
        maker = frontier.pop().maker
        if maker is None or maker in seen or len(seen) > 64:
            continue
        seen.add(maker)
        if maker.name in ("rsqrt", "sqrt"):
            return True
        if maker.name in (*PASSING, "mul", "div", "sub", "add"):
            frontier += maker.ins
    return False


def is_in_a_norm(value: Value) -> bool:
    """Whether a value is only added up under a root, as squares are in a norm."""
    if not all(op.name == "reduce_sum" for op in value.users):
        return False
    seen, frontier = set(), [value]
    while frontier:
        for op in frontier.pop().users:
            if op.name in ("rsqrt", "sqrt"):
                return True
            if op.name in (
                *PASSING,
                "reduce_sum",
                "mul",
                "div",
                "add",
                "max",
                "select_n",
            ):
                frontier += [out for out in op.outs if out not in seen]
                seen.update(op.outs)
    return False


def is_one_hot(value: Value) -> bool:
    """Whether a comparison of indices makes it."""
    while value.maker is not None and value.maker.name in PASSING:
        value = value.maker.ins[0]
    return value.maker is not None and value.maker.name == "eq"


_NEAR = frozenset(
    [
        "add",
        "sub",
        "mul",
        "div",
        "slice",
        "split",
        "concatenate",
        "select_n",
        "dynamic_slice",
        "pad",
        "max",
        "reduce_window_max",
        "reduce_window_sum",
        "custom_vjp_call",  # As of `limit_gradient`.
    ]
) | frozenset(PASSING)


def is_near(value: Value, source: Value) -> bool:
    """Whether a value is a sum or a piece of `source`."""
    seen, frontier = set(), [value]
    while frontier:
        value = frontier.pop()
        if value is source:
            return True
        if value.maker is not None and value.maker.name in _NEAR and value not in seen:
            seen.add(value)
            frontier += [v for v in value.maker.ins if v.is_data]
    return False
