"""The two tables in Markdown, and everything behind them as JSON."""

import json
import math
from collections.abc import Iterable
from typing import Any

from markdown_table import table

from .faults import SHIFTS, STATIONARY
from .methods import GROUPS, Method
from .rates import LEGEND, Rates
from .rows import CLASSES, Row, class_of


class Cell:
    """One row of one method: what was measured, and what follows."""

    def __init__(self, row: Row, results) -> None:
        """Applies a row's criterion, unless the row or the run has none."""
        errors = (results.errors.get(name, "") for name in (row.program, "short"))
        self.checks, self.error = [], next(filter(None, errors), "")
        if not row.applies(results.method):
            self.outcome = "n.a."
            return
        if not self.error:
            self.checks = row.check(results)
        passed = bool(self.checks) and all(check.passed for check in self.checks)
        self.outcome = "pass" if passed else "FAIL"

    def why(self) -> str:
        """What failed, in numbers."""
        missed = [check for check in self.checks if not check.passed]
        return self.error or "; ".join(
            f"{check.what}: {check.value:.3g}, "
            + (
                f"at least {check.least:g}"
                if check.least > -math.inf
                else f"at most {check.most:g}"
            )
            for check in missed
        )

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        checks = [
            {
                "what": check.what,
                "value": _finite(check.value),
                "at_least": _finite(check.least),
                "at_most": _finite(check.most),
                "passed": check.passed,
            }
            for check in self.checks
        ]
        return {"outcome": self.outcome, "error": self.error, "checks": checks}


Cells = dict[str, dict[str, Cell]]  # Method name -> row key -> cell.


def failures(methods: list[Method], rows: list[Row], cells: Cells) -> str:
    """One table a group of methods: the rows against the columns."""
    parts = []
    for group, title in GROUPS.items():
        own = [method for method in methods if method.group == group]
        if not own:
            continue
        lines = [
            [row.title, *(cells[method.name][row.key].outcome for method in own)]
            for row in rows
        ]
        totals = [_total(cells[method.name].values()) for method in own]
        lines.append(["**passed**", *totals])
        names = [method.name for method in own]
        parts.append(f"### {title}\n\n{table(['failure mode', *names], lines)}")
    return "\n\n".join(parts)


def by_class(methods: list[Method], rows: list[Row], cells: Cells) -> str:
    """Return the rows passed by each class of failure, one column a method."""
    lines = []
    for name in CLASSES:
        own = [row.key for row in rows if class_of(row.key) == name]
        passed = [
            _total([cells[method.name][key] for key in own]) for method in methods
        ]
        lines.append([name, *passed])
    totals = [_total(cells[method.name].values()) for method in methods]
    lines.append(["**all**", *totals])
    return table(["class of failure", *(method.name for method in methods)], lines)


def criteria(rows: list[Row]) -> str:
    """What passes, row by row."""
    return "\n".join(f"- **{row.title}**: {row.rule}." for row in rows)


def reasons(methods: list[Method], rows: list[Row], cells: Cells) -> str:
    """Every failing cell of our own, with the numbers."""
    lines = [
        f"- {method.name}, {row.title}: {cells[method.name][row.key].why()}"
        for method in methods
        if method.group == "ours"
        for row in rows
        if cells[method.name][row.key].outcome == "FAIL"
    ]
    return "\n".join(lines) or "None."


def rates(methods: list[Method], measured: dict[str, Rates]) -> str:
    """The second table, one line a method."""
    shifts = [f"{sign}{factor}" for sign in ("x", "/") for factor in SHIFTS]
    header = [
        "method",
        *(f"healthy touched, {sigma}" for sigma in STATIONARY),
        *(f"recovery {shift}" for shift in shifts),
        "outliers caught",
        "caught, one in 50",
        "halved",
        "factor",
    ]
    lines = [
        [
            method.name,
            *(
                f"{100 * share:.1f} %"
                for share in measured[method.name].touched.values()
            ),
            *(
                "never" if steps is None else str(steps)
                for steps in measured[method.name].recovery.values()
            ),
            f"{100 * measured[method.name].caught:.1f} %",
            f"{100 * measured[method.name].frequent_caught:.1f} %",
            f"{100 * measured[method.name].halved:.1f} %",
            f"{measured[method.name].factor:.2f}",
        ]
        for method in methods
        if method.name in measured
    ]
    return f"{table(header, lines)}\n\n{LEGEND}"


def as_json(about: dict[str, Any], cells: Cells, measured: dict[str, Rates]) -> str:
    """Everything, for a program."""
    whole = {
        **about,
        "cells": {
            name: {key: cell.plain() for key, cell in own.items()}
            for name, own in cells.items()
        },
        "rates": {name: own._asdict() for name, own in measured.items()},
    }
    return json.dumps(whole, indent=1, allow_nan=False) + "\n"


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _total(cells: Iterable[Cell]) -> str:
    outcomes = [cell.outcome for cell in cells]
    return f"{outcomes.count('pass')} of {len(outcomes) - outcomes.count('n.a.')}"
