"""The event log: a ring of the last interventions, and what each was due to."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .. import _checks
from .._norms import OVERFLOW
from .._packing import encode
from .._trees import count_if, select
from ..responses._base import Response
from ..responses._reasons import reason_code
from ._families import PerThreshold

EVENTS_KEPT = 64
BATCHES_KEPT = 256
NO_BATCH = -1  # The id of a batch without one.

CODES = ("step", "kind", "reason", "leaf", "cause")  # -1 where a row is empty.
NUMBERS = ("grad_norm", "loss", "lr_scale", "value", "limit")  # `encode`d.


class EventLog(NamedTuple):
    """A ring of the last interventions, one row an event, and of their batches."""

    logged: jax.Array  # int32 (2,): events and batches since `init`.
    latest: jax.Array  # int32 (3,): kind, reason and last step of the last event.
    codes: jax.Array  # int32 (EVENTS_KEPT, 5): see `CODES`; of the first step.
    until: jax.Array  # int32 (EVENTS_KEPT,): the last of the steps that it covers.
    numbers: jax.Array  # float32 (EVENTS_KEPT, 5): see `NUMBERS`.
    batches: jax.Array  # int32 (BATCHES_KEPT, 2): step and id, -1 where it is empty.


class Cause(NamedTuple):
    """What made a guard intervene."""

    threshold: jax.Array  # int32: which of all thresholds, -1: none of them.
    value: jax.Array  # float32: its signal; without one, the gradient norm.
    limit: jax.Array  # float32: its limit; without one, that of an overflow.


class Incident(NamedTuple):
    """One step as the log sees it; rank-0."""

    kind: jax.Array  # int32: an `EventKind`, 0: nothing to log.
    reason: jax.Array  # int32: a `Reason`.
    step: jax.Array  # int32, counted from 0.
    leaf: jax.Array  # int32: the leaf to look at.
    numbers: tuple[jax.Array, ...]  # float32: the first of `NUMBERS`.
    cause: Cause
    batch: jax.Array  # int32: its id, or `NO_BATCH`.


def init_log() -> EventLog:
    """Return an empty log."""
    return EventLog(
        jnp.zeros((2,), jnp.int32),
        jnp.zeros((3,), jnp.int32),
        jnp.full((EVENTS_KEPT, len(CODES)), -1, jnp.int32),
        jnp.full((EVENTS_KEPT,), -1, jnp.int32),
        jnp.zeros((EVENTS_KEPT, len(NUMBERS)), jnp.float32),
        jnp.full((BATCHES_KEPT, 2), -1, jnp.int32),
    )


def log_incident(log: EventLog, incident: Incident) -> EventLog:
    """Log what happened in a step, if anything did.

    Steps in a row of one kind and reason are one event. Clipping is counted, not
    logged: it would push out what is rare.
    """
    kind, reason, step, leaf, numbers, cause, batch = incident
    events, batches = log.logged[0], log.logged[1]
    happened = kind > 0
    same = jnp.stack([kind, reason, step - 1])
    goes_on = (events > 0) & jnp.all(log.latest == same)
    begins = happened & ~goes_on
    place = lax.iota(jnp.int32, EVENTS_KEPT)
    written = begins & (place == events % EVENTS_KEPT)
    latest = (events - 1) % EVENTS_KEPT
    extended = happened & (written | (goes_on & (place == latest)))
    codes = jnp.stack([step, kind, reason, leaf, cause.threshold])[None]
    row = jnp.stack([*numbers, encode(cause.value), encode(cause.limit)])[None]
    named = happened & (batch != NO_BATCH)
    place = lax.iota(jnp.int32, BATCHES_KEPT)
    used = named & (place == batches % BATCHES_KEPT)
    return EventLog(
        count_if(jnp.stack([begins, named]), log.logged),
        jnp.where(happened, jnp.stack([kind, reason, step]), log.latest),
        jnp.where(written[:, None], codes, log.codes),
        jnp.where(extended, step, log.until),
        jnp.where(written[:, None], row, log.numbers),
        jnp.where(used[:, None], jnp.stack([step, batch])[None], log.batches),
    )


def cause_of(
    responses: tuple[Response, ...],
    states: tuple,
    judgements: PerThreshold,
    reason,
    backed_off,
    grad_norm,
) -> Cause:
    """Return the first threshold that caused a rejection or a cut."""
    found = Cause(jnp.int32(-1), grad_norm, jnp.float32(OVERFLOW))
    number = sum(len(judged) for judged in judgements)
    everything = [*zip(responses, states, judgements, strict=True)]
    for response, state, judged in reversed(everything):  # The first one stays.
        number -= len(judged)
        asked = response.propose(state, judged)
        if not any(isinstance(x, jax.Array) for x in (asked.reason, asked.lr_scale)):
            continue  # It only clips.
        rejects = (reason > 0) & (asked.reason == reason)
        cuts = backed_off & (reason == 0) & (asked.lr_scale < 1)
        for i, own in reversed([*enumerate(judged)]):
            if not own.grouping.count:
                continue
            worst = 0
            if own.grouping.count > 1:
                excess = jnp.where(own.exceeded, own.signal / own.limit, 0.0)
                worst = jnp.argmax(jnp.where(own.nonfinite, jnp.inf, excess))
            bad, large = own.nonfinite[worst], own.exceeded[worst]
            code = reason_code(response.thresholds[i].of, bad, large)
            at_fault = (rejects & (code == reason)) | (cuts & (bad | large))
            this = Cause(jnp.int32(number + i), own.signal[worst], own.limit[worst])
            found = select(at_fault, this, found)
    return found


def check_batch(extra: dict[str, Any]) -> None:
    """Raise ValueError if a `batch_id=` that is not a JAX array is out of range."""
    given = extra.get("batch_id")
    if given is None or isinstance(given, jax.Array):  # Not waited for.
        return
    within = lambda x: not isinstance(x, str) and 0 <= int(x) < 2**31
    _checks.require("batch_id", given, "an integer in [0, 2**31)", within)


def batch_of(extra: dict[str, Any]) -> jax.Array:
    """Return the id that a step got as `batch_id=`, int32 ()."""
    given = extra.get("batch_id")
    if given is None:
        return jnp.full((), NO_BATCH, jnp.int32)
    check_batch(extra)
    batch = jnp.asarray(given)
    if batch.ndim or not jnp.issubdtype(batch.dtype, jnp.integer):
        raise ValueError(
            f"`batch_id` must be one integer, got shape {batch.shape} and dtype "
            f"{batch.dtype}. Pass the batch's place in the data, such as its step."
        )
    # An id on the device cannot be refused: one that int32 cannot hold is not kept. JAX
    # has wrapped a 64-bit argument of the caller's `jax.jit` to int32 before.
    kept = batch.astype(jnp.int32)
    held = (kept >= 0) & (kept.astype(batch.dtype) == batch)
    return jnp.where(held, kept, NO_BATCH)
