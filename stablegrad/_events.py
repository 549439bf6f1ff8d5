"""Events: what a guard did, in words and numbers."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import numpy as np

from . import _reading, _trees
from ._packing import decode
from .engine._event_log import NO_BATCH
from .engine._record import EventKind, Record
from .responses._reasons import FIRST_OUTLIER, Reason
from .thresholds._signals import NAMES


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
    # The signal that was not normal: "grad_norm", "value" or "update_norm". For a
    # function it is the metric's name without `_limit`. "": no threshold was exceeded.
    signal: str = ""
    value: float = float("nan")  # The value of the signal.
    limit: float = float("nan")  # The largest value that was normal; inf: none yet.
    batch_ids: tuple[int, ...] = ()  # As passed by `batch_id=`, while they are kept.
    # Which of several guards in the state, as in the names of `metrics`; None if one.
    guard: int | None = None

    def __str__(self) -> str:
        why = f" ({self.reason.replace('_', ' ')})" if self.reason else ""
        which = {"guard": self.guard, "member": self.member}
        who = "".join(f"{k} {i}, " for k, i in which.items() if i is not None)
        when = f"step {self.step}"
        if self.until > self.step:
            when = f"steps {self.step} to {self.until}"
        above = ""
        if self.value > self.limit:
            above = f", {self.signal} {self.value:.3g} above {self.limit:.3g}"
        return (
            f"{who}{when}: {self.kind.replace('_', ' ')}{why}, "
            f"leaf {self.leaf or '?'}, "
            f"gradient norm {self.grad_norm:.3g}, loss {self.loss:.3g}, "
            f"lr_scale {self.lr_scale:.3g}{above}"
        )


class Events(list[Event]):
    """A list of events that knows how many older ones are gone."""

    def __init__(self, listed: Iterable[Event] = (), forgotten: int = 0):
        """Take the events, and the number of those that were logged before them."""
        super().__init__(listed)
        self.forgotten = forgotten

    def __str__(self) -> str:
        lines = [str(event) for event in self]
        if self.forgotten:
            lines.insert(0, f"{self.forgotten} older events are no longer known")
        return "\n".join(lines) or "no events"


def events(state: Any, params: Any = None) -> Events:
    """List the last interventions, oldest first, with the leaf to look at by name.

    Host only: it reads the numbers. A guard remembers the last 64 times that it
    skipped, backed off, shortened, kept elements out, rolled back, warned or halted;
    steps in a row of one kind and reason are one event. Clipped steps are not listed,
    since they would push out the rarer events: see `metrics`. `save_events` keeps all
    events.

    Args:
        state: A state with a guard's state anywhere in it, as for `metrics`.
        params: A pytree whose names are used instead of those that the guard stored.

    Returns:
        A list of `Event`s: first and last step (from 0), kind, reason, leaf, gradient
        norm, loss, learning-rate scale, the signal that was not normal with its value
        and limit, the ids of the batches, and which of several guards or members it
        was. `str(event)` is a sentence. The list's `forgotten` says how many older
        events were logged that it no longer has.

    Raises:
        ValueError: If there is no guard in the state.
        TypeError: Inside jit.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import stablegrad as sg
        >>> tx = sg.guard(optax.sgd(0.1), sg.skip(sg.nonfinite()))
        >>> params = {"dense": {"bias": jnp.zeros(2), "kernel": jnp.zeros((2, 2))}}
        >>> bad = {"dense": {"bias": jnp.ones(2), "kernel": jnp.full((2, 2), jnp.inf)}}
        >>> _, state = tx.update(bad, tx.init(params), params, batch_id=17)
        >>> print(sg.events(state)[0])  # doctest: +ELLIPSIS
        step 0: skip (gradient overflow), leaf dense.kernel, gradient norm inf, ...
        >>> sg.events(state)[0].batch_ids, sg.events(state).forgotten
        ((17,), 0)
    """
    _trees.require_host("events", state)
    listed, forgotten = [], 0
    guards = _reading.guards(state)
    for number, guard_state in enumerate(guards):
        names = _trees.leaf_names(params) if params is not None else ()
        names = names or _trees.decode_names(guard_state.names)
        record, _ = _reading.record_of(guard_state)
        own = _events_of(record, names, _reading.limit_names(guard_state))
        if len(guards) > 1:
            own = [event._replace(guard=number) for event in own]
        listed += own
        forgotten += int(np.sum(np.asarray(record.log.logged)[..., 0])) - len(own)
    return Events(sorted(listed, key=event_key), forgotten)


def event_key(event: Event) -> tuple[int, int, int, str]:
    """Return the key that identifies an event, and by which events are sorted."""
    return event.member or 0, event.step, event.guard or 0, event.kind


def _events_of(
    record: Record, names: tuple[str, ...], limits: tuple[str, ...]
) -> list[Event]:
    """List the events of one guard, or of every member of an ensemble."""
    log = jax.tree.map(np.asarray, record.log)
    listed = []
    for *member, row in np.argwhere(log.codes[..., 1] > 0):
        at = (*member, row)
        step, kind, reason, leaf, cause = log.codes[at].tolist()
        numbers = [float(decode(x)) for x in log.numbers[at]]
        grad_norm, loss, lr_scale, value, limit = numbers
        signal = signal_of(limits[cause]) if cause >= 0 else ""
        if not signal and 0 < reason < FIRST_OUTLIER:
            signal = "grad_norm"  # The engine itself refuses what is not finite.
        until = int(log.until[at])
        batches = log.batches[tuple(member)]
        own = (batches[:, 0] >= step) & (batches[:, 0] <= until)
        own &= batches[:, 1] != NO_BATCH
        listed.append(
            Event(
                step=step,
                until=until,
                kind=EventKind(kind).name.lower(),
                reason=Reason(reason).name.lower() if reason else "",
                leaf=names[leaf] if 0 <= leaf < len(names) else "",
                grad_norm=grad_norm,
                loss=loss,
                lr_scale=lr_scale,
                member=_flat_index(member, log.codes.shape[:-2]),
                signal=signal,
                value=value if signal else float("nan"),
                limit=limit if signal else float("nan"),
                batch_ids=tuple(batches[own][batches[own, 0].argsort(), 1].tolist()),
            )
        )
    return listed


def signal_of(limit_name: str) -> str:
    """Return the signal in the name of a limit, as "value" in `skip_fixed_value_limit`.

    For a signal that is a function, return the whole name without `_limit`.
    """
    base, number = limit_name.rsplit("_limit", 1)
    standard = [name for name in NAMES if base.endswith(f"_{name}")]
    return standard[0] if standard else base + number


def _flat_index(member: list, shape: tuple[int, ...]) -> int | None:
    """Return the number of an ensemble's member, None for a single model."""
    return int(np.ravel_multi_index(member, shape)) if member else None
