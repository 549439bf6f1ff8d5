"""The state of the optimizer inside a guard, for what reads such states."""

from typing import Any

import jax

from .. import _trees
from ._step import is_guard


def unwrap(state: Any) -> Any:
    """Return an optimizer state as it would be without any guard.

    Args:
        state: A state that holds guards' states anywhere, or none.

    Returns:
        The same pytree, with the state of the inner optimizer in place of each guard's.
        Arrays and containers are those of `state`, not copies, so that a rate set in
        `unwrap(state).hyperparams` is set in `state`.

    Raises:
        Nothing: a state without a guard is returned as it is.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import stablegrad as sg
        >>> params = {"w": jnp.ones(2)}
        >>> tx = sg.stabilize(optax.contrib.schedule_free_sgd(0.1))
        >>> state = sg.unwrap(tx.init(params))
        >>> optax.contrib.schedule_free_eval_params(state, params)["w"]
        Array([1., 1.], dtype=float32)
    """
    is_last = lambda node: is_guard(node) or not _trees.nodes(node, is_guard)

    def inner(node):
        return unwrap(node.guarded_inner) if is_guard(node) else node

    return jax.tree.map(inner, state, is_leaf=is_last)
