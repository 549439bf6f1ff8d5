"""The record of a guard: the last step, totals, and recent events."""

from enum import IntEnum
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .._norms import LARGEST
from .._packing import Packed, Packing
from .._trees import count_if, increment

EVENTS_KEPT = 64
NO_LOSS = np.float32(-LARGEST)  # What stands for the loss of a step without one.
# Fields of `LastStep` that may stand for a nan or an inf.
ENCODED = ("grad_norm", "clipped_grad_norm", "loss_value")


class LastStep(NamedTuple):
    """The last step in numbers; rank-0, `encode`d so that the state stays finite."""

    grad_norm: jax.Array  # float32: L2 norm of the incoming gradient.
    clipped_grad_norm: jax.Array  # float32: the same, after clipping.
    clip_scale: jax.Array  # float32 in [0, 1]: smallest factor any leaf was clipped by.
    loss_value: jax.Array  # float32: the loss passed as `value=`.
    lr_scale: jax.Array  # float32 in [0, 1]: factor on the learning rate in force.
    back_off_scale: jax.Array  # float32 in (0, 1]: the factor asked for by `back_off`.
    skipped: jax.Array  # bool: whether the step was rejected.
    skip_reason: jax.Array  # int32: a `Reason`, 0 if the step was taken.
    first_bad_leaf: jax.Array  # int32: first leaf with a nan or inf, -1 if none.
    largest_leaf: jax.Array  # int32: leaf with the largest gradient norm, -1 if none.
    kept_out_elements: jax.Array  # int32: elements of update and state not finite.
    halted: jax.Array  # bool: too many non-finite steps with none taken.


class Totals(NamedTuple):
    """Counts since `init`; int32, rank-0, saturating."""

    guarded_steps: jax.Array  # All steps seen.
    clipped_steps: jax.Array  # Steps taken whose gradient or update was shrunk.
    skipped_steps: jax.Array  # Steps rejected.
    backed_off_steps: jax.Array  # Steps that cut the learning rate.
    shortened_steps: jax.Array  # Steps that a probe found harmful, and shortened.
    kept_out_steps: jax.Array  # Steps in which some elements were kept out.
    halted_steps: jax.Array  # Steps spent halted.
    consecutive_skips: jax.Array  # Steps rejected since one was last taken.


class EventKind(IntEnum):
    """What a guard did in a step; of several, the gravest is logged."""

    SKIP = 1
    BACK_OFF = 2
    HALT = 3
    SHORTEN = 4
    KEEP_OUT = 5


class EventLog(NamedTuple):
    """A ring of the last interventions; every array has shape (EVENTS_KEPT,)."""

    event_step: jax.Array  # int32: the first step, counted from 0; -1 where empty.
    event_until: jax.Array  # int32: the last of the steps in a row that it covers.
    event_kind: jax.Array  # int32: an `EventKind`.
    event_reason: jax.Array  # int32: a `Reason`, 0 unless skipped.
    event_leaf: jax.Array  # int32: the leaf to look at first, -1 if none.
    event_grad_norm: jax.Array  # float32, `encode`d.
    event_loss: jax.Array  # float32, `encode`d.
    event_lr_scale: jax.Array  # float32 in [0, 1].


class Record(NamedTuple):
    """Everything that a guard remembers for its user."""

    last_step: LastStep
    totals: Totals
    extras: tuple  # Rank-0 limits and readings of responses, as `column_names` says.
    events_logged: jax.Array  # int32: since `init`.
    log: EventLog


def column_names(extras: dict[str, Any]) -> dict[str, None]:
    """Return dtypes and names of `extras` as the keys of a dict without arrays.

    Any checkpoint can hold it. Keys are numbered, because pytrees order dicts by key.
    """
    return {
        f"{i:03d} {jnp.result_type(number)} {name}": None
        for i, (name, number) in enumerate(extras.items())
    }


def read_record(columns: dict[str, None], packed: Packed) -> tuple[Record, list[str]]:
    """Unpack the record of a state, and the names of its extras."""
    described = [key.split(" ", 2)[1:] for key in sorted(columns)]
    extras = {name: jnp.zeros((), dtype) for dtype, name in described}
    packing = Packing(jax.eval_shape(lambda: init_record(extras)))
    return packing.unpack(packed), [name for _, name in described]


