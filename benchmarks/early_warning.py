"""How many loss spikes `layer_health` foretells, how early, and how often for nothing.

    command:   pip install -e ".[examples]" && python benchmarks/early_warning.py
    hardware:  any; written for two CPU cores
    time:      about ten minutes on two CPU cores, --quick half a minute
    expected:  benchmarks/early_warning.md

Small networks train until they spike, by themselves. A spike is a loss above the mean
of the last 100 steps and 5 of their deviations, for two steps. It is foretold if
`layer_health(every=1)` warned in the 32 steps before it. A warning with no spike in the
next 32 steps, nor in the 100 before it, is a false alarm; those in the 20 steps after
one belong to it. The first 200 steps of a run are not counted.

The margin is chosen on some runs: the one that foretells most spikes with at most 0.75
false alarms in 1,000 steps. It is judged on others, other seeds and other kinds of
runs, where at least 70 % and at most 1 are the aim.
"""

import platform
import sys
import time
from datetime import date
from pathlib import Path

import jax
import numpy as np
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from _early_warning.runs import kinds, train
from _early_warning.scores import NOTHING, Score, score
from options import Parser, command, file, finish, whole

MARGINS = tuple(2 ** (k / 8) for k in range(13))
MOST_FALSE = 0.75  # In 1,000 steps; 1 is the aim on other runs.
TUNED_ON = (
    "regression, tanh",
    "regression, GELU",
    "autoencoder, tanh",
    "digits, GELU",
    "regression, tanh, batch 256",
    "regression, tanh, momentum",
)
TUNING_SEEDS, JUDGING_SEEDS = [0, 1, 2, 3], [20, 21, 40, 41]


def scored(runs, margin: float) -> Score:
    """The score of all runs of a kind at a margin."""
    total = NOTHING
    for loss, excess in zip(*runs, strict=True):
        total += score(loss, excess > np.log2(margin))
    return total


def chosen(tuning: list) -> float:
    """The margin that foretells most with few enough false alarms."""
    best, found = MARGINS[-1], -1
    for margin in MARGINS:
        total = sum((scored(runs, margin) for runs in tuning), NOTHING)
        if total.false_per_thousand <= MOST_FALSE and total.foretold > found:
            best, found = margin, total.foretold
    return best


def row(name: str, total: Score) -> str:
    """One row of the report."""
    recall = f"{100 * total.recall:.0f} %" if total.spikes else "-"
    leads = "-"
    if total.leads:
        tenth, median, ninth = np.percentile(total.leads, (10, 50, 90))
        leads = f"{median:.0f} ({tenth:.0f} to {ninth:.0f})"
    return (
        f"| {name} | {total.steps} | {total.spikes} | {total.foretold} | {recall} | "
        f"{total.false_alarms} | {total.false_per_thousand:.2f} | {leads} |"
    )


def report(options, margin, tuning, judging, seconds) -> str:
    """The committed table."""
    head = (
        "| runs | steps | spikes | foretold | share | false alarms | in 1,000 steps | "
        "lead, steps (10 to 90 %) |\n|---|---|---|---|---|---|---|---|"
    )
    rows = [row(f"{name}; tuned on", scored(r, margin)) for name, r in tuning.items()]
    other = {name: scored(runs, margin) for name, runs in judging.items()}
    rows += [row(f"{name}; judged", total) for name, total in other.items()]
    full = [total for name, total in other.items() if "batch" not in name]
    rows.append(
        row(
            "**all tuned on**",
            sum((scored(r, margin) for r in tuning.values()), NOTHING),
        )
    )
    rows.append(row("**judged, whole data**", sum(full, NOTHING)))
    rows.append(row("**all judged**", sum(other.values(), NOTHING)))
    curve = "| margin | foretold | false in 1,000 steps |\n|---|---|---|"
    for each in MARGINS:
        total = sum((scored(runs, each) for runs in judging.values()), NOTHING)
        curve += (
            f"\n| {each:.2f} | {100 * total.recall:.0f} % | "
            f"{total.false_per_thousand:.2f} |"
        )
    return (
        "# Early warning\n\n"
        f"`{options.command}`, {options.steps} steps a run, "
        f"{platform.system()}, jax {jax.__version__}, {date.today()}, "
        f"{seconds:.0f} s.\n\n{__doc__.split('expected:')[1].split(chr(10), 2)[2]}\n"
        f"Margin chosen: {margin:.2f}. Two rates and four seeds of each kind.\n\n"
        + "\n".join([head, *rows])
        + "\n\nThe judged runs at other margins:\n\n"
        + curve
        + "\n"
    )


def main(argv=None) -> int:
    """Trains all, chooses the margin, judges it and writes the report."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=whole(400), default=3000, help="of a run")
    parser.add_argument("--quick", action="store_true", help="two kinds alone")
    parser.add_argument("--out", type=file, help="file for the report")
    options = parser.parse_args(argv)
    options.command = command("benchmarks/early_warning.py", argv)
    console, started = Console(stderr=True), time.perf_counter()
    known = kinds()
    if options.quick:
        names = ("regression, tanh", "regression, ReLU, batch 64")
        known = {name: known[name] for name in names}
    tuning, judging = {}, {}
    for name, kind in known.items():
        console.print(f"{name}, {time.perf_counter() - started:.0f} s", highlight=False)
        if name in TUNED_ON:
            losses, excess = train(kind, TUNING_SEEDS + JUDGING_SEEDS, options.steps)
            half = len(losses) // 2
            tuning[name] = losses[:half], excess[:half]
            judging[name] = losses[half:], excess[half:]
        else:
            judging[name] = train(kind, JUDGING_SEEDS, options.steps)
    margin = chosen(list(tuning.values()))
    seconds = time.perf_counter() - started
    text = report(options, margin, tuning, judging, seconds)
    print(text)
    if options.out:
        options.out.write_text(text)
    return 0


if __name__ == "__main__":
    finish(main)
