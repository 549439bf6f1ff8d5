"""The tables of the faults benchmark."""

from typing import NamedTuple

import numpy as np
from markdown_table import table

from _faults.runs import NEAR, Outcome
from _faults.schedules import KINDS, PLACES, Schedule

HEADER = (
    "method",
    "schedules",
    "finite",
    "skips exact",
    "counted once",
    "goes on",
    "within 5 %",
)


class Part(NamedTuple):
    """One method on one optimizer and dtype."""

    method: str
    optimizer: str
    dtype: str
    schedules: Schedule
    outcome: Outcome
    clean: float

    @property
    def near(self) -> np.ndarray:
        return self.outcome.loss <= NEAR * self.clean


def share(flags) -> str:
    flags = np.asarray(flags)
    return f"{100 * flags.mean():.1f} %" if flags.size else "-"


def overall(parts: list[Part], guarded: set[str]) -> str:
    """One row a method."""
    rows = [HEADER]
    for method in dict.fromkeys(part.method for part in parts):
        own = [part for part in parts if part.method == method]
        all_of = lambda name, own=own: np.concatenate(
            [getattr(part.outcome, name) for part in own]
        )
        near = np.concatenate([part.near for part in own])
        told = [share(all_of(x)) for x in ("kept", "counted")]
        if method not in guarded:
            told = ["-", "-"]
        finite, moves = share(all_of("finite")), share(all_of("moves"))
        rows.append((method, str(len(near)), finite, *told, moves, share(near)))
    return table(rows[0], rows[1:])


def by_optimizer(parts: list[Part], method: str) -> str:
    """Schedules that end within 5 %, of one method."""
    own = [part for part in parts if part.method == method]
    dtypes = list(dict.fromkeys(part.dtype for part in own))
    rows = [("optimizer", *dtypes)]
    for name in dict.fromkeys(part.optimizer for part in own):
        found = {part.dtype: part for part in own if part.optimizer == name}
        rows.append((name, *(share(found[dtype].near) for dtype in dtypes)))
    return table(rows[0], rows[1:])


def by_fault(parts: list[Part], method: str) -> str:
    """The same by place and kind, of schedules that hold such a fault."""
    own = [part for part in parts if part.method == method]
    place, kind = (
        np.concatenate([getattr(part.schedules, name) for part in own])
        for name in ("place", "kind")
    )
    near = np.concatenate([part.near for part in own])
    rows = [("place", *KINDS)]
    for i, name in enumerate(PLACES):
        if not (place == i).any():
            continue
        holds = [((place == i) & (kind == j)).any(axis=1) for j in range(len(KINDS))]
        rows.append((name, *(share(near[which]) for which in holds)))
    return table(rows[0], rows[1:])


def bad_steps(parts: list[Part], method: str) -> str:
    """How often a method acted."""
    own = [part.outcome for part in parts if part.method == method]
    skipped = np.concatenate([outcome.skipped for outcome in own])
    backs = np.concatenate([outcome.roll_backs for outcome in own])
    return (
        f"`{method}` skipped {skipped.mean():.1f} steps a schedule, and rolled back "
        f"{backs.mean():.2f} times ({backs.max()} at most)."
    )
