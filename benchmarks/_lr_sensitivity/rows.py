"""The tables as data: one a task, with one row a method."""

from typing import NamedTuple

import numpy as np

from stablegrad.sweep._scores import Scores

from .timing import Times


class Row(NamedTuple):
    """One method on one task."""

    method: str
    kind: str
    scores: Scores
    times: Times | None
    seeds: int  # Over which `scores` are means.


class Table(NamedTuple):
    """One task."""

    title: str
    rates: np.ndarray
    trivial_loss: float
    initial_loss: float
    rows: list[Row]
    failed: dict[str, str]  # Method -> why it has no row.

    def row(self, method: str) -> Row | None:
        """The row of a method, if it has one."""
        return next((row for row in self.rows if row.method == method), None)

    @property
    def bare(self) -> Row | None:
        """The row of the optimizer alone."""
        return next((row for row in self.rows if row.kind == "bare"), None)
