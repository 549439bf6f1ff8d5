"""The record of a guard: the last step, totals, and recent events."""

from enum import IntEnum
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._norms import LARGEST
from .._packing import Packed, Packing, decode, encode
from .._trees import count_if
from ._event_log import Cause, EventLog, Incident, init_log, log_incident

NO_LOSS: Any = np.float32(-LARGEST)  # The encoded loss of a step without one.
NO_LIMIT: Any = np.float32(LARGEST)  # The encoded limit of a threshold without one.
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
    halted: jax.Array  # bool: whether a response finds the run stuck.


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
    warned_steps: jax.Array  # Steps in which `layer_health` warned.


class EventKind(IntEnum):
    """What a guard did in a step; of several, the gravest is logged."""

    SKIP = 1
    BACK_OFF = 2
    HALT = 3
    SHORTEN = 4
    KEEP_OUT = 5
    ROLL_BACK = 6
    WARN = 7


class Record(NamedTuple):
    """Everything that a guard remembers for its user, as vectors."""

    last_numbers: jax.Array  # float32: the float32 fields of `LastStep`.
    last_codes: jax.Array  # int32: the other fields of `LastStep`.
    totals: jax.Array  # int32: the fields of `Totals`.
    log: EventLog
    extra_numbers: jax.Array  # float32: limits and readings, as `column_names` says.
    extra_codes: jax.Array  # int32: readings that are int32 or bool.


FLOATS = LastStep._fields[: LastStep._fields.index("skipped")]
FLAGS = ("skipped", "halted")  # Fields of `LastStep` that are bool.


def last_step_of(record: Record) -> LastStep:
    """Return the last step of a record; of an ensemble, with leading axes."""
    named = {name: record.last_numbers[..., i] for i, name in enumerate(FLOATS)}
    for i, name in enumerate(LastStep._fields[len(FLOATS) :]):
        code = record.last_codes[..., i]
        named[name] = code != 0 if name in FLAGS else code
    return LastStep(**named)


def totals_of(record: Record) -> Totals:
    """Return the totals of a record; of an ensemble, with leading axes."""
    return Totals(*(record.totals[..., i] for i in range(len(Totals._fields))))


def column_names(extras: dict[str, Any]) -> dict[str, None]:
    """Return dtypes and names of `extras` as the keys of a dict without arrays.

    Any checkpoint can hold it. Keys are numbered, because pytrees order dicts by key.
    """
    return {
        f"{i:03d} {jnp.result_type(number)} {name}": None
        for i, (name, number) in enumerate(extras.items())
    }


def read_record(
    columns: dict[str, None], packed: Packed
) -> tuple[Record, dict[str, Any]]:
    """Unpack the record of a state, and its extras by name."""
    record = Packing(record_structs(columns)).unpack(packed)
    extras, place = {}, {"float32": 0, "int32": 0}
    for dtype, name in dtypes_and_names(columns):
        if dtype == "float32":
            extras[name] = decode(record.extra_numbers[..., place["float32"]])
            place["float32"] += 1
        else:
            code = record.extra_codes[..., place["int32"]]
            extras[name] = code != 0 if dtype == "bool" else code
            place["int32"] += 1
    return record, extras


def dtypes_and_names(columns: dict[str, None]) -> list[list[str]]:
    """Return dtype and name of each column."""
    return [key.split(" ", 2)[1:] for key in sorted(columns)]


def carried_extras(
    old: tuple[dict[str, None], Record], new: tuple[dict[str, None], Record]
) -> dict[str, jax.Array]:
    """Return the extras of a new record, those of an old one where it has the name."""
    (old_columns, source), (columns, target) = old, new
    filled = {}
    for kind in ("extra_numbers", "extra_codes"):
        names = lambda own, kind=kind: [
            name
            for dtype, name in dtypes_and_names(own)
            if (dtype == "float32") == (kind == "extra_numbers")
        ]
        before, array = names(old_columns), getattr(target, kind)
        for place, name in enumerate(names(columns)):
            if name in before:
                value = getattr(source, kind)[..., before.index(name)]
                array = jnp.asarray(array).at[..., place].set(value)
        filled[kind] = array
    return filled


