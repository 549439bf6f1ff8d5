"""The ranked table of a comparison, as text."""

import math
from typing import TYPE_CHECKING

from ._scores import CLIFF, DEAD, WITHIN, Mean

if TYPE_CHECKING:
    from ._result import Comparison, Row

COLUMNS = (
    "candidate",
    "rate",
    "loss",
    "accuracy",
    "sensitivity",
    "band",
    "cliff",
    "skipped",
    "spikes",
    "diverged",
    "rounds",
    "ms/step",
    "seconds",
    "trivial",
    "dead",
    "flags",
)
MEANING = f"""\
Ranked by the final loss at the best learning rate, mean and standard error over seeds;
a seed that broke counts with its loss before training.
Sensitivity: the mean over all rates of what is lost against the best one; band: decades
of rates within {WITHIN} of its loss; cliff: the lowest rate above it that is more than
{CLIFF} off. Skipped steps, spikes (7 sigma), rounds (steps until the evaluation that
counts) and dead hidden units: at the best rate. Diverged: of all runs, and the earliest
step. Trivial: rates at which a constant predictor is as good. ms/step: of one run,
while others share the machine; seconds: of all runs together; without compilation."""


def table(result: "Comparison") -> str:
    """Aligned columns, a line for what failed, and what the columns mean."""
    # A column that no candidate has a number for is left out.
    lines = [COLUMNS, *(_cells(row) for row in result.rows)]
    shown = [
        i
        for i in range(len(COLUMNS))
        if i == 0 or any(line[i] not in ("", "-") for line in lines[1:])
    ]
    widths = [max(len(line[i]) for line in lines) for i in shown]
    parts = []
    for line in lines:
        cells = [
            line[i].ljust(width)
            if COLUMNS[i] in ("candidate", "flags")
            else line[i].rjust(width)
            for i, width in zip(shown, widths, strict=True)
        ]
        parts.append("  ".join(cells).rstrip())
    parts.insert(1, "  ".join("-" * width for width in widths))
    parts += [f"{name}: {why}" for name, why in result.failed.items()]
    seeds = f"{len(result.seeds)} seed" + ("s" if len(result.seeds) > 1 else "")
    ending = "; interrupted" if result.interrupted else ""
    return "\n".join([*parts, f"{result.steps} steps a run, {seeds}{ending}.", MEANING])


def _cells(row: "Row") -> tuple[str, ...]:
    lost = row.diverged[row.diverged >= 0]
    flags = ["trivial"] if row.trivial[row.scores.loss.argmin()] else []
    if row.dead >= DEAD:
        flags.append("half dead")
    broken = int(row.scores.broken[row.scores.loss.argmin()])
    if broken:
        flags.append(f"{broken} of {row.diverged.shape[1]} seeds broken")
    return (
        row.name,
        _number(row.scores.best_rate, ".2g"),
        _with_error(row.loss, ".4g"),
        _with_error(row.accuracy, ".2%"),
        _with_error(row.scores.sensitivity, ".3g"),
        _number(row.scores.band, ".1f"),
        _number(row.scores.cliff, ".2g"),
        _number(row.skipped, ".3g"),
        _number(row.spikes, ".3g"),
        f"{lost.size}/{row.diverged.size}" + (f" @{lost.min()}" if lost.size else ""),
        _number(row.rounds, ".0f"),
        _number(row.step_ms, ".3g"),
        _number(row.seconds, ".1f"),
        f"{row.trivial.sum()}/{row.trivial.size}" if row.trivial.any() else "-",
        _number(row.dead, ".0%"),
        ", ".join(flags),
    )


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)


def _with_error(value: Mean, form: str) -> str:
    if math.isnan(value.mean):
        return "-"
    known = not math.isnan(value.error)
    error = f"{value.error:.1%}" if form.endswith("%") else f"{value.error:.1g}"
    return format(value.mean, form) + (f" ± {error}" if known else "")
