"""What a guard remembers for its user: the last step, totals, and recent events."""

from enum import IntEnum
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .._norms import LARGEST, Measurement
from .._trees import count_if, increment, least
from ..responses._base import Foresight, Verdict

EVENTS_KEPT = 64
# Fields of `LastStep` that may stand for a nan or an inf.
ENCODED = ("grad_norm", "clipped_grad_norm", "raw_update_norm", "loss_value")


class LastStep(NamedTuple):
    """The last step in numbers; rank-0, `encode`d so that the state stays finite."""

    grad_norm: jax.Array  # float32: L2 norm of the incoming gradient.
    clipped_grad_norm: jax.Array  # float32: the same, after clipping.
    clip_scale: jax.Array  # float32 in [0, 1]: smallest factor any leaf was clipped by.
    update_norm: jax.Array  # float32: norm of what was applied; 0 if skipped.
    raw_update_norm: jax.Array  # float32: norm of the optimizer's own update.
    loss_value: jax.Array  # float32: the loss passed as `value=`.
    lr_scale: jax.Array  # float32 in [0, 1]: factor on the learning rate in force.
    back_off_scale: jax.Array  # float32 in (0, 1]: of it, what `back_off` asks for.
    skipped: jax.Array  # bool: whether the step was rejected.
    skip_reason: jax.Array  # int32: a `Reason`, 0 if the step was taken.
    first_bad_leaf: jax.Array  # int32: first leaf with a nan or inf, -1 if none.
    largest_leaf: (
        jax.Array
    )  # int32: the leaf with the largest gradient norm, -1 if none.
    halted: jax.Array  # bool: too many non-finite steps with none taken.


class Totals(NamedTuple):
    """Counts since `init`; int32, rank-0, saturating."""

    guarded_steps: jax.Array  # All steps seen.
    clipped_steps: jax.Array  # Steps taken whose gradient or update was shrunk.
    skipped_steps: jax.Array  # Steps rejected.
    backed_off_steps: jax.Array  # Steps that cut the learning rate.
    shortened_steps: jax.Array  # Steps that a probe found harmful, and shortened.
    halted_steps: jax.Array  # Steps spent halted.
    consecutive_skips: jax.Array  # Steps rejected since one was last taken.


class EventKind(IntEnum):
    """What a guard did in a step; of several, the gravest is told."""

    SKIP = 1
    BACK_OFF = 2
    HALT = 3
    SHORTEN = 4


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
    """All that a guard remembers for its user."""

    last_step: LastStep
    limits: dict[str, jax.Array]  # float32, encoded: the limits the last step met.
    totals: Totals
    event_log: EventLog


def init_record(limit_names) -> Record:
    zero, one = jnp.zeros((), jnp.float32), jnp.ones((), jnp.float32)
    no, none = jnp.zeros((), bool), jnp.full((), -1, jnp.int32)
    last = LastStep(
        grad_norm=zero,
        clipped_grad_norm=zero,
        clip_scale=one,
        update_norm=zero,
        raw_update_norm=zero,
        loss_value=zero,
        lr_scale=one,
        back_off_scale=one,
        skipped=no,
        skip_reason=jnp.zeros((), jnp.int32),
        first_bad_leaf=none,
        largest_leaf=none,
        halted=no,
    )
    empty = jnp.full((EVENTS_KEPT,), -1, jnp.int32)
    codes = jnp.zeros((EVENTS_KEPT,), jnp.int32)
    numbers = jnp.zeros((EVENTS_KEPT,), jnp.float32)
    return Record(
        last,
        {name: zero for name in limit_names},
        Totals(*[jnp.zeros((), jnp.int32) for _ in Totals._fields]),
        EventLog(empty, empty, codes, codes, empty, numbers, numbers, numbers),
    )


