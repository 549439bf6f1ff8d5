"""The preconditioner of Adam and RMSProp, read from the optimizer's state."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree


class Decays(NamedTuple):
    """The decay rates of an optimizer's moments."""

    momentum: float
    b2: float
    averaged: bool  # Whether m = b m + (1 - b) g, kept as `mu`, and not m = b m + g.


def preconditioner(tx, state, grads, params, decays: Decays, eps) -> jax.Array:
    """The diagonal P of the next step, flat and positive, without a floor.

        P = (1 - b1^t) (sqrt(v_t / (1 - b2^t)) + eps)

    v_t includes the current gradient. There is no bias correction if the state has no
    step count (as in RMSProp); b1 is 0 if the momentum is not averaged.
    """
    before = tx.init(params) if state is None else state
    value = jnp.zeros((), jnp.float32)
    _, after = tx.update(grads, before, params, value=value)
    adam = second_moment(after, params)
    moments = ravel_pytree(adam.nu)[0].astype(jnp.float32)
    count = getattr(adam, "count", None)
    if count is None or callable(count):  # Every tuple has a method of that name.
        return jnp.sqrt(moments) + eps
    steps = jnp.asarray(count).astype(jnp.float32)
    root = jnp.sqrt(moments / (1 - decays.b2**steps)) + eps
    return root * (1 - decays.momentum**steps) if decays.averaged else root


def second_moment(state, params) -> Any:
    """The only node of a state that holds the second moments of all parameters."""
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    found = nodes_with("nu", state)
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(node.nu)) for node in found]
    if sizes != [size]:
        of = f" of {' and '.join(map(str, sizes))}" if sizes else ""
        raise ValueError(
            "`tx` must hold one second moment, a state with `nu` as in Adam and "
            f"RMSProp, of all {size} parameters, got {len(sizes)}{of}. Leave `tx` out "
            "for the plain Hessian, or pass as `params` those of one optimizer."
        )
    return found[0]


def nodes_with(field: str, state) -> list[Any]:
    """The nodes of a state that have a field of this name; methods do not count."""

    def has_field(node) -> bool:
        return hasattr(node, field) and not callable(getattr(node, field))

    leaves = jax.tree.leaves(state, is_leaf=has_field)
    return [node for node in leaves if has_field(node)]
