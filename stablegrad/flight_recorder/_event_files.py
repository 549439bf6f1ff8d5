"""Events as JSON lines, and the batches that they speak of."""

import json
import math
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .._events import Event, Events, events

NUMBERS = ("grad_norm", "loss", "lr_scale", "value", "limit")
FORGOTTEN = "events_forgotten"  # The field of a line that is no event.


def save_events(state: Any, path: str | os.PathLike) -> None:
    """Write the events of a guard to a file of JSON lines, and keep those in it.

    A guard remembers its last 64 events, a file all that it was told of: call this more
    often than 64 events happen, such as with each checkpoint. A later account of the
    same step replaces the earlier one, so a run may be resumed and save again. Where
    events were lost in between, a line {"events_forgotten": n} says how many.

    Args:
        state: A state that holds a guard's anywhere, as for `metrics`.
        path: The file. A new one takes its place at once, or not at all.

    Raises:
        ValueError: If there is no guard in the state, or if the file holds something
            else than events; it is left as it is.
        OSError: If it cannot be written; it is left as it is.

    Example:
        >>> import pathlib, tempfile
        >>> import jax.numpy as jnp, optax
        >>> import stablegrad as sg
        >>> tx = sg.guard(optax.sgd(0.1), sg.skip())
        >>> params = {"w": jnp.zeros(2)}
        >>> bad = {"w": jnp.full(2, jnp.nan)}
        >>> _, state = tx.update(bad, tx.init(params), params, batch_id=17)
        >>> path = pathlib.Path(tempfile.mkdtemp(), "events.jsonl")
        >>> sg.save_events(state, path)
        >>> sg.batches_to_leave_out(sg.load_events(path))
        [17]
    """
    path = Path(path)
    new = events(state)
    old = load_events(path) if path.exists() else Events()
    key = lambda event: (event.member or 0, event.step)
    merged = {key(event): event for event in (*old, *new)}
    known = sum(key(event) not in {key(other) for other in new} for event in old)
    forgotten = max(old.forgotten, new.forgotten - known)
    lines = [json.dumps({FORGOTTEN: forgotten})] if forgotten else []
    lines += [_to_json(merged[place]) for place in sorted(merged)]
    # A reader, or a full disk, meets the whole of the old file or of the new one.
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        draft.write_text("".join(f"{line}\n" for line in lines))
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def load_events(path: str | os.PathLike) -> Events:
    """Read the events that `save_events` wrote.

    Args:
        path: A file of JSON lines.

    Returns:
        The events, oldest first, as `events` lists them.

    Raises:
        ValueError: If a line is not an event: which line, and what is wrong with it.
        OSError: If there is no such file.

    Example:
        >>> import pathlib, tempfile
        >>> import stablegrad as sg
        >>> path = pathlib.Path(tempfile.mkdtemp(), "events.jsonl")
        >>> _ = path.write_text('{"step": 3, "kind": ')
        >>> sg.load_events(path)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: ...events.jsonl, line 1, is not an event: it is no JSON...
    """
    found = Events()
    data = Path(path).read_bytes()
    for number, line in enumerate(data.splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise _broken(path, number, "it is no JSON") from error
        if isinstance(row, dict) and set(row) == {FORGOTTEN}:
            found.forgotten = int(row[FORGOTTEN])
            continue
        if not isinstance(row, dict) or set(row) != set(Event._fields):
            raise _broken(path, number, f"its fields are not {Event._fields}")
        try:
            numbers = {name: float(row[name]) for name in NUMBERS}
            batches = tuple(int(batch) for batch in row["batch_ids"])
            steps = {name: int(row[name]) for name in ("step", "until")}
        except (TypeError, ValueError) as error:
            raise _broken(path, number, str(error)) from error
        found.append(Event(**{**row, **numbers, **steps, "batch_ids": batches}))
    return found


def batches_to_leave_out(
    listed: Iterable[Event], *, kinds: tuple[str, ...] = ("skip", "halt")
) -> list[int]:
    """Return the ids of the batches that made a guard refuse a step.

    A run that is started again, or goes back to a checkpoint, leaves them out.

    Args:
        listed: What `events` or `load_events` returned. The steps must have been given
            `batch_id=`, which is what this returns.
        kinds: The kinds of events to look at: "skip", "halt", "back_off", "shorten",
            "keep_out".

    Returns:
        The ids, sorted, each once. A guard remembers the last 256. It warns if an event
        has fewer ids than steps.

    Raises:
        TypeError: If something in the list is not an event.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import stablegrad as sg
        >>> tx = sg.guard(optax.sgd(0.1), sg.skip())
        >>> params, state = jnp.zeros(2), tx.init(jnp.zeros(2))
        >>> for batch_id, size in ((40, 1.0), (12, jnp.nan), (31, jnp.nan)):
        ...     grads = jnp.full(2, size)
        ...     _, state = tx.update(grads, state, params, batch_id=batch_id)
        >>> sg.batches_to_leave_out(sg.events(state))
        [12, 31]
    """
    ids, missing = set(), 0
    for event in listed:
        if not isinstance(event, Event):
            raise TypeError(
                "`batches_to_leave_out` takes the events of `events` or `load_events`, "
                f"got {event!r:.60}."
            )
        if event.kind in kinds:
            ids |= set(event.batch_ids)
            missing += event.until - event.step + 1 - len(event.batch_ids)
    missing += getattr(listed, "forgotten", 0)
    if missing:
        warnings.warn(
            f"the batches of {missing} steps or events are not known: `batch_id=` was "
            "not passed, or they are older than what a guard keeps. Call `save_events` "
            "more often.",
            stacklevel=2,
        )
    return sorted(ids)


def _to_json(event: Event) -> str:
    """Return one line; numbers that JSON does not have are words."""
    word = lambda x: x if math.isfinite(x) else str(x)
    numbers = {name: word(getattr(event, name)) for name in NUMBERS}
    return json.dumps({**event._asdict(), **numbers})


def _broken(path, number: int, what: str) -> ValueError:
    return ValueError(
        f"{path}, line {number}, is not an event: {what}. The file was left as it is; "
        "move it away to start a new one."
    )
