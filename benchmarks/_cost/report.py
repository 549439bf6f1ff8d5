"""The tables of the cost benchmark: for the terminal, and as Markdown."""

import os
import platform
from datetime import date

import jax
import optax
from rich import box
from rich.table import Table

from .measuring import IN_A_ROW, Cost

COLUMNS = (
    "step",
    "time",
    "quartiles",
    "bytes",
    "temporary",
    "extra state",
    "compile",
    "traces",
    "transfers",
)
LEGEND = (
    "time: of one step over that of bare AdamW in the same round, median; bytes: by "
    "XLA's count, which adds up all branches of a condition whether taken or not, over "
    "the floor of 7 arrays; temporary and extra state: bytes; compile: seconds over "
    "those of bare AdamW; traces: how often Python ran; transfers: instructions that "
    "reach the host. A round is one step on a CPU, and on an accelerator "
    f"{IN_A_ROW} steps that the host sends ahead."
)


def size(count: float) -> str:
    """Bytes, readable."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def cells(cost: Cost) -> list[str]:
    """One row as text; "-" where a step is not ours to compile."""
    timed = [
        cost.name,
        f"{cost.ratio:.2f}",
        f"{cost.spread[0]:.2f} to {cost.spread[1]:.2f}",
    ]
    if not cost.traces:
        return timed + ["-"] * (len(COLUMNS) - len(timed))
    return [
        *timed,
        f"{cost.bytes_ratio:.2f}",
        size(cost.temporary),
        size(cost.extra_state),
        f"{cost.compile_ratio:.1f}",
        str(cost.traces),
        str(cost.transfers),
    ]


def table(title: str, costs: list[Cost]) -> Table:
    """For the terminal."""
    found = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for column in COLUMNS:
        found.add_column(column, justify="left" if column == "step" else "right")
    for cost in costs:
        found.add_row(*cells(cost))
    return found


def machine() -> str:
    """Where and with what a table was made."""
    device = jax.devices()[0]
    return (
        f"{date.today()}, {device.platform} ({device.device_kind}), {os.cpu_count()} "
        f"CPU cores ({platform.machine()}), jax {jax.__version__}, optax "
        f"{optax.__version__}"
    )


def markdown(parts: dict[str, list[Cost]], rounds: int) -> str:
    """The file that is kept."""
    lines = [
        "# What a step costs",
        "",
        "`python benchmarks/cost.py --out benchmarks/cost.md`: "
        f"{machine()}; medians of {rounds} rounds.",
        "",
        LEGEND,
    ]
    for title, costs in parts.items():
        lines += ["", f"## {title}", "", f"| {' | '.join(COLUMNS)} |"]
        lines.append("|---" + "|---:" * (len(COLUMNS) - 1) + "|")
        lines += [f"| {' | '.join(cells(cost))} |" for cost in costs]
    return "\n".join(lines) + "\n"
