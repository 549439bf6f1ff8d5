"""What the benchmark decides: each goal, our figure, and whether it is met."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from stablegrad.sweep import _scores as scores

from .rows import Row, Table

SENSITIVITY = {
    "A": 0.08,
    "B-adam": 0.025,
    "B-momentum": 0.025,
    "B-batch-8": 0.15,
    "C-adam": 0.03,
    "C-momentum": 0.012,
}
RATIO = {"A": 1.005, "D": 1.005, "E": 1.005, "G": 1.005, "K": 1.01}
DIFFERENCE = {key: 0.002 for key in SENSITIVITY if key != "A"}
LARGEST = {"A": 1.03, "D": 1.03, "G": 1.03, "K": 1.06, "C-adam": 1, "C-momentum": 1}
STEP_TIME = {"A": 1.05, "D": 1.05, "G": 1.05}
GOOD = 1.1  # Times bare's best loss: a rate at which nothing may be lost.
LEGEND = (
    "Good rates: the loss of the optimizer alone is within 10 % of its best. What they "
    "cost is the worst of them, each a mean over seeds. LR sensitivity counts from the "
    "lower of the method's own best and that of the optimizer alone. The largest "
    "rates: the two at the end of the grid. The bounds of K, on which no method was "
    "tuned, are twice those of the other language models. The best peer is the one of "
    "least LR sensitivity, among those that beat the trivial predictor at their best "
    "rate."
)


class Goal(NamedTuple):
    """One goal on one task."""

    text: str
    task: str
    limit: float
    value: Callable[[Table, Row], float]  # nan where there is nothing to compare.

    def cell(self, tables: dict[str, Table], method: str) -> str:
        """The figure, and whether it meets the goal; a dash without a result."""
        table = tables.get(self.task)
        row = None if table is None else table.row(method)
        value = np.nan if row is None else self.value(table, row)
        if np.isnan(value):
            return "-"
        return f"{value:.4g} {'met' if value <= self.limit else 'MISSED'}"


def best_peer(table: Table) -> Row | None:
    """The peer of least LR sensitivity, if any."""
    learned = (1 - scores.TRIVIAL) * table.trivial_loss
    peers = [
        row
        for row in table.rows
        if row.kind not in ("bare", "ours") and row.scores.best < learned
    ]
    return min(peers, key=lambda row: row.scores.sensitivity.mean, default=None)


def _against_bare(compare: Callable) -> Callable[[Table, Row], float]:
    def value(table: Table, row: Row) -> float:
        bare = table.bare
        if bare is None or bare.seeds != row.seeds:  # Means of other runs.
            return np.nan
        return float(compare(row.scores, bare.scores))

    return value


def good(bare: scores.Scores) -> np.ndarray:
    """Which rates are good for the optimizer alone."""
    return (bare.loss <= GOOD * bare.best) & (bare.broken == 0)


@_against_bare
def _sensitivity(ours, bare) -> float:
    return ours.loss.mean() - min(ours.best, bare.best)


@_against_bare
def _ratio(ours, bare) -> float:
    return (ours.loss / bare.loss)[good(bare)].max()


@_against_bare
def _difference(ours, bare) -> float:
    return (ours.loss - bare.loss)[good(bare)].max()


@_against_bare
def _largest(ours, bare) -> float:
    return ours.loss[-2:].max() / bare.best


def _step_time(table: Table, row: Row) -> float:
    del table
    return np.nan if row.times is None else row.times.least


def goals() -> Iterator[Goal]:
    """Every goal."""
    kinds = (
        ("LR sensitivity at most {}", SENSITIVITY, _sensitivity),
        ("loss over bare's at good rates at most {}", RATIO, _ratio),
        ("loss minus bare's at good rates at most {}", DIFFERENCE, _difference),
        ("loss at the largest rates over bare's best at most {}", LARGEST, _largest),
        ("step time at most {} of bare", STEP_TIME, _step_time),
    )
    for text, limits, value in kinds:
        for task, limit in limits.items():
            yield Goal(text.format(limit), task, limit, value)
