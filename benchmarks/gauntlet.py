"""What goes wrong in training, against every method that should prevent it.

    command:   pip install -e ".[examples,test]" && python benchmarks/gauntlet.py
    hardware:  any; written for two CPU cores
    time:      three to six minutes on two CPU cores, --quick 20 seconds
    expected:  `stabilize(per="leaf")` passes every row, `stabilize` all but that of one
               leaf that explodes

Each method trains the same small regression, by SGD unless a row says otherwise, while
one thing at a time goes wrong. What it does is read from the updates alone: SGD is
linear, so the update's norm over the gradient's is the factor that the method applied.
No outcome is written down anywhere; every cell is computed from its run.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import optax
from rich.console import Console
from rich.progress import Progress

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from _gauntlet import faults, report, special
from _gauntlet.criteria import Results
from _gauntlet.methods import Method, methods
from _gauntlet.rates import measure
from _gauntlet.rows import Row, rows
from _gauntlet.simulate import Runs
from options import Parser, finish, folder, whole

QUICK_METHODS = ("stabilize", "stabilize per leaf", "none", "ZClip")
QUICK_STEPS = 1000
# The columns of the table by class.
SHOWN = ("stabilize", "stabilize per leaf", "apply_if_finite + clip", "ZClip", "OLMo")
FOOTNOTE = """\
Chain members stand before the optimizer. Published skip rules run inside our guard,
which never lets a nan through, whatever the rule: only `Levanter, blending` masks by
multiplying, as its authors do. SPAM stands in the chain, with a second moment of its
own and without the resets of Adam's; so does StableAdamW, whose optimizer is Adam only
in the rows that say so. Published variants take norms in float32. AutoClip's window is
longer than any run. A chain member cannot see what Adam makes of its output."""


def column(
    method: Method,
    wanted: list[Row],
    steps: int,
    folder: Path,
    tick: Callable,
) -> Results:
    """Runs one method through every program that the wanted rows need."""
    results = Results(method)
    programs = {row.program for row in wanted}

    def attempt(program: str, run: Callable) -> None:
        try:
            run()
        except Exception as error:  # The method's failure is a result.
            results.errors[program] = f"{type(error).__name__}: {error}"[:200]
            print(
                f"{method.name}, {program}: {results.errors[program]}", file=sys.stderr
            )
        tick()

    def main_program() -> None:
        short, long = faults.short_lanes(), faults.long_lanes(steps) if steps else {}
        runs = Runs(method, short, max(len(short), len(long)))
        results.flagged = runs.flagged
        results.structure_changes = runs.structure_changes()
        saved = any(row.key == "restore" for row in wanted)
        save_to = folder / method.name.replace("/", "_") if saved else None
        results.short, results.restored_same = runs.run(short, save_to)
        if long:
            results.long, _ = runs.run(long)

    attempt("short", main_program)

    for name, program in special.PROGRAMS.items():
        if name in programs:
            attempt(name, lambda run=program: results.special.update(run(method.make)))
    return results


def gauntlet(
    columns: list[Method], wanted: list[Row], steps: int, workers: int
) -> dict[str, Results]:
    """Runs every column, several at a time, the slowest first."""
    order = sorted(columns, key=lambda m: ("published", "ours", "optax").index(m.group))
    special_programs = {row.program for row in wanted} - {"short", "long"}
    with (
        tempfile.TemporaryDirectory() as folder,
        Progress(console=Console(stderr=True), transient=True) as progress,
        ThreadPoolExecutor(workers) as pool,
    ):
        total = len(order) * (1 + len(special_programs))
        task = progress.add_task("gauntlet", total=total)

        def tick() -> None:
            progress.advance(task)

        done = pool.map(lambda m: column(m, wanted, steps, Path(folder), tick), order)
        return {results.method.name: results for results in done}


def among(names: list[str]) -> Callable:
    """An option's type: one of some names."""

    def parse(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(
                f"must be one of {', '.join(map(repr, names))}, got {text!r}"
            )
        return text

    return parse


def main(argv=None) -> int:
    """Prints both tables, and writes them."""
    every, all_rows = methods(), rows()
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="a subset, as a smoke test"
    )
    parser.add_argument("--out", type=folder, default="runs/gauntlet", help="folder")
    parser.add_argument(
        "--only",
        action="append",
        metavar="METHOD",
        type=among([method.name for method in every]),
        help="only this method; may be given several times",
    )
    parser.add_argument(
        "--row",
        action="append",
        metavar="ROW",
        type=among([row.key for row in all_rows]),
        help="only this row, and no rates; may be given several times",
    )
    parser.add_argument("--workers", type=whole(1), default=min(2, os.cpu_count() or 1))
    options = parser.parse_args(argv)
    names = options.only or (QUICK_METHODS if options.quick else None)
    columns = [method for method in every if names is None or method.name in names]
    wanted = [row for row in all_rows if not options.row or row.key in options.row]
    if options.quick:
        wanted = [row for row in wanted if row.program == "short"]
        if not wanted:
            parser.error("--quick runs none of the rows given with --row")
    needs_long = not options.row or any(row.program == "long" for row in wanted)
    steps = (QUICK_STEPS if options.quick else faults.LONG) if needs_long else 0

    started = time.perf_counter()
    seen = gauntlet(columns, wanted, steps, options.workers)
    seconds = time.perf_counter() - started

    cells = {
        method.name: {row.key: report.Cell(row, seen[method.name]) for row in wanted}
        for method in columns
    }
    rates = (
        {} if options.row else {n: measure(r.long) for n, r in seen.items() if r.long}
    )
    about = {
        "seconds": round(seconds, 1),
        "backend": jax.default_backend(),
        "jax": jax.__version__,
        "optax": optax.__version__,
        "steps": {"short": faults.STEPS, "long": steps},
    }
    text = "\n\n".join(
        [
            "## By class of failure",
            report.by_class([m for m in columns if m.name in SHOWN], wanted, cells),
            "Rows passed, of those that apply.",
            "## Failure modes",
            report.failures(columns, wanted, cells),
            FOOTNOTE,
            "What passes:",
            report.criteria(wanted),
            "Our own failures:",
            report.reasons(columns, wanted, cells),
            *(["## Rates", report.rates(columns, rates)] if rates else []),
            f"{seconds:.0f} s in all, on {about['backend']}, jax {jax.__version__}, "
            f"optax {optax.__version__}.",
        ]
    )
    (options.out / "gauntlet.md").write_text(text + "\n", encoding="utf-8")
    (options.out / "gauntlet.json").write_text(
        report.as_json(about, cells, rates), encoding="utf-8"
    )
    print(text)
    return 0


if __name__ == "__main__":
    finish(main)
