"""The tables and the summary, in Markdown."""

import markdown_table
import numpy as np

from stablegrad.sweep import _scores as scores
from stablegrad.sweep._scores import Mean

from .goals import LEGEND as ABOUT_GOALS, best_peer, goals
from .methods import Method
from .rows import Row, Table

LEGEND = f"""\
Loss: final, on a fixed set, mean over as many seeds as stated; a loss that is not
finite counts as the one before training, and is marked `!`. On B it is the training
loss, on D, G and K the mean training loss of the last 50 steps. In brackets: test
accuracy in %, of the next character on D, G and K; on E, of the next character of the
text that it was trained on first. LR sensitivity: mean over rates of min(loss, loss
before training) minus the method's own best, and its standard error over seeds;
normalised: the same over what training gains at best. Band: decades of rates around the
best within {scores.WITHIN} of its loss.
Cliff: the lowest rate above the best that is more than {scores.CLIFF} off.
Flags: `trivial` at rates where some seed is no better than the best constant
predictor, give or take 1 %; `dead` where
{scores.DEAD:.0%} of the hidden units or more never fire on the training set.
Step time: of one step without vmap over the bare optimizer's in the same run, through
`update`, for ours also through `stablegrad.apply`."""


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.1e}"


def _with_error(value: Mean) -> str:
    if np.isnan(value.error):
        return f"{value.mean:.3f}"
    return f"{value.mean:.3f} ± {value.error:.3f}"


def _flags(row: Row, rates) -> str:
    seen = row.scores

    def at(where) -> str:
        chosen = [f"{rate:.2g}" for rate in np.asarray(rates)[where]]
        return "all" if len(chosen) == len(rates) else ", ".join(chosen)

    parts = []
    if seen.trivial.any():
        parts.append(f"trivial: {at(seen.trivial)}")
    dead = seen.dead >= scores.DEAD
    if dead.any():
        parts.append(f"dead {seen.dead.max():.0%}: {at(dead)}")
    return "; ".join(parts) or "-"


def _cell(row: Row, i: int) -> str:
    seen = row.scores
    text = _number(seen.loss[i]) + ("!" if seen.broken[i] else "")
    if np.isnan(seen.accuracy[i]):
        return text
    return f"{text} ({100 * seen.accuracy[i]:.1f})"


def _times(row: Row) -> str:
    if row.times is None:
        return "-"
    ratios = [row.times.update, row.times.apply]
    return " / ".join(f"{ratio:.2f}" for ratio in ratios if ratio is not None)


def _yardsticks(data: Table) -> str:
    text = (
        f"Loss before training {data.initial_loss:.3f}, of the best constant "
        f"predictor {data.trivial_loss:.3f}."
    )
    bare = [row.times.bare_ms for row in data.rows if row.times is not None]
    return text + (f" A bare step takes {np.median(bare):.2g} ms." if bare else "")


def table(data: Table) -> str:
    """One task: a line a method."""
    header = [
        "method",
        "seeds",
        *(f"{rate:.2g}" for rate in data.rates),
        "LR sensitivity",
        "normalised",
        "best loss",
        "at",
        "band",
        "cliff",
        "flags",
        "step time",
    ]
    lines = []
    for row in data.rows:
        seen = row.scores
        lines.append(
            [
                f"**{row.method}**" if row.kind == "ours" else row.method,
                str(row.seeds),
                *(_cell(row, i) for i in range(len(data.rates))),
                _with_error(seen.sensitivity),
                f"{seen.normalised.mean:.3f}",
                _number(seen.best),
                f"{seen.best_rate:.2g}",
                f"{seen.band:.2f}",
                "-" if np.isnan(seen.cliff) else f"{seen.cliff:.2g}",
                _flags(row, data.rates),
                _times(row),
            ]
        )
    for method, why in data.failed.items():
        lines.append([method, "-", f"failed: {why}", *[""] * (len(header) - 3)])
    return markdown_table.table(header, lines)


def summary(tables: dict[str, Table], ours: list[str]) -> str:
    """Every goal against every method of ours."""
    lines = [
        [goal.text, goal.task, *(goal.cell(tables, name) for name in ours)]
        for goal in goals()
        if goal.task in tables
    ]
    peers = {key: best_peer(data) for key, data in tables.items()}
    best = "; ".join(
        f"{key}: {row.method}, {row.scores.sensitivity.mean:.3f}"
        for key, row in peers.items()
        if row is not None
    )
    text = f"{markdown_table.table(['goal', 'task', *ours], lines)}\n\n{ABOUT_GOALS}"
    return text + (f"\n\nBest peers: {best}." if best else "")


def whole(
    tables: dict[str, Table],
    listed: list[Method],
    about: str,
    figure: str,
    decided: bool,
) -> str:
    """The report."""
    shown = {row.method for data in tables.values() for row in data.rows}
    ours = [method.name for method in listed if method.ours and method.name in shown]
    settings = [
        f"- {method.name}: {method.settings}."
        for method in listed
        if method.name in shown
    ]
    parts = ["# Learning-rate sensitivity", about, f"![loss against rate]({figure})"]
    parts += ["## Goals", summary(tables, ours)] if ours and decided else []
    for data in tables.values():
        parts += [f"## {data.title}", table(data), _yardsticks(data)]
    return "\n\n".join([*parts, LEGEND, "## Settings", "\n".join(settings)]) + "\n"
