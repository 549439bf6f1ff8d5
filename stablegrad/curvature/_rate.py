"""The learning rate that an optimizer was built with."""

import math

import jax
import jax.numpy as jnp

from .. import _checks

_ROUNDING = 1e-2  # Relative: hyperparameters may be kept in bfloat16.


def built_rate(tx, params, learning_rate: float | None) -> float:
    """The given rate, else that in the state of `optax.inject_hyperparams`, else 1.

    Raises ValueError if the state holds another rate than the given one.
    """
    if learning_rate is not None:
        _checks.require(
            "learning_rate", learning_rate, "finite and > 0", lambda x: 0 < x < math.inf
        )
    # Under `jax.jit` nothing else of the state is computed.
    rates = [float(rate) for rate in jax.jit(lambda x: _rates(tx.init(x)))(params)]
    if not rates:
        return 1.0 if learning_rate is None else learning_rate
    if not (0 < min(rates) < math.inf and _close(min(rates), max(rates))):
        raise ValueError(
            "`tx` must have one learning rate > 0, got "
            f"{', '.join(f'{rate:.6g}' for rate in rates)} in its state. A schedule "
            "with a warm-up starts at rate 0: build it without one."
        )
    if learning_rate is None:
        return rates[0]
    if not _close(learning_rate, rates[0]):
        raise ValueError(
            "`learning_rate` must be the rate that `tx` was built with, which is "
            f"{rates[0]:.6g} by its state, got {learning_rate:.6g}. Leave it out to "
            "use the rate in the state."
        )
    return learning_rate


def _close(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=_ROUNDING)


def _rates(state) -> list[jax.Array]:
    """The learning rates in the states of `optax.inject_hyperparams`."""

    def has_rate(node) -> bool:
        return "learning_rate" in (getattr(node, "hyperparams", None) or ())

    nodes = jax.tree.leaves(state, is_leaf=has_rate)
    rates = [node.hyperparams["learning_rate"] for node in nodes if has_rate(node)]
    return [jnp.asarray(rate, jnp.float32) for rate in rates]