def update_record(
    record: Record,
    gradient: Measurement,
    update: Measurement,
    verdict: Verdict,
    clipped_norm,
    applied_norm,
    limits: dict[str, jax.Array],
    loss,
    ahead: Foresight,
    halted,
) -> Record:
    """The record after one step."""
    skipped = verdict.reason > 0
    norms = gradient.leaf_norms
    largest = jnp.argmax(norms).astype(jnp.int32) if norms.size else jnp.int32(-1)
    last = LastStep(
        grad_norm=encode(gradient.norm),
        clipped_grad_norm=encode(clipped_norm),
        clip_scale=jnp.minimum(
            least(verdict.gradient_scale), least(verdict.update_scale)
        ),
        update_norm=jnp.where(skipped, 0.0, applied_norm),
        raw_update_norm=encode(update.norm),
        loss_value=encode(jnp.nan if loss is None else loss),
        lr_scale=verdict.lr_scale * ahead.step_scale,
        back_off_scale=verdict.lr_scale,
        skipped=skipped,
        skip_reason=verdict.reason,
        first_bad_leaf=jnp.where(
            gradient.finite, update.first_bad_leaf, gradient.first_bad_leaf
        ),
        largest_leaf=largest,
        halted=halted,
    )
    before, step = record.last_step, record.totals.guarded_steps
    clipped = (last.clip_scale < 1) & ~skipped
    backed_off = last.back_off_scale < before.back_off_scale
    shortened = ahead.alarm & ~skipped
    return Record(
        last,
        {
            name: encode(jnp.min(limit, initial=jnp.inf))
            for name, limit in limits.items()
        },
        count(record.totals, last, clipped, backed_off, shortened),
        log_event(record.event_log, step, last, backed_off, shortened),
    )


def encode(number) -> jax.Array:
    """A finite float32 for any number: the largest for inf, its negative for nan."""
    number = jnp.asarray(number).astype(jnp.float32)
    finite = jnp.where(number > 0, LARGEST, -LARGEST)
    return jnp.where(jnp.isfinite(number), number, finite)


def decode(number):
    """Undoes `encode`, up to -inf, which comes back as nan; of any shape."""
    number = jnp.where(number >= LARGEST, jnp.inf, number)
    return jnp.where(number <= -LARGEST, jnp.nan, number)


def count(totals: Totals, last: LastStep, clipped, backed_off, shortened) -> Totals:
    """Adds the last step to the totals."""
    flags = {
        "guarded_steps": jnp.ones((), bool),
        "clipped_steps": clipped,
        "skipped_steps": last.skipped,
        "backed_off_steps": backed_off,
        "shortened_steps": shortened,
        "halted_steps": last.halted,
    }
    added = {
        name: count_if(flag, getattr(totals, name)) for name, flag in flags.items()
    }
    run = jnp.where(last.skipped, increment(totals.consecutive_skips), 0)
    return Totals(**added, consecutive_skips=run)


def log_event(log: EventLog, step, last: LastStep, backed_off, shortened) -> EventLog:
    """Writes the gravest thing that happened in a step, if anything did.

    Steps in a row of one kind and reason are one event, and clipping is counted, not
    logged: neither may push out what is rare.
    """
    kind = jnp.where(shortened, int(EventKind.SHORTEN), 0)
    kind = jnp.where(backed_off, int(EventKind.BACK_OFF), kind)
    kind = jnp.where(last.skipped, int(EventKind.SKIP), kind)
    kind = jnp.where(last.halted, int(EventKind.HALT), kind).astype(jnp.int32)
    # Hardly any step has something to tell.
    return lax.cond(kind > 0, _with_event, lambda log, *_: log, log, step, last, kind)


def _with_event(log: EventLog, step, last: LastStep, kind) -> EventLog:
    """One more event, or a longer one."""
    latest = jnp.argmax(log.event_step)
    goes_on = (
        (log.event_kind[latest] == kind)
        & (log.event_reason[latest] == last.skip_reason)
        & (log.event_until[latest] == step - 1)
    )
    after = jnp.where(log.event_step[latest] < 0, 0, (latest + 1) % EVENTS_KEPT)
    slot = jnp.arange(EVENTS_KEPT) == jnp.where(goes_on, latest, after)
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
    begun = slot & ~goes_on
    written = jax.tree.map(lambda new, old: jnp.where(begun, new, old), row, log)
    return written._replace(event_until=jnp.where(slot, step, written.event_until))


class Event(NamedTuple):
    """One intervention, readable: what `events` returns."""

    step: int  # The first step, counted from 0; the numbers below are its own.
    until: int  # The last of the steps in a row with the same kind and reason.
    kind: str  # "skip", "back_off", "shorten" or "halt".
    reason: str  # The name of a `Reason`, in lower case; "" unless skipped.
    leaf: str  # The first bad leaf; if all are finite, the one with the largest norm.
    grad_norm: float
    loss: float  # nan if no `value=` was passed.
    lr_scale: float

    def __str__(self) -> str:
        why = f" ({self.reason.replace('_', ' ')})" if self.reason else ""
        when = f"step {self.step}"
        if self.until > self.step:
            when = f"steps {self.step} to {self.until}"
        return (
            f"{when}: {self.kind.replace('_', ' ')}{why}, leaf {self.leaf or '?'}, "
            f"gradient norm {self.grad_norm:.3g}, loss {self.loss:.3g}, "
            f"lr_scale {self.lr_scale:.3g}"
        )
