"""The learning rate that an optimizer was built with."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from .. import _checks

_ROUNDING = 1e-2  # Relative: hyperparameters may be kept in bfloat16.


def built_rate(tx, point, told: float | None) -> float:
    """What is told, else what `optax.inject_hyperparams` keeps in the state, else 1.

    Raises ValueError if the state keeps another rate than is told.
    """
    if told is not None:
        _checks.require(
            "learning_rate", told, "finite and > 0", lambda x: 0 < x < math.inf
        )
    if not _injected(jax.eval_shape(tx.init, point)):
        return 1.0 if told is None else told
    kept = [float(rate) for rate in _kept(tx, point)]
    if not all(0 < rate < math.inf for rate in kept):
        raise ValueError(
            f"`tx` must be built with a learning rate > 0, got {min(kept):g} in its "
            "state. A schedule with a warm-up starts at rate 0: build it without one."
        )
    if not _close(max(kept), min(kept)):
        among = ", ".join(f"{rate:.6g}" for rate in kept)
        raise ValueError(f"`tx` must have one learning rate, got {among} in its state.")
    if told is not None and not _close(told, kept[0]):
        raise ValueError(
            "`learning_rate` must be the rate that `tx` was built with, which is "
            f"{kept[0]:.6g} by its state, got {told:.6g}. Leave it out to have it read."
        )
    return kept[0] if told is None else told


def _close(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=_ROUNDING)


@functools.partial(jax.jit, static_argnames="tx")
def _kept(tx, point) -> list[jax.Array]:
    """The rates in a fresh state, of which nothing else is computed."""
    rates = [node.hyperparams["learning_rate"] for node in _injected(tx.init(point))]
    return [jnp.asarray(rate).astype(jnp.float32) for rate in rates]


def _injected(state) -> list[Any]:
    """The states of `optax.inject_hyperparams` that hold a learning rate."""

    def holds(node) -> bool:
        return "learning_rate" in (getattr(node, "hyperparams", None) or ())

    nodes = jax.tree.leaves(state, is_leaf=holds)
    return [node for node in nodes if holds(node)]
