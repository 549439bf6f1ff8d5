"""Healthy runs of many kinds, bare and guarded: whether a guard does any harm.

    command:   pip install -e ".[examples]" && python benchmarks/no_harm.py
    hardware:  any; written for two CPU cores
    time:      ten to fifteen minutes on two CPU cores with eight seeds; --quick three;
               --full, with the peers, about an hour
    expected:  `stabilize` harms no run but those that `no_harm.md` explains

Every run learns well without a guard, and each for reasons that a guard may mistake for
an accident: labels that lie, losses that rise with a new task, kinds of batches that
come rarely, gradients that are mostly zero. Each is a tiny program, trained from the
same data, weights and batches by every method, eight seeds at once.

A run is harmed if the method's result is worse than bare's, seed by seed, by more than
1 % of what bare gains from start to end, and the 95 % t-interval of the mean difference
excludes 0. Of many runs that differ by chance alone, one in forty looks harmed:
`--tasks NAME --first-seed 100 --seeds 32` tells. Results whose loss falls by decades
are compared as logarithms.

Muon normalises its input, so a clip of the global norm before it changes nothing of its
update: there it is inert, and only refusals and the rate's scale can act.
"""

import argparse
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from _no_harm import records, report
from _no_harm.methods import (
    BARE,
    LENIENT,
    LOOKING,
    OURS,
    PEERS,
    ROLLING,
    Method,
    methods,
)
from _no_harm.task import EVALUATIONS, Runs, Task
from _no_harm.tasks import QUICK, every_task
from options import Parser, file, finish, folder, whole


def measured(
    task: Task, columns: list[Method], seeds: range, steps: int | None
) -> dict:
    """One task by all methods."""
    runs, seen = Runs(task, seeds, steps), {}
    length = EVALUATIONS * runs.chunk
    for method in columns:
        if method.looks and not task.looks:
            continue
        started = time.perf_counter()
        outcome = runs.run(method.wrap(length), method.looks)
        seen[method.name] = outcome, time.perf_counter() - started
    return records.of_task(task, seeds, length, seen)


def names_among(known: list[str]):
    """An option's type: names with commas between."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(
                    f"must be among {', '.join(known)}, got {name!r}"
                )
        return names

    return parse


def main(argv=None) -> int:
    """Prints the tables, and writes them."""
    tasks = every_task()
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=", ".join(QUICK))
    parser.add_argument("--full", action="store_true", help="the peers as well")
    parser.add_argument(
        "--value-fn", action="store_true", help="stabilize with `value_fn=` as well"
    )
    parser.add_argument(
        "--roll-back", action="store_true", help="stabilize with `roll_back` as well"
    )
    parser.add_argument(
        "--share", action="store_true", help="stabilize with share=0.001 as well"
    )
    parser.add_argument(
        "--tasks", type=names_among([task.name for task in tasks]), metavar="A,B"
    )
    parser.add_argument(
        "--seeds", type=whole(2), default=8, help="how many; one tells nothing"
    )
    parser.add_argument("--first-seed", type=whole(0), default=0)
    parser.add_argument(
        "--steps", type=whole(1), help="in place of each task's own, to try it out"
    )
    parser.add_argument(
        "--jsonl", type=file, metavar="FILE", help="append each task's record"
    )
    parser.add_argument(
        "--read", type=Path, metavar="FILE", help="the tables of such a file; no runs"
    )
    parser.add_argument("--out", type=folder, default="runs/no_harm", help="folder")
    options = parser.parse_args(argv)
    found = []
    if options.read:
        try:
            found = records.stored(options.read)
        except (OSError, ValueError) as error:
            parser.error(f"argument --read: {options.read}: {error}")

    wanted = {BARE, OURS}
    wanted |= set(PEERS) if options.full else set()
    wanted |= {LOOKING} if options.value_fn else set()
    wanted |= {ROLLING} if options.roll_back else set()
    wanted |= {LENIENT} if options.share else set()
    columns = [method for method in methods() if method.name in wanted]
    chosen = options.tasks or (QUICK if options.quick else None)
    seeds = range(options.first_seed, options.first_seed + options.seeds)

    started, interrupted = time.perf_counter(), False
    if not options.read:
        tasks = [task for task in tasks if chosen is None or task.name in chosen]
        try:
            with Progress(console=Console(stderr=True), transient=True) as progress:
                for task in progress.track(tasks):
                    record = measured(task, columns, seeds, options.steps)
                    records.append(record, options.jsonl)
                    found.append(record)
                    progress.console.print(report.line(record), soft_wrap=True)
        except KeyboardInterrupt:
            if not found:
                raise
            interrupted = True
    about = records.about(found)
    if not options.read:
        about += f"; {time.perf_counter() - started:.0f} s in all"
    if interrupted:
        about += f"; interrupted after {len(found)} of {len(tasks)} runs"
    text = report.whole(found, about + ".")
    (options.out / "no_harm.md").write_text(text, encoding="utf-8")
    print(text)
    return 130 if interrupted else 0


if __name__ == "__main__":
    finish(main)
