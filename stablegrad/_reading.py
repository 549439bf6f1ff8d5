"""Finding the guards inside a state, and reading their records."""

from typing import Any, NamedTuple

import jax
import numpy as np

from . import _trees
from ._packing import decode, on_host
from .engine._record import (
    ENCODED,
    EventKind,
    LastStep,
    Record,
    last_step_of,
    read_record,
    totals_of,
)
from .engine._step import GuardState
from .responses._layers import readings
from .responses._reasons import Reason


class Event(NamedTuple):
    """One intervention, readable: what `events` returns."""

    step: int  # The first step, counted from 0; the numbers below are its own.
    until: int  # The last of the steps in a row with the same kind and reason.
    # "skip", "back_off", "roll_back", "shorten", "keep_out", "warn" or "halt".
    kind: str
    reason: str  # The name of a `Reason`, in lower case; "" unless skipped.
    leaf: str  # The first bad leaf; if all are finite, the one with the largest norm.
    grad_norm: float
    loss: float  # nan if no `value=` was passed.
    lr_scale: float
    member: int | None = None  # Of an ensemble; None for a single model.

    def __str__(self) -> str:
        why = f" ({self.reason.replace('_', ' ')})" if self.reason else ""
        who = "" if self.member is None else f"member {self.member}, "
        when = f"step {self.step}"
        if self.until > self.step:
            when = f"steps {self.step} to {self.until}"
        return (
            f"{who}{when}: {self.kind.replace('_', ' ')}{why}, "
            f"leaf {self.leaf or '?'}, "
            f"gradient norm {self.grad_norm:.3g}, loss {self.loss:.3g}, "
            f"lr_scale {self.lr_scale:.3g}"
        )


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
    for leaf in jax.tree.leaves(state, is_leaf=_is_guard):
        if _is_guard(leaf):
            found.append(leaf)
            found += search(leaf.guarded_inner)
    return found


def without_snapshots(state: Any) -> Any:
    """Return a state without the copies of itself that `roll_back` keeps."""

    def strip(node):
        if not _is_guard(node):
            return node
        inner = without_snapshots(node.guarded_inner)
        return node._replace(guarded_inner=inner, snapshots=())

    return jax.tree.map(strip, state, is_leaf=_is_guard)


def _is_guard(node: Any) -> bool:
    return isinstance(node, GuardState)


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


def events_of(record: Record, names: tuple[str, ...]) -> list[Event]:
    """List the events of one guard, or of every member of an ensemble."""
    codes, until, numbers = jax.tree.map(np.asarray, record.log)
    listed = []
    for *member, row in np.argwhere((codes[..., 0] >= 0) & (codes[..., 1] > 0)):
        at = (*member, row)
        step, kind, reason, leaf = codes[at].tolist()
        grad_norm, loss, lr_scale = (float(decode(x)) for x in numbers[at])
        listed.append(
            Event(
                step=step,
                until=int(until[at]),
                kind=EventKind(kind).name.lower(),
                reason=Reason(reason).name.lower() if reason else "",
                leaf=names[leaf] if 0 <= leaf < len(names) else "",
                grad_norm=grad_norm,
                loss=loss,
                lr_scale=lr_scale,
                member=_flat_index(member, codes.shape[:-2]),
            )
        )
    return listed


def _flat_index(member: list, shape: tuple[int, ...]) -> int | None:
    """Return the number of an ensemble's member, None for a single model."""
    return int(np.ravel_multi_index(member, shape)) if member else None


def last_step(guard_state: GuardState) -> LastStep:
    """Return the last step of one guard."""
    return last_step_of(record_of(guard_state)[0])
