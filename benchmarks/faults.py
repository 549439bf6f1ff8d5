"""Faults to survive: random schedules of what goes wrong, and what is left after them.

    command:   pip install -e ".[examples]" && python benchmarks/faults.py
    hardware:  any; written for two CPU cores
    time:      some hours; --seeds 1800 --alone 54 one beside other work; --quick a
               minute
    expected:  see `faults.md`

A small network is trained for 2,000 steps under 1 to 3 episodes of faults of 1 to 50
steps each: nan, inf, 1e20, denormal numbers or 7e4, in one element or a whole leaf, of
gradient, loss, update, parameters or inner state. Six optimizers, float32, bfloat16 and
float16 with a scaled loss. The preset meets the faults that it is meant for, in
gradient, loss and update, also with a `skip` that watches the norm of the update; with
`roll_back` through `apply` it meets all. Beside them, on the same schedules, are
`optax.clip_by_global_norm(1.0)` under `apply_if_finite` and OLMo's rule as published. A
part of the schedules runs without `vmap`, which would turn a condition into a select.

After each: parameters and inner state are finite; skipped steps left both bit for bit;
each total is the sum of what the steps reported; parameters still move; the loss over
all data, in the mean of the last 50 steps, is within 5 % of a clean run's.
"""

import sys
import time
from pathlib import Path

import jax
import optax
from rich.console import Console
from rich.progress import Progress

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from _faults import problem, report, runs, schedules
from options import Parser, finish, folder, whole

PRESET, ROLLING = "stabilize", "stabilize + roll_back"
WATCHING = "stabilize, update_norm watched"
PEERS = ("optax clip + apply_if_finite", "OLMo's rule")
GUARDED = {PRESET, ROLLING, WATCHING, "OLMo's rule"}
ALONE = "without vmap"


def parts(method, places, each: int, seed: int, *, vmapped: bool, cells, tick):
    """One method over all optimizers and dtypes."""
    found = []
    for i, (optimizer, dtype) in enumerate(cells):
        drawn = schedules.draw(each, places, seed + 1000 * i)
        run = runs.make_run(optimizer, dtype, method)
        outcome = runs.run_many(run, drawn, vmapped=vmapped)
        clean = runs.clean_loss(optimizer, dtype)
        name = method if vmapped else f"{method}, {ALONE}"
        found.append(report.Part(name, optimizer, dtype, drawn, outcome, clean))
        tick()
    return found


def main(argv=None) -> int:
    """Prints the tables, and writes them."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="Adam, float32, few")
    known = list(problem.OPTIMIZERS)
    parser.add_argument("--optimizers", nargs="+", choices=known, default=known)
    parser.add_argument(
        "--dtypes", nargs="+", choices=problem.DTYPES, default=problem.DTYPES
    )
    parser.add_argument("--seeds", type=whole(1), default=10_000, help="schedules")
    parser.add_argument("--alone", type=whole(0), default=300, help="without vmap")
    parser.add_argument("--seed", type=whole(0), default=0, help="of the first")
    parser.add_argument("--out", type=folder, default="runs/faults", help="folder")
    options = parser.parse_args(argv)
    cells = [(o, d) for o in options.optimizers for d in options.dtypes]
    count, alone = options.seeds, options.alone
    if options.quick:
        cells, count, alone = cells[:1], min(count, 40), min(alone, 2)
    each, each_alone = -(-count // len(cells)), -(-alone // len(cells))

    started, sections = time.perf_counter(), []
    settings = (
        (PRESET, schedules.GUARDED, (WATCHING, *PEERS)),
        (ROLLING, schedules.PLACES, PEERS),
    )
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("faults", total=len(cells) * (2 * len(PEERS) + 5))
        tick = lambda: progress.advance(task)
        for method, places, others in settings:
            common = {"cells": cells, "tick": tick}
            found = parts(method, places, each, options.seed, vmapped=True, **common)
            if each_alone:
                seed = options.seed + 7
                found += parts(
                    method, places, each_alone, seed, vmapped=False, **common
                )
            for other in others:
                found += parts(
                    other, places, each, options.seed, vmapped=True, **common
                )
            guarded = GUARDED | {f"{method}, {ALONE}"}
            sections += [
                f"## Faults in {', '.join(places)}",
                report.overall(found, guarded),
                report.bad_steps(found, method),
                f"Within 5 %, `{method}`, by optimizer:",
                report.by_optimizer(found, method),
                "And by what the schedule holds, among other faults:",
                report.by_fault(found, method),
            ]
    about = (
        f"{each * len(cells)} schedules a method, seed {options.seed}, on "
        f"{jax.default_backend()}, jax {jax.__version__}, optax {optax.__version__}; "
        f"{time.perf_counter() - started:.0f} s."
    )
    text = "\n\n".join(["# Faults to survive", about, *sections]) + "\n"
    (options.out / "faults.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    finish(main)
