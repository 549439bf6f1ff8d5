"""What the benchmark decides: each goal, our figure, and whether it is met."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from stablegrad.sweep import _scores as scores

from .rows import Row, Table

A, LONG = "A", "A-1000"
B = ("B-adam", "B-momentum", "B-batch-8")
SENSITIVITY = {A: 0.05, "B-adam": 0.025, "B-momentum": 0.025, "B-batch-8": 0.15}
OF_BEST_PEER = 1 / 8
LOSS_HARM, ACCURACY_HARM = 0.5, 0.5  # Per cent, and percentage points.
TRAINING_LOSS = 0.003
STEP_TIME = 1.10
HEALTHY = (
    "A rate is healthy if no seed of the optimizer alone breaks there, and it is below "
    f"its cliff: the lowest rate above its best whose mean loss is more than "
    f"{scores.CLIFF} above its best. Harm is the worst of the healthy rates, each a "
    "mean over seeds. The best peer is the one of least LR sensitivity, among those "
    "that beat the trivial predictor at their best rate. The best tuned loss is the "
    "lowest of the means over seeds."
)


def healthy(seen: scores.Scores, rates) -> np.ndarray:
    """Which rates are below the cliff, with no seed broken."""
    below = np.isnan(seen.cliff) | (np.asarray(rates) < seen.cliff)
    return below & (seen.broken == 0)


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
        return f"{value:.3g} {'met' if value <= self.limit else 'MISSED'}"


def _sensitivity(table: Table, row: Row) -> float:
    return row.scores.sensitivity.mean


def best_peer(table: Table) -> Row | None:
    """The peer of least LR sensitivity, if any."""
    learned = (1 - scores.TRIVIAL) * table.trivial_loss
    peers = [
        row
        for row in table.rows
        if row.kind not in ("bare", "ours") and row.scores.best < learned
    ]
    return min(peers, key=lambda row: row.scores.sensitivity.mean, default=None)


def _of_best_peer(table: Table, row: Row) -> float:
    peer = best_peer(table)
    if peer is None or not peer.scores.sensitivity.mean:
        return np.nan
    return row.scores.sensitivity.mean / peer.scores.sensitivity.mean


def _worst(differences: np.ndarray) -> float:
    """The largest; nan if there is no such rate."""
    return float(differences.max()) if differences.size else np.nan


def _against_bare(compare: Callable) -> Callable[[Table, Row], float]:
    def value(table: Table, row: Row) -> float:
        bare = table.bare
        if bare is None or bare.seeds != row.seeds:  # Means of other runs.
            return np.nan
        return float(compare(table, row.scores, bare.scores))

    return value


@_against_bare
def _loss_harm(table, ours, bare) -> float:
    where = healthy(bare, table.rates)
    return 100 * _worst(ours.loss[where] / bare.loss[where] - 1)


@_against_bare
def _accuracy_harm(table, ours, bare) -> float:
    where = healthy(bare, table.rates)
    return 100 * _worst(bare.accuracy[where] - ours.accuracy[where])


@_against_bare
def _best_loss(table, ours, bare) -> float:
    del table
    return ours.best - bare.best


@_against_bare
def _largest_rates(table, ours, bare) -> float:
    lost = ~healthy(bare, table.rates)
    lost &= np.asarray(table.rates) > bare.best_rate
    return _worst(ours.loss[lost] - bare.best)


def _step_time(table: Table, row: Row) -> float:
    del table
    return np.nan if row.times is None else row.times.least


def goals() -> Iterator[Goal]:
    """Every goal, in the order of the issue."""
    for task, limit in SENSITIVITY.items():
        yield Goal(f"LR sensitivity at most {limit}", task, limit, _sensitivity)
    for task in (A, *B):
        text = "LR sensitivity over the best peer's, at most 1/8"
        yield Goal(text, task, OF_BEST_PEER, _of_best_peer)
    text = "no harm: final loss worse by at most 0.5 % at healthy rates"
    yield Goal(text, A, LOSS_HARM, _loss_harm)
    for task in B:
        text = "no harm: test accuracy worse by at most 0.5 points at healthy rates"
        yield Goal(text, task, ACCURACY_HARM, _accuracy_harm)
    yield Goal("best loss minus the best tuned bare one, at most 0", A, 0.0, _best_loss)
    for task in B:
        text = f"best training loss at most {TRAINING_LOSS}"
        yield Goal(text, task, TRAINING_LOSS, lambda table, row: row.scores.best)
    text = "loss beyond the bare cliff minus the best tuned bare one, at most 0"
    yield Goal(text, LONG, 0.0, _largest_rates)
    for task in (A, *B):
        yield Goal(
            f"step time at most {STEP_TIME:.2f} of bare", task, STEP_TIME, _step_time
        )