def init_record(extras: dict[str, Any]) -> Record:
    """Return the record before the first step, with further numbers by name."""
    zero, one = jnp.zeros((), jnp.float32), jnp.ones((), jnp.float32)
    no, none = jnp.zeros((), bool), jnp.full((), -1, jnp.int32)
    nought = jnp.zeros((), jnp.int32)
    last = LastStep(
        grad_norm=zero,
        clipped_grad_norm=zero,
        clip_scale=one,
        loss_value=zero,
        lr_scale=one,
        back_off_scale=one,
        skipped=no,
        skip_reason=nought,
        first_bad_leaf=none,
        largest_leaf=none,
        kept_out_elements=nought,
        halted=no,
    )
    empty = jnp.full((EVENTS_KEPT,), -1, jnp.int32)
    codes = jnp.zeros((EVENTS_KEPT,), jnp.int32)
    numbers = jnp.zeros((EVENTS_KEPT,), jnp.float32)
    return Record(
        last,
        Totals(*[nought for _ in Totals._fields]),
        tuple(extras.values()),
        nought,
        EventLog(empty, empty, codes, codes, empty, numbers, numbers, numbers),
    )


class Outcome(NamedTuple):
    """How a step went, for the record."""

    step: LastStep
    extras: tuple
    backed_off: jax.Array  # bool: `back_off` cut the learning rate.
    shortened: jax.Array  # bool: a probe found the step harmful.


def after_step(record: Record, outcome: Outcome) -> Record:
    """Return the record after one step."""
    last, before = outcome.step, record.totals
    skipped, kept_out = last.skipped, last.kept_out_elements > 0
    shortened = outcome.shortened & ~skipped
    flags = {
        "guarded_steps": jnp.ones((), bool),
        "clipped_steps": (last.clip_scale < 1) & ~skipped,
        "skipped_steps": skipped,
        "backed_off_steps": outcome.backed_off,
        "shortened_steps": shortened,
        "kept_out_steps": kept_out,
        "halted_steps": last.halted,
    }
    counts = {
        name: count_if(flag, getattr(before, name)) for name, flag in flags.items()
    }
    run = jnp.where(skipped, increment(before.consecutive_skips), 0)
    kind = jnp.zeros((), jnp.int32)
    for flag, own in (
        (kept_out, EventKind.KEEP_OUT),
        (shortened, EventKind.SHORTEN),
        (outcome.backed_off, EventKind.BACK_OFF),
        (skipped, EventKind.SKIP),
        (last.halted, EventKind.HALT),
    ):
        kind = jnp.where(flag, jnp.int32(own), kind)
    events, log = log_event(
        record.events_logged, record.log, before.guarded_steps, last, kind
    )
    totals = Totals(**counts, consecutive_skips=run)
    return Record(last, totals, outcome.extras, events, log)


def log_event(events, log: EventLog, step, last: LastStep, kind):
    """Log what happened in a step, if anything did.

    Steps in a row of one kind and reason are one event. Clipping is counted, not
    logged: it would push out what is rare.
    """
    # A state that was reset to zeros has events at step 0 without a kind.
    latest = (events - 1) % EVENTS_KEPT
    happened = kind > 0
    goes_on = (
        (events > 0)
        & (log.event_kind[latest] == kind)
        & (log.event_reason[latest] == last.skip_reason)
        & (log.event_until[latest] == step - 1)
    )
    begins = happened & ~goes_on
    place = lax.iota(jnp.int32, EVENTS_KEPT)
    written = begins & (place == events % EVENTS_KEPT)
    extended = happened & (written | (goes_on & (place == latest)))
    leaf = jnp.where(last.first_bad_leaf >= 0, last.first_bad_leaf, last.largest_leaf)
    row = EventLog(
        event_step=step,
        event_until=step,
        event_kind=kind,
        event_reason=last.skip_reason,
        event_leaf=leaf,
        event_grad_norm=last.grad_norm,
        event_loss=last.loss_value,
        event_lr_scale=last.lr_scale,
    )
    new = jax.tree.map(lambda own, old: jnp.where(written, own, old), row, log)
    until = jnp.where(extended, step, new.event_until)
    return count_if(begins, events), new._replace(event_until=until)


class Event(NamedTuple):
    """One intervention, readable: what `events` returns."""

    step: int  # The first step, counted from 0; the numbers below are its own.
    until: int  # The last of the steps in a row with the same kind and reason.
    kind: str  # "skip", "back_off", "shorten", "keep_out" or "halt".
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
            f"{who}{when}: {self.kind.replace('_', ' ')}{why}, leaf {self.leaf or '?'}, "
            f"gradient norm {self.grad_norm:.3g}, loss {self.loss:.3g}, "
            f"lr_scale {self.lr_scale:.3g}"
        )