def record_structs(columns: dict[str, None]) -> Record:
    """Return the shapes and dtypes of a record with these columns."""
    columns_of = dtypes_and_names(columns)
    extras = {name: jax.ShapeDtypeStruct((), dtype) for dtype, name in columns_of}
    return jax.eval_shape(init_record, extras)


def _extra_vectors(extras: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
    """Stack extras: encoded float32 numbers, and int32 codes."""
    arrays = [jnp.asarray(number) for number in extras.values()]
    numbers = [x for x in arrays if x.dtype == np.float32]
    codes = [x.astype(jnp.int32) for x in arrays if x.dtype != np.float32]
    return (
        encode(jnp.stack(numbers)) if numbers else jnp.zeros((0,), jnp.float32),
        jnp.stack(codes) if codes else jnp.zeros((0,), jnp.int32),
    )


def init_record(extras: dict[str, Any]) -> Record:
    """Return the record before the first step, with further numbers by name."""
    ones = ("clip_scale", "lr_scale", "back_off_scale")
    last = dict.fromkeys(LastStep._fields, 0) | dict.fromkeys(ones, 1)
    last |= {"first_bad_leaf": -1, "largest_leaf": -1, "loss_value": NO_LOSS}
    values = list(last.values())
    return Record(
        jnp.array(values[: len(FLOATS)], jnp.float32),
        jnp.array(values[len(FLOATS) :], jnp.int32),
        jnp.zeros((len(Totals._fields),), jnp.int32),
        init_log(),
        *_extra_vectors(extras),
    )


class Outcome(NamedTuple):
    """How a step went, for the record."""

    step: LastStep
    extras: dict[str, jax.Array]
    backed_off: jax.Array  # bool: `back_off` cut the learning rate.
    shortened: jax.Array  # bool: a probe found the step harmful.
    rolled_back: jax.Array  # bool: a snapshot was restored.
    warned: jax.Array  # bool: a layer left what is usual for it.
    warned_leaf: jax.Array  # int32: the first leaf of that layer.
    cause: Cause
    batch: jax.Array  # int32: the id of the step's batch, or `NO_BATCH`.


def after_step(record: Record, outcome: Outcome) -> Record:
    """Return the record after one step."""
    last, before = outcome.step, totals_of(record)
    skipped, kept_out = last.skipped, last.kept_out_elements > 0
    shortened = outcome.shortened & ~skipped
    happened = Totals(
        guarded_steps=jnp.ones((), bool),
        clipped_steps=(last.clip_scale < 1) & ~skipped,
        skipped_steps=skipped,
        backed_off_steps=outcome.backed_off,
        shortened_steps=shortened,
        kept_out_steps=kept_out,
        halted_steps=last.halted,
        consecutive_skips=skipped,
        warned_steps=outcome.warned,
    )
    totals = count_if(jnp.stack(happened), record.totals)
    is_run = np.arange(len(Totals._fields)) == Totals._fields.index("consecutive_skips")
    totals = jnp.where(is_run & ~skipped, 0, totals)
    kind = jnp.zeros((), jnp.int32)
    for flag, own in (
        (outcome.warned, EventKind.WARN),
        (kept_out, EventKind.KEEP_OUT),
        (shortened, EventKind.SHORTEN),
        (outcome.backed_off, EventKind.BACK_OFF),
        (skipped, EventKind.SKIP),
        (outcome.rolled_back, EventKind.ROLL_BACK),
        (last.halted, EventKind.HALT),
    ):
        kind = jnp.where(flag, jnp.int32(own), kind)
    bad = last.first_bad_leaf
    leaf = jnp.where(bad >= 0, bad, last.largest_leaf)
    incident = Incident(
        kind,
        last.skip_reason,
        before.guarded_steps,
        jnp.where(kind == EventKind.WARN, outcome.warned_leaf, leaf),
        (last.grad_norm, last.loss_value, last.lr_scale),
        outcome.cause,
        outcome.batch,
    )
    codes = [jnp.asarray(x).astype(jnp.int32) for x in last[len(FLOATS) :]]
    return Record(
        jnp.stack(last[: len(FLOATS)]),
        jnp.stack(codes),
        totals,
        log_incident(record.log, incident),
        *_extra_vectors(outcome.extras),
    )
