"""Pass a metric to plateaus outside of the training step."""

from typing import Any, TypeVar

import jax

from .._trees import nodes, without_variables
from ..thresholds._signals import scalar_signal
from ._evaluations import PlateauState, evaluate

State = TypeVar("State")


def observe_metric(state: State, *, value: Any) -> State:
    """Pass a metric to every `reduce_on_plateau` in an optimizer state.

    Use it for a metric that is not known at every step, such as a validation loss once
    an epoch. The reduced scale is used from the next step on. If steps pass `value=`
    for another transformation, build the plateau with `metric=None`.

    Args:
        state: A state that contains a plateau's state: that of a chain, a wrapper or a
            guard, a Linen train state, or NNX's `optimizer.opt_state`.
        value: The metric, a real scalar. A nan or inf is counted and ignored.

    Returns:
        A new state of the same structure, shapes and dtypes, to assign where `state`
        was, such as to `optimizer.opt_state`. The function is pure and can be jitted.

    Raises:
        ValueError: If the state contains no plateau, or `value` is not a scalar.

    Example:
        >>> import optax
        >>> import stablegrad as sg
        >>> tx = optax.chain(optax.sgd(0.1), sg.reduce_on_plateau())
        >>> state = sg.observe_metric(tx.init({"w": 1.0}), value=0.5)
        >>> sg.metrics(state)["plateau_best"].item()
        0.5
    """
    (metric,) = scalar_signal("value", value)
    if not nodes(state, _is_plateau):
        raise ValueError(
            "there is no plateau in this optimizer state. Add `reduce_on_plateau(...)` "
            "to the chain, and pass its state: the one from `tx.init`, Linen's "
            "`train_state`, or NNX's `optimizer.opt_state`."
        )

    def observe(node):
        if not _is_plateau(node):
            return node
        evaluated = evaluate(without_variables(node), metric)
        return jax.tree.structure(node).unflatten(jax.tree.leaves(evaluated))

    return jax.tree.map(observe, state, is_leaf=_is_plateau)


def _is_plateau(node: Any) -> bool:
    return isinstance(node, PlateauState)
