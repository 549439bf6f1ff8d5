"""Finding the guards inside a state, and reading their records."""

import re
from typing import Any

import jax
import numpy as np

from . import _trees
from ._packing import decode, on_host
from .engine._record import (
    ENCODED,
    LastStep,
    Record,
    dtypes_and_names,
    last_step_of,
    read_record,
    totals_of,
)
from .engine._step import GuardState, is_guard
from .responses._layers import readings

LIMIT_NAME = re.compile(r"_limit(_\d+)?$")


def guards(state: Any) -> list[GuardState]:
    """Return every guard's state in `state`, an outer guard before an inner one."""
    found = search(_trees.without_variables(state))
    if not found:
        raise ValueError(
            "there is no guard in this optimizer state. Build the optimizer with "
            "`stabilize(...)` or `guard(...)`, and pass its state: the one from "
            "`tx.init`, Linen's `train_state.opt_state`, NNX's `optimizer.opt_state`."
        )
    return found


def search(state: Any) -> list[GuardState]:
    """Return the same, or nothing if there is none."""
    found: list[GuardState] = []
    for guard in _trees.nodes(state, is_guard):
        found += [guard, *search(guard.guarded_inner)]
    return found


def without_snapshots(state: Any) -> Any:
    """Return a state without the copies of itself that `roll_back` keeps."""

    def strip(node):
        if not is_guard(node):
            return node
        inner = without_snapshots(node.guarded_inner)
        return node._replace(guarded_inner=inner, snapshots=())

    return jax.tree.map(strip, state, is_leaf=is_guard)


def member(guard_state: GuardState, index: tuple[int, ...]) -> GuardState:
    """Return the state of one member of an ensemble, without inner state."""
    bare = guard_state._replace(guarded_inner=(), snapshots=())
    return jax.tree.map(lambda array: np.asarray(array)[index], bare)


def record_of(guard_state: GuardState) -> tuple[Record, dict[str, Any]]:
    """Unpack a guard's record: on the host, unless it is traced."""
    return read_record(guard_state.columns, on_host(guard_state.numbers))


def numbers(guard_state: GuardState) -> dict[str, jax.Array]:
    """Return what `metrics` shows of one guard."""
    record, extras = record_of(guard_state)
    last = last_step_of(record)._asdict()
    for name in ENCODED:
        last[name] = decode(last[name])
    layers = readings(guard_state.layers) if guard_state.layers else {}
    return {**last, **extras, **totals_of(record)._asdict(), **layers}


def limit_names(guard_state: GuardState) -> tuple[str, ...]:
    """Return the names of all limits, in the order of the thresholds."""
    names = [name for _, name in dtypes_and_names(guard_state.columns)]
    return tuple(name for name in names if LIMIT_NAME.search(name))


def last_step(guard_state: GuardState) -> LastStep:
    """Return the last step of one guard."""
    return last_step_of(record_of(guard_state)[0])
