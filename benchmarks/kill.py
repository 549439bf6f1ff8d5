"""Exact resume: training that is killed at random moments and started again.

    command:   pip install -e ".[examples]" && python benchmarks/kill.py
    hardware:  any; written for two CPU cores
    time:      11 to 40 minutes, beside other work; --quick two
    expected:  see `kill.md`

A training process saves with `HealthyCheckpoints` every third step, asynchronously,
while it trains under `stabilize` with `roll_back` through nan batches, a spike, and a
burst of bad labels that is rolled back. It is killed with SIGKILL, up to five times a
run, at random moments from its start-up to its end, and started again. In the end
parameters, optimizer and guard state, averages, losses, events and metrics must be
those of a run that was left alone, bit for bit, and no start may go on from before a
checkpoint that was known to be whole.
"""

import sys
import tempfile
import time
from pathlib import Path

import jax
import optax
from rich.console import Console
from rich.progress import Progress

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from _kill import training, trial
from options import Parser, finish, folder, whole

EACH = 5  # Kills of one run.


def word(number: int | None) -> str:
    """A number of a table, or what stands for none."""
    return "-" if number in (None, -1) else str(number)


def log(trials: list[trial.Trial]) -> str:
    """Every start of every run, as a table."""
    rows = [
        "| run | went on from | until step | killed | half a checkpoint left |",
        "|---|---|---|---|---|",
    ]
    for number, found in enumerate(trials):
        for start in found.starts:
            cells = (str(number), word(start.restored), word(start.step))
            flags = ("yes" if x else "no" for x in (start.is_killed, start.amid_write))
            rows.append(f"| {' | '.join((*cells, *flags))} |")
    return "\n".join(rows)


def killed_in(trials: list[trial.Trial]) -> list[trial.Start]:
    """The starts that were killed; some reach the end before they are."""
    return [start for found in trials for start in found.starts if start.is_killed]


def summary(trials: list[trial.Trial], reference: dict) -> tuple[list[str], bool]:
    """What came of it, and whether all is as it should be."""
    kills = killed_in(trials)
    unequal = [trial.unequal(found.result, reference) for found in trials]
    lost = [line for found in trials for line in trial.lost(found)]
    lines = [
        f"{len(kills)} kills in {len(trials)} runs; {sum(k.amid_write for k in kills)} "
        f"of them left half a checkpoint behind, "
        f"{sum(k.step is None for k in kills)} came before the first step.",
        f"{sum(not names for names in unequal)} of {len(trials)} runs ended as the one "
        "that was left alone: parameters and averages, inner state and guard, losses, "
        "events and metrics, bit for bit.",
        f"{len(lost)} starts went on from before a whole checkpoint.",
    ]
    lines += [f"run {i} differs in {', '.join(x)}" for i, x in enumerate(unequal) if x]
    return lines + lost, not any(unequal) and not lost


def main(argv=None) -> int:
    """Prints the tables and writes them; 1 if a run differs."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=whole(1), default=100, help="in all")
    parser.add_argument("--steps", type=whole(1), default=training.STEPS, help="a run")
    parser.add_argument("--quick", action="store_true", help="five kills")
    parser.add_argument("--seed", type=whole(0), default=0, help="of the first run")
    parser.add_argument("--out", type=folder, default="runs/kill", help="folder")
    options = parser.parse_args(argv)
    kills = EACH if options.quick else options.kills
    started, trials = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as made:
        root = Path(made)
        cache = root / "cache"
        reference = trial.uninterrupted(root / "alone", options.steps, cache)
        with Progress(console=Console(stderr=True), transient=True) as progress:
            bar = progress.add_task("kills", total=kills)
            while (done := len(killed_in(trials))) < kills:
                number = len(trials)
                arguments = options.steps, min(EACH, kills - done), cache
                seed, into = options.seed + number, root / str(number)
                trials.append(trial.killed(seed, into, *arguments))
                progress.update(bar, completed=len(killed_in(trials)))
    lines, is_fine = summary(trials, reference)
    about = (
        f"{options.steps} steps a run, seed {options.seed}, on "
        f"{jax.default_backend()}, jax {jax.__version__}, optax {optax.__version__}; "
        f"{time.perf_counter() - started:.0f} s."
    )
    text = "\n\n".join(["# Exact resume", about, *lines, log(trials)]) + "\n"
    (options.out / "kill.md").write_text(text, encoding="utf-8")
    print(text)
    return 0 if is_fine else 1


if __name__ == "__main__":
    finish(main)
