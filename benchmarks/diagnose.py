"""Faults planted in eight architectures, and what a diagnosis says of them.

    command:   pip install -e ".[test]" && python benchmarks/diagnose.py
    hardware:  any; written for two CPU cores
    time:      about forty minutes on two CPU cores, --quick three minutes
    expected:  right cause and right layer for at least 95 % of the faults, no alarm on
               a healthy network

MLPs, convolutions, a ResNet, pre-norm and post-norm transformers, a recurrent network
and a mixture of experts, in Flax NNX, Flax Linen, Equinox and plain JAX; scikit-learn's
digits and the text of Python's own manual.
"""

import sys
import time
from pathlib import Path

import jax
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_digits

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import text
from _diagnose import report
from _diagnose.cost import ratio
from _diagnose.faults import cases
from _diagnose.models import BUILDERS
from _diagnose.trial import Data, Result, run
from options import Parser, file, finish, whole


def measured(wanted, remedies: bool) -> list[Result]:
    """All results, one case at a time: most of the time is compilation."""
    data = Data(load_digits(), text.load(None))
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("cases", total=len(wanted))
        results = []
        for case in wanted:
            results.append(run(data, case, remedies))
            jax.clear_caches()  # A process may hold so many programs and no more.
            progress.advance(bar)
    return results


def show(results, cost, console: Console) -> None:
    """The tables, in the terminal."""
    table = Table(*report.HEADERS, box=box.SIMPLE)
    for row in report.rows(results):
        table.add_row(*row)
    console.print(table)
    summary = Table("goal", "found", "met", box=box.SIMPLE)
    for goal in report.goals(results, cost):
        summary.add_row(goal.what, goal.found, "yes" if goal.met else "[red]no[/red]")
    console.print(summary)
    for line in report.misses(results):
        console.print(line)


def main(argv=None) -> int:
    """Prints the tables and the goals, and writes them."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two networks, no cost")
    parser.add_argument(
        "--network", choices=sorted(BUILDERS), help="only the cases of one network"
    )
    parser.add_argument("--cases", type=whole(1), metavar="N", help="only the first N")
    parser.add_argument("--seed", type=whole(0), default=11, help="weights, batches")
    parser.add_argument("--out", type=file, metavar="FILE", help="write Markdown")
    options = parser.parse_args(argv)
    wanted = cases(options.seed)
    if options.quick:
        wanted = [case for case in wanted if case.network in ("mlp_tanh", "mixture")]
    if options.network:
        wanted = [case for case in wanted if case.network == options.network]
    wanted = wanted[: options.cases]

    started, cost, timed = time.perf_counter(), None, ""
    if not (options.quick or options.network or options.cases):
        gradient, whole_report, first = ratio()
        cost = whole_report / gradient
        timed = (
            f"GPT of 10.6 million parameters, batch 4: a gradient {gradient:.2f} s, a "
            f"report {whole_report:.2f} s, the first one {first:.0f} s, compilation "
            "included. "
        )
    results = measured(wanted, remedies=True)
    about = (
        f"{len(results)} cases, seed {options.seed}, "
        f"{time.perf_counter() - started:.0f} s in all, on {jax.default_backend()}, "
        f"jax {jax.__version__}. {timed}"
    ).strip()
    console = Console(width=None if sys.stdout.isatty() else 130)
    show(results, cost, console)
    console.print(about)
    if options.out:
        written = report.markdown(results, cost, about)
        options.out.write_text(written + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    finish(main)
