"""The ranked table of a comparison as text."""

import math

from ._scores import CLIFF, DEAD, WITHIN, Mean

MEANING = f"""\
Ranked by the final loss at the best learning rate, mean and standard error over seeds;
a seed that broke counts with its loss before training.
Sensitivity: the mean over all rates of what is lost against the best one; band: decades
of rates within {WITHIN} of its loss; cliff: the lowest rate above it that is more than
{CLIFF} off. Skipped steps, spikes (7 sigma), rounds (steps until the evaluation that
counts) and dead hidden units: at the best rate. Diverged: of all runs, and the earliest
step. Trivial: rates at which a constant predictor is as good. ms/step: of one run,
while others share the machine; seconds: of all runs together; without compilation."""


def table(result) -> str:
    """Format aligned columns, the failed candidates and the meaning of the columns."""
    rows = [_cells(row) for row in result.rows]
    columns = []
    for heading in rows[0] if rows else ("candidate",):
        cells = [row[heading] for row in rows]
        # A column in which no candidate has a value is left out.
        if heading == "candidate" or not {*cells} <= {"", "-"}:
            width = max(map(len, (heading, *cells)))
            align = "<" if heading in ("candidate", "flags") else ">"
            column = (heading, "-" * width, *cells)
            columns.append([f"{cell:{align}{width}}" for cell in column])
    lines = ["  ".join(cells).rstrip() for cells in zip(*columns, strict=True)]
    lines += [f"{name}: {reason}" for name, reason in result.failed.items()]
    seeds = f"{len(result.seeds)} seed" + ("s" if len(result.seeds) > 1 else "")
    ending = "; interrupted" if result.interrupted else ""
    return "\n".join([*lines, f"{result.steps} steps a run, {seeds}{ending}.", MEANING])


def _cells(row) -> dict[str, str]:
    scores, best = row.scores, int(row.scores.loss.argmin())
    lost = row.diverged[row.diverged >= 0]
    trivial = f"{row.trivial.sum()}/{row.trivial.size}" if row.trivial.any() else "-"
    flags = ["trivial"] if row.trivial[best] else []
    if row.dead >= DEAD:
        flags.append("half dead")
    if scores.broken[best]:
        flags.append(f"{scores.broken[best]} of {row.diverged.shape[1]} seeds broken")
    return {
        "candidate": row.name,
        "rate": _number(scores.best_rate, ".2g"),
        "loss": _with_error(row.loss, ".4g"),
        "accuracy": _with_error(row.accuracy, ".2%"),
        "sensitivity": _with_error(scores.sensitivity, ".3g"),
        "band": _number(scores.band, ".1f"),
        "cliff": _number(scores.cliff, ".2g"),
        "skipped": _number(row.skipped, ".3g"),
        "spikes": _number(row.spikes, ".3g"),
        "diverged": f"{lost.size}/{row.diverged.size}"
        + (f" @{lost.min()}" if lost.size else ""),
        "rounds": _number(row.rounds, ".0f"),
        "ms/step": _number(row.step_ms, ".3g"),
        "seconds": _number(row.seconds, ".1f"),
        "trivial": trivial,
        "dead": _number(row.dead, ".0%"),
        "flags": ", ".join(flags),
    }


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)


def _with_error(value: Mean, form: str) -> str:
    text = _number(value.mean, form)
    if math.isnan(value.mean) or math.isnan(value.error):
        return text
    return f"{text} ± {value.error:{'.1%' if form.endswith('%') else '.1g'}}"
