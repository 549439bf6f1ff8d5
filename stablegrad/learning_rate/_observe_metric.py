"""Feeding a plateau from outside the step, as with a validation metric."""

from typing import Any, TypeVar

import jax

from .._signals import scalar_signal
from ._evaluations import PlateauState, evaluate, metric_name, plain

State = TypeVar("State")


def observe_metric(state: State, *, value: Any) -> State:
    """Gives a metric to every plateau in an optimizer state that waits for one.

    For a metric that is not known at every step, such as a validation loss once an
    epoch; it is an evaluation of each `reduce_on_plateau(..., metric=None)`. The scale
    is cut at once, and used from the next step on.

    Args:
        state: A state that holds a plateau's anywhere: in a chain, in a wrapper, in a
            guard; also a whole Linen train state, or NNX's `optimizer.opt_state`.
        value: The metric, a real scalar. A nan or inf is counted, and ignored.

    Returns:
        A new state of the same structure, shapes and dtypes; it is a pure function, for
        use inside or outside jit. Assign it back:

        - optax: `state = sg.observe_metric(state, value=metric)`
        - Linen: `train_state = sg.observe_metric(train_state, value=metric)`
        - NNX: `optimizer.opt_state = sg.observe_metric(
          optimizer.opt_state, value=metric)`

    Raises:
        ValueError: If no plateau in the state waits for a metric, either because there
            is none or because `update` feeds it; or if `value` is no scalar.

    Example:
        >>> import optax
        >>> import stablegrad as sg
        >>> tx = optax.chain(optax.sgd(0.1), sg.reduce_on_plateau(metric=None))
        >>> state = sg.observe_metric(tx.init({"w": 1.0}), value=0.5)
        >>> sg.metrics(state)["plateau_best"].item()
        0.5
    """
    (metric,) = scalar_signal("value", value)
    nodes, structure = jax.tree.flatten(state, is_leaf=_is_plateau)
    fed_by = [metric_name(node) for node in nodes if _is_plateau(node)]
    if None not in fed_by:
        raise _nothing_waits(fed_by)
    return structure.unflatten(
        [
            _fed(node, metric)
            if _is_plateau(node) and metric_name(node) is None
            else node
            for node in nodes
        ]
    )


def _fed(state: PlateauState, metric) -> PlateauState:
    evaluated = evaluate(plain(state), metric)
    return jax.tree.structure(state).unflatten(jax.tree.leaves(evaluated))


def _is_plateau(node: Any) -> bool:
    return isinstance(node, PlateauState)


def _nothing_waits(fed_by: list) -> ValueError:
    if fed_by:
        return ValueError(
            f"every plateau in this optimizer state is fed by `update`, from "
            f"`{fed_by[0]}=`: a second source would be judged against the first. Build "
            "it with `reduce_on_plateau(..., metric=None)` to feed it from here."
        )
    return ValueError(
        "there is no plateau in this optimizer state. Chain in "
        "`reduce_on_plateau(..., metric=None)`, and pass its state: the one from "
        "`tx.init`, Linen's `train_state`, NNX's `optimizer.opt_state`."
    )
