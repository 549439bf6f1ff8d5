"""Events as JSON lines, and the ids of their batches."""

import json
import math
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .._checks import require
from .._events import Event, Events, event_key, events
from .._text_files import write_whole
from ..engine._event_log import NUMBERS
from ..engine._record import EventKind

KINDS = tuple(kind.name.lower() for kind in EventKind)

OF_BATCHES = ("nonfinite_gradient", "nonfinite_value", "gradient_overflow")  # Reasons.
FORGOTTEN = "events_forgotten"  # The field of a line that is not an event.


def _is_count(x) -> bool:
    return type(x) is int and x >= 0  # No bool.


# What a field must be: in words, and a function that says whether it is.
COUNT = ("an integer >= 0", _is_count)
TEXT = ("a string", lambda x: isinstance(x, str))
NUMBER = ("a number", lambda x: isinstance(float(x), float))
INDEX = ("null or an integer >= 0", lambda x: x is None or _is_count(x))
IDS = (
    "a list of integers >= 0",
    lambda x: isinstance(x, list) and all(map(_is_count, x)),
)
FIELDS = {
    **dict.fromkeys(("step", "until", FORGOTTEN), COUNT),
    **dict.fromkeys(("kind", "reason", "leaf", "signal"), TEXT),
    **dict.fromkeys(NUMBERS, NUMBER),
    **dict.fromkeys(("member", "guard"), INDEX),
    "batch_ids": IDS,
}


def save_events(state: Any, path: str | os.PathLike) -> None:
    """Write the events of a guard to a file of JSON lines, and keep those in it.

    A guard remembers its last 64 events, and the file keeps every event saved to it.
    Call this before 64 new events have occurred, such as with each checkpoint. A
    later event of the same step and kind replaces the earlier one but keeps its batch
    ids, so a resumed run may save to the same file. Where events were lost in between,
    a line {"events_forgotten": n} says how many; at most that many, if the file also
    has events from after the checkpoint at which the run was resumed. Of several
    processes, let only one save.

    Args:
        state: A state with a guard's state anywhere in it, as for `metrics`. Pass all
            guards of a run in one state, as `(generator_state, discriminator_state)`:
            events are told apart by the number of their guard in it.
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
    merged = {event_key(event): event for event in old}
    lost = new.forgotten - len(merged.keys() - {event_key(event) for event in new})
    if _is_of_another_course(merged, new, lost):
        lost = new.forgotten  # None of those in the file need be one of them.
    for event in new:
        earlier = merged.get(event_key(event), event).batch_ids
        gone = [batch for batch in earlier if batch not in event.batch_ids]
        ids = (*gone, *event.batch_ids)
        merged[event_key(event)] = event._replace(batch_ids=ids)
    forgotten = max(old.forgotten, lost)
    lines = [json.dumps({FORGOTTEN: forgotten})] if forgotten else []
    lines += [_to_json(merged[key]) for key in sorted(merged)]
    write_whole(path, "".join(f"{line}\n" for line in lines))


def _is_of_another_course(old: dict[Any, Event], new: Events, lost: int) -> bool:
    """Return whether a file holds events of steps that were taken again later."""
    told = lambda event: (event.kind, repr((event.grad_norm, event.loss)))
    same = [
        event
        for event in new
        if event_key(event) in old
        and told(old[event_key(event)]) == told(event)
        and {*old[event_key(event)].batch_ids} >= {*event.batch_ids[:1]}
    ]
    if same or not new:  # Up to there, it is the same course.
        return False
    return lost < 0 or any(event.step >= new[0].step for event in old.values())


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
        ValueError: ...events.jsonl, line 1, is not an event: it is not JSON...
    """
    found = Events()
    data = Path(path).read_bytes()
    for number, line in enumerate(data.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise _broken(path, number, "it is not JSON.") from error
        names = set(row) if isinstance(row, dict) else set()
        # Files of earlier versions have no `guard`.
        if names != {FORGOTTEN} and names | {"guard"} != set(Event._fields):
            raise _broken(path, number, f"its fields are not {Event._fields}.")
        try:
            for name, value in row.items():
                require(name, value, *FIELDS[name])
            if FORGOTTEN in row:
                found.forgotten = row[FORGOTTEN]
                continue
            require("until", row["until"], ">= `step`", row["step"].__le__)
        except ValueError as error:
            raise _broken(path, number, str(error)) from error
        numbers = {name: float(row[name]) for name in NUMBERS}
        ids = tuple(row["batch_ids"])
        found.append(Event(**{**row, **numbers, "batch_ids": ids}))
    return found


def batches_to_leave_out(
    listed: Iterable[Event], *, kinds: tuple[str, ...] = ("skip", "halt")
) -> list[int]:
    """Return the ids of the batches of steps that were refused, or found halted.

    A run that is started again, or goes back to a checkpoint, leaves them out.

    Args:
        listed: What `events` or `load_events` returned. The steps must have been given
            `batch_id=`, which is what this returns.
        kinds: The kinds of events to look at: "skip", "halt", "back_off", "shorten",
            "keep_out", "roll_back", "warn". A roll-back whose own gradient or loss was
            refused counts as a skip, too.

    Returns:
        The ids, sorted, each once. A guard remembers the last 256. It warns if an event
        has fewer ids than steps.

    Raises:
        TypeError: If something in the list is not an event.
        ValueError: If there is no such kind of event.

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
    unknown = [kind for kind in kinds if kind not in KINDS]
    if isinstance(kinds, str) or unknown:
        raise ValueError(f"`kinds` must be some of {KINDS}, got {kinds!r}.")
    ids, missing = set(), 0
    for event in listed:
        if not isinstance(event, Event):
            raise TypeError(
                "`batches_to_leave_out` takes the events of `events` or `load_events`, "
                f"got {event!r:.60}."
            )
        refused = event.kind == "roll_back" and event.reason in OF_BATCHES
        if event.kind in kinds or (refused and "skip" in kinds):
            ids |= set(event.batch_ids)
            missing += max(0, event.until - event.step + 1 - len(event.batch_ids))
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
        f"{path}, line {number}, is not an event: {what} The file was left as it is; "
        "move it away to start a new one."
    )
