"""The learning rate at which training first spikes, against what was predicted.

    command:   pip install -e ".[examples]" && python benchmarks/critical_lr.py
    hardware:  any; written for two CPU cores
    time:      about five minutes on two CPU cores, --quick half a minute
    expected:  the probe within a factor 1.4 for at least 90 % of 36 configurations

MLP, CNN and a small transformer; ReLU, tanh and GELU; SGD, momentum and Adam; three
batch sizes; scikit-learn's digits and the text of Python's own manual. The observed
rate comes from training at every rate of a grid of x1.1; the predictions come from
`stablegrad.critical_learning_rate`, with the same settings for all.
"""

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import stablegrad as sg

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from _critical_lr import report
from _critical_lr.report import Row
from _critical_lr.spikes import LOWEST, first_spike, spikes_at
from _critical_lr.tasks import Task, make, tasks
from options import Parser, file, finish, whole

SHORT = 5  # Steps of the shorter probe.


def measure(task: Task) -> Row:
    """Predicts, then trains."""
    loss_fn, params, batch = make(task)
    found = sg.critical_learning_rate(
        loss_fn, params, batch, task.tx, learning_rate=1.0
    )
    short = sg.critical_learning_rate(
        loss_fn, params, batch, task.tx, learning_rate=1.0, steps=SHORT
    )
    asked = loss_fn, task.tx, params, batch
    return Row(
        task=task,
        observed=first_spike(*asked, LOWEST[task.optimizer]),
        directional=found.directional,
        forward=found.forward,
        probe=found.probe,
        short_probe=short.probe,
        safe_start=found.safe_start,
        safe_start_spikes=spikes_at(*asked, found.safe_start),
    )


def measured(wanted: list[Task], workers: int) -> list[Row]:
    """All rows, several at a time: most of the time is compilation."""
    with (
        Progress(console=Console(stderr=True), transient=True) as progress,
        ThreadPoolExecutor(workers) as pool,
    ):
        bar = progress.add_task("configurations", total=len(wanted))

        def one(task: Task) -> Row:
            row = measure(task)
            progress.advance(bar)
            return row

        return list(pool.map(one, wanted))


def show(rows: list[Row], console: Console) -> None:
    """Both tables, in the terminal."""
    title = "estimates as multiples of the first spike"
    table = Table(box=box.SIMPLE, title=title)
    for header in report.HEADERS:
        table.add_column(header, no_wrap=header == report.HEADERS[0])
    for row in rows:
        table.add_row(*report.cells(row))
    console.print(table)
    summary = Table("goal", "found", "met", box=box.SIMPLE)
    for goal in report.goals(rows):
        summary.add_row(goal.what, goal.found, "yes" if goal.met else "[red]no[/red]")
    console.print(summary)


def main(argv=None) -> int:
    """Prints the table and the goals, and writes them."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="a few configurations, as a smoke test"
    )
    parser.add_argument(
        "--configurations", type=whole(1), metavar="N", help="only the first N"
    )
    parser.add_argument(
        "--seed", type=whole(0), default=0, help="of parameters and batches"
    )
    parser.add_argument(
        "--out", type=file, metavar="FILE", help="write Markdown, as critical_lr.md"
    )
    parser.add_argument("--workers", type=whole(1), default=min(2, os.cpu_count() or 1))
    options = parser.parse_args(argv)
    wanted = tasks(options.seed)
    wanted = wanted[::8] if options.quick else wanted
    wanted = wanted[: options.configurations]

    started = time.perf_counter()
    rows = measured(wanted, options.workers)
    about = (
        f"{len(rows)} configurations, seed {options.seed}, "
        f"{time.perf_counter() - started:.0f} s in all, on {jax.default_backend()}, "
        f"jax {jax.__version__}."
    )
    console = Console(width=None if sys.stdout.isatty() else 130)
    show(rows, console)
    console.print(about)
    if options.out:
        text = report.markdown(rows, about)
        options.out.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    finish(main)
