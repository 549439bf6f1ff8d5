"""What a spike is, and whether an alarm foretold it."""

from typing import NamedTuple

import numpy as np

WINDOW, DEVIATIONS, LASTS = 100, 5.0, 2  # Of the definition of a spike.
AHEAD = 32  # Steps before a spike in which an alarm counts as its warning.
AFTERMATH = 100  # Steps after the start of a spike in which nothing is counted.
SETTLED = 200  # Steps at the start of a run in which nothing is counted.
EPISODE = 20  # Steps after a false alarm in which further alarms belong to it.


class Score(NamedTuple):
    """Counts over some runs."""

    spikes: int
    foretold: int
    false_alarms: int
    steps: int
    leads: tuple[int, ...]  # Steps from the first alarm to the spike that it foretold.

    def __add__(self, other) -> "Score":
        return Score(*(a + b for a, b in zip(self, other, strict=True)))

    @property
    def recall(self) -> float:
        """Share of the spikes that were foretold; nan without spikes."""
        return self.foretold / self.spikes if self.spikes else float("nan")

    @property
    def false_per_thousand(self) -> float:
        """False alarms in 1,000 steps."""
        return 1000 * self.false_alarms / self.steps


NOTHING = Score(0, 0, 0, 0, ())


def spikes(loss: np.ndarray) -> list[int]:
    """First steps of all spikes.

    The loss is above the mean of the last 100 steps and 5 of their deviations, for two
    steps at least; a spike within 100 steps of the last one belongs to it.
    """
    loss = np.asarray(loss, np.float64)
    past = np.lib.stride_tricks.sliding_window_view(loss, WINDOW)[:-1]
    above = np.zeros(len(loss), bool)
    limit = past.mean(axis=1) + DEVIATIONS * past.std(axis=1)
    above[WINDOW:] = ~(loss[WINDOW:] <= limit)
    lasting = above.copy()
    for k in range(1, LASTS):
        lasting[:-k] &= above[k:]
        lasting[-k:] = False
    found: list[int] = []
    for step in np.flatnonzero(lasting):
        if not above[step - 1] and (not found or step - found[-1] > AFTERMATH):
            found.append(int(step))
    return found


def score(loss: np.ndarray, alarms: np.ndarray) -> Score:
    """Count the spikes that a run's alarms foretold, and the alarms without a spike.

    An alarm at a step is known before the loss of the next one.
    """
    starts = [step for step in spikes(loss) if step >= SETTLED]
    raised = np.flatnonzero(alarms)
    leads = []
    for start in starts:
        before = raised[(raised >= start - AHEAD) & (raised < start)]
        leads += [int(start - before[0])] if len(before) else []
    false, last = 0, -EPISODE
    for step in raised[raised >= SETTLED]:
        told = any(0 < start - step <= AHEAD for start in starts)
        after = any(0 <= step - start <= AFTERMATH for start in starts)
        if not told and not after and step - last > EPISODE:
            false, last = false + 1, step
    return Score(len(starts), len(leads), int(false), len(loss) - SETTLED, (*leads,))
