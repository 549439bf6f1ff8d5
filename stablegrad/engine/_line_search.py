"""Line searches of Optax: inner optimizers that evaluate the loss along their step.

`optax.value_and_grad_from_state` reads the loss and the gradient that a line search
computed where its own step leads. A guard that shortens the step, or keeps elements of
it out, leads elsewhere.
"""

from typing import Any

import jax
import jax.numpy as jnp

from .. import _trees


def forget_value(state: Any, changed: jax.Array) -> Any:
    """Make every line search in a state recompute its value if a step was changed.

    An infinite value is how Optax marks one that is not known.
    """

    def forget(node):
        if not _is_line_search(node):
            return node
        value = jnp.asarray(node.value)
        unknown = jnp.asarray(jnp.inf, value.dtype)
        return node._replace(value=jnp.where(changed, unknown, value))

    return jax.tree.map(forget, state, is_leaf=_is_line_search)


def has_line_search(state: Any) -> bool:
    """Return whether an optimizer's state holds that of a line search."""
    return bool(_trees.nodes(state, _is_line_search))


def _is_line_search(node: Any) -> bool:
    fields = getattr(node, "_fields", ())
    return all(name in fields for name in ("value", "grad", "learning_rate"))
