"""What Adam divides its step by, read from its state."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

_FLOOR = 1e-2  # Of the root mean square of P.


class Decays(NamedTuple):
    """What the stability of a step depends on, besides the curvature."""

    momentum: float
    b2: float
    averaged: bool  # Whether m = b m + (1 - b) g, kept as `mu`, not m = b m + g.


def preconditioner(tx, state, grads, point, decays: Decays, eps) -> jax.Array:
    """The flat, positive P of the next step, before any floor.

        P = (1 - b1^t) (sqrt(v_t / (1 - b2^t)) + eps)

    v_t has the current gradient mixed in. Without a count of steps in the state (as in
    RMSProp), neither bias is corrected; without an averaged momentum, b1 is 0.
    """
    before = tx.init(point) if state is None else state
    value = jnp.zeros((), jnp.float32)
    _, after = tx.update(grads, before, point, value=value)
    node = second_moment(after, point)
    moments = ravel_pytree(node.nu)[0].astype(jnp.float32)
    count = getattr(node, "count", None)
    if count is None or callable(count):  # Every tuple has a method of that name.
        return jnp.sqrt(moments) + eps
    steps = jnp.asarray(count).astype(jnp.float32)
    root = jnp.sqrt(moments / (1 - decays.b2**steps)) + eps
    return root * (1 - decays.momentum**steps) if decays.averaged else root


def floored(preconditioner) -> jax.Array:
    """P with every element at least 1 % of their root mean square.

    Coordinates whose gradient happens to vanish would own the largest eigenvalue.
    """
    rms = jnp.sqrt(jnp.mean(jnp.square(preconditioner)))
    return jnp.maximum(preconditioner, _FLOOR * rms)


def second_moment(state, point) -> Any:
    """The one node of a state that holds a second moment of every parameter."""
    size = sum(leaf.size for leaf in jax.tree.leaves(point))
    found = holding("nu", state)
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(node.nu)) for node in found]
    if sizes != [size]:
        of = f" of {' and '.join(map(str, sizes))}" if sizes else ""
        raise ValueError(
            "`tx` must hold one second moment, a state with `nu` as Adam's and "
            f"RMSProp's, of all {size} parameters, got {len(sizes)}{of}. Leave `tx` "
            "out for the plain Hessian, or pass as `params` those of one optimizer."
        )
    return found[0]


def holding(field: str, state) -> list[Any]:
    """The nodes of a state that have a field; an array's methods are none."""

    def holds(node) -> bool:
        return not callable(getattr(node, field, holds))

    return [node for node in jax.tree.leaves(state, is_leaf=holds) if holds(node)]
