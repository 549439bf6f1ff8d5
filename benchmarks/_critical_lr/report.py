"""The table, the goals, and what they come to."""

import math
import statistics
from typing import NamedTuple

from markdown_table import table

from .tasks import Task


class Row(NamedTuple):
    """One configuration: rates, and whether the safe start spikes."""

    task: Task
    observed: float
    directional: float
    forward: float
    probe: float
    short_probe: float  # With half as many steps.
    safe_start: float
    safe_start_spikes: bool

    @property
    def one_step(self) -> float:
        """What one step tells: the smaller of the two estimates without a probe."""
        return min(self.directional, self.forward)


HEADERS = [
    "configuration",
    "first spike",
    "directional",
    "forward",
    "probe of 5",
    "probe of 10",
    "safe start",
    "spikes there",
]


class Goal(NamedTuple):
    """What should hold, what was found, and whether it does."""

    what: str
    found: str
    met: bool


def cells(row: Row) -> list[str]:
    """A row of the table: the observed rate, estimates as multiples of it."""
    estimates = (
        row.directional,
        row.forward,
        row.short_probe,
        row.probe,
        row.safe_start,
    )
    return [
        row.task.name,
        f"{row.observed:.3g}",
        *(f"{estimate / row.observed:.2f}" for estimate in estimates),
        "yes" if row.safe_start_spikes else "no",
    ]


def off(estimate: float, observed: float) -> float:
    """By what factor an estimate is too large or too small; inf if it is nan."""
    if not (0 < estimate < math.inf and 0 < observed < math.inf):
        return math.inf
    return max(estimate / observed, observed / estimate)


def goals(rows: list[Row]) -> list[Goal]:
    """The goals, for the headline `critical` (the probe) and for one step alone."""
    found = []
    for name, estimate in (
        ("critical (the probe of 10)", "probe"),
        ("min(directional, forward)", "one_step"),
    ):
        errors = [off(getattr(row, estimate), row.observed) for row in rows]
        for factor, least in ((1.5, 0.8), (2.5, 1.0)):
            found.append(_within(name, errors, factor, least))
    for name, estimate in (("probe of 10", "probe"), ("probe of 5", "short_probe")):
        errors = [off(getattr(row, estimate), row.observed) for row in rows]
        found.append(_within(name, errors, 1.4, 0.9))
    spiked = sum(row.safe_start_spikes for row in rows)
    found.append(
        Goal(
            "no spike within 20 steps at the safe start",
            f"{spiked} of {len(rows)} spike",
            spiked == 0,
        )
    )
    return found


def _within(name: str, errors: list[float], factor: float, least: float) -> Goal:
    share = statistics.mean(error <= factor for error in errors)
    return Goal(
        f"{name} within a factor {factor:g} for {least:.0%}",
        f"{share:.0%}, worst {max(errors):.2f}",
        share >= least,
    )


def markdown(rows: list[Row], about: str) -> str:
    """Everything, for a file."""
    goal_lines = [[g.what, g.found, "yes" if g.met else "**no**"] for g in goals(rows)]
    ratio = [row.safe_start / row.observed for row in rows]
    return "\n\n".join(
        [
            "# Where training spikes, and where it was predicted to",
            "Observed: the smallest learning rate on a grid of x1.1 at which the loss "
            "on a fixed batch exceeds 1.05 of the first within 20 steps. Estimates are "
            "multiples of it; each was made before training.",
            table(HEADERS, [cells(row) for row in rows]),
            "## Goals",
            table(["goal", "found", "met"], goal_lines),
            "One step cannot see a spike that the second or the tenth step makes: a "
            "loss that saturates hides it from `forward`, and `directional` knows the "
            "curvature at one point only. Real steps tell.",
            f"The safe start is {statistics.median(ratio):.2f} of the first spike's "
            f"rate in the median, {max(ratio):.2f} at most, {min(ratio):.2f} at least.",
            about,
        ]
    )
