"""What Adam divides its step by, read from its state."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

_FLOOR = 1e-2  # Of the root mean square of P.


def preconditioner(tx, state, grads, point, b1, b2, eps) -> jax.Array:
    """The flat, positive P of the next step, before any floor.

        P = (1 - b1^t) (sqrt(v_t / (1 - b2^t)) + eps)

    v_t has the current gradient mixed in. Without a count of steps in the state (as in
    RMSProp), neither bias is corrected.
    """
    before = tx.init(point) if state is None else state
    value = jnp.zeros((), jnp.float32)
    _, after = tx.update(grads, before, point, value=value)
    found: list[Any] = [
        node
        for node in jax.tree.leaves(after, is_leaf=lambda x: hasattr(x, "nu"))
        if hasattr(node, "nu")
    ]
    if len(found) != 1:
        raise ValueError(
            "`tx` must hold one second moment, a state with `nu` as Adam's and "
            f"RMSProp's, got {len(found)}. Leave `tx` out for the plain Hessian."
        )
    moments = ravel_pytree(found[0].nu)[0].astype(jnp.float32)
    count = getattr(found[0], "count", None)
    if count is None:
        return jnp.sqrt(moments) + eps
    steps = jnp.asarray(count).astype(jnp.float32)
    unbiased = moments / (1 - b2**steps)
    return (1 - b1**steps) * (jnp.sqrt(unbiased) + eps)


def floored(preconditioner) -> jax.Array:
    """P with every element at least 1 % of their root mean square.

    Coordinates whose gradient happens to vanish would own the largest eigenvalue.
    """
    rms = jnp.sqrt(jnp.mean(jnp.square(preconditioner)))
    return jnp.maximum(preconditioner, _FLOOR * rms)
