"""Feeding a plateau from outside the step, as with a validation metric."""

from typing import Any, TypeVar

import jax

from ..thresholds._signals import scalar_signal
from ._evaluations import PlateauState, evaluate, plain

State = TypeVar("State")


def observe_metric(state: State, *, value: Any) -> State:
    """Gives a metric to every plateau in an optimizer state.

    For a metric that is not known at every step, such as a validation loss once an
    epoch; it is a value for each `reduce_on_plateau`. The scale is cut at once, and
    used from the next step on. Where steps are passed a `value=` for another
    transformation, build the plateau with `metric=None`: two metrics of different kinds
    would be judged against each other.

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
        ValueError: If there is no plateau in the state, or if `value` is no scalar.

    Example:
        >>> import optax
        >>> import stablegrad as sg
        >>> tx = optax.chain(optax.sgd(0.1), sg.reduce_on_plateau())
        >>> state = sg.observe_metric(tx.init({"w": 1.0}), value=0.5)
        >>> sg.metrics(state)["plateau_best"].item()
        0.5
    """
    (metric,) = scalar_signal("value", value)
    nodes, structure = jax.tree.flatten(state, is_leaf=_is_plateau)
    if not any(_is_plateau(node) for node in nodes):
        raise ValueError(
            "there is no plateau in this optimizer state. Chain in "
            "`reduce_on_plateau(...)`, and pass its state: the one from `tx.init`, "
            "Linen's `train_state`, NNX's `optimizer.opt_state`."
        )
    return structure.unflatten(
        [_fed(node, metric) if _is_plateau(node) else node for node in nodes]
    )


def _fed(state: PlateauState, metric) -> PlateauState:
    evaluated = evaluate(plain(state), metric)
    return jax.tree.structure(state).unflatten(jax.tree.leaves(evaluated))


def _is_plateau(node: Any) -> bool:
    return isinstance(node, PlateauState)
