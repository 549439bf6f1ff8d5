"""Learning-rate schedules at a rate that explodes, and what would have helped.

    command:   pip install -e ".[examples]" && python examples/schedules.py
               with --data-dir FOLDER on MNIST
    hardware:  two CPU cores; the same script runs unchanged on a GPU or TPU
    time:      one minute, on the digits as on MNIST, compilation included
    expected:  at chance (8 to 11 % accuracy) under every schedule and under stabilize
               without `value_fn=`; explosion-aware 98.9 % and stabilize, looking 98.2 %
               on the digits, 92.9 % and 93.9 % on MNIST (two-core CPU, 2026-11-21,
               jax 0.10.2; --seed 1: 96.2 and 97.4 %, 91.1 and 93.8 %)

A ReLU network (six hidden layers of 64) learns handwritten digits with momentum SGD,
from the same weights and the same batches each time:

    static              the highest rate, always
    cosine              falls from it to 0 as half a cosine
    exponential         falls from it to a hundredth
    WSD                 up in a tenth of the steps, stays, down in the last fifth
    rising stairs       an eighth, a quarter, half of it for a tenth each, then all
    falling stairs      halves after every fifth of the steps
    explosion-aware     rising stairs, in sg.scale_by_explosion_aware_schedule
    stabilize           static, under sg.stabilize
    stabilize, looking  the same with `value_fn=`, so that it looks before it steps

A schedule that starts low or falls puts the explosion off or cuts it short, but one
is enough: ReLU units that it throws below zero for all inputs stay there. The table
tells of the norm of the gradient before anything is done about it. Ctrl-C reports and
draws the runs that are finished.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import digits
import jax
import jax.numpy as jnp
import numpy as np
import optax
from classifiers import epoch, make_evaluate, make_step, start
from figures import draw_schedules
from flax import nnx
from models import MLP
from options import Parser, above, whole
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from telemetry import Telemetry

import stablegrad as sg

NORMS = ("max norm", "median", "last", "> 10 x")
COLUMNS = ("schedule", *NORMS, "loss", "accuracy", "last rate")
CHUNK = 50  # Steps between two reads of the device, for the progress bar.
MOMENTUM = 0.9


class Run(NamedTuple):
    """One schedule: its kind, its rate while nothing explodes, and the optimizer."""

    name: str
    kind: str
    rate: optax.Schedule
    tx: optax.GradientTransformation
    look: bool = False  # Whether it gets `value_fn=`.


def stairs(rate: float, steps: int, factors) -> optax.Schedule:
    """The rate, times a factor from each share of the steps on; the first from 0."""
    bounds = jnp.array([round(share * steps) for share in factors])
    values = rate * jnp.array(list(factors.values()))
    return lambda step: values[jnp.searchsorted(bounds, step, side="right") - 1]


def runs(rate: float, steps: int) -> list[Run]:
    """All nine; every one of them has the same highest rate."""
    sgd = lambda rate: optax.sgd(rate, momentum=MOMENTUM)
    share = lambda x: max(1, round(x * steps))
    static = optax.constant_schedule(rate)
    wsd = optax.join_schedules(
        [
            optax.linear_schedule(0.0, rate, share(0.1)),
            static,
            optax.linear_schedule(rate, 0.0, share(0.2)),
        ],
        [share(0.1), share(0.8)],
    )
    rising = stairs(rate, steps, {0: 1 / 8, 0.1: 1 / 4, 0.2: 1 / 2, 0.3: 1})
    falling = stairs(rate, steps, {k / 5: 0.5**k for k in range(5)})
    plain = {
        "static": ("static", static),
        "cosine": ("dynamic", optax.cosine_decay_schedule(rate, steps)),
        "exponential": ("dynamic", optax.exponential_decay(rate, steps, 0.01)),
        "WSD": ("dynamic", wsd),
        "rising stairs": ("stepwise", rising),
        "falling stairs": ("stepwise", falling),
    }
    aware = sg.scale_by_explosion_aware_schedule(
        rising, sg.zscore(3.0), hold_steps=100, limit=sg.zscore(2.0)
    )
    guarded = sg.stabilize(sgd(static))
    return [
        *(Run(name, kind, fn, sgd(fn)) for name, (kind, fn) in plain.items()),
        # Before the momentum: what it clips never enters the running mean.
        Run("explosion-aware", "guarded", rising, optax.chain(aware, sgd(1.0))),
        Run("stabilize", "guarded", static, guarded),
        Run("stabilize, looking", "guarded", static, guarded, look=True),
    ]


class Outcome(NamedTuple):
    """What a run measured: arrays over its steps, then on the test digits."""

    rates: np.ndarray
    norms: np.ndarray  # inf where they are not finite.
    losses: np.ndarray
    test_loss: float
    accuracy: float  # In [0, 1].
    did: str  # What was done about explosions.


def train(run: Run, options, log: Telemetry, advance: Callable) -> Outcome:
    """One run, from the shared weights; `advance` hears how many steps are done."""
    widths = (options.train.images.shape[1], *[options.width] * options.depth, 10)
    graphdef, trained = start(MLP(widths, rngs=nnx.Rngs(options.seed)), run.tx)
    step = make_step(graphdef, run.tx, look=run.look)
    rates = np.asarray(
        jax.vmap(lambda i: jnp.asarray(run.rate(i)))(jnp.arange(options.steps))
    )
    order = np.random.default_rng(options.seed)
    epochs = (
        epoch(options.train, options.batch_size, order) for _ in itertools.count()
    )
    batches = itertools.islice(itertools.chain.from_iterable(epochs), options.steps)
    history, waiting = [], []
    for images, labels in batches:
        trained, seen = step(trained, images, labels)
        waiting.append(seen)
        done = len(history) + len(waiting)
        if len(waiting) == CHUNK or done == options.steps:
            for row in jax.device_get(waiting):
                rate = rates[len(history)] * row.get("lr_scale", 1)
                row = {"run": run.name, "rate": row.get("schedule_rate", rate), **row}
                history.append(log.write(len(history) + 1, row))
            waiting = []
            advance(done)
    log.flush()
    loss, accuracy = make_evaluate(graphdef)(trained, options.test)
    of = lambda name: np.array([row[name] for row in history], np.float64)
    finite = lambda x: np.where(np.isfinite(x), x, np.inf)
    return Outcome(
        rates=of("rate"),
        norms=finite(of("grad_norm")),
        losses=finite(of("loss")),
        test_loss=loss,
        accuracy=accuracy,
        did=told(history[-1]),
    )


def told(row: dict) -> str:
    """What was done about explosions, in words, from the last step's numbers."""
    if "schedule_cuts" in row:
        return f"{row['schedule_cuts']} cuts, {row['schedule_dropped_steps']} dropped"
    if "skipped_steps" in row:
        return (
            f"{row['clipped_steps']} clipped, {row['skipped_steps']} skipped, "
            f"{row['backed_off_steps']} backed off, {row['shortened_steps']} shortened"
        )
    return ""


def row_of(name: str, out: Outcome) -> list[str]:
    """One row of the table."""
    norms = (out.norms.max(), np.median(out.norms), out.norms[-1])
    return [
        name,
        *(f"{norm:.3g}" for norm in norms),
        str(explosions(out.norms)),
        f"{out.test_loss:.4g}",
        f"{100 * out.accuracy:.2f} %",
        f"{out.rates[-1]:.3g}",
    ]


def explosions(norms: np.ndarray) -> int:
    """Steps whose gradient is above ten times the median, or not finite."""
    return int(np.sum(~np.isfinite(norms) | (norms > 10 * np.median(norms))))


def parse_args(argv) -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=whole(10), default=1000, help="steps a run")
    parser.add_argument("--batch-size", type=whole(1), default=64, help="images a step")
    parser.add_argument("--depth", type=whole(1), default=6, help="hidden layers")
    parser.add_argument("--width", type=whole(1), default=64, help="their units")
    parser.add_argument(
        "--learning-rate", type=above(0), default=0.2, help="the highest, of all runs"
    )
    return digits.parse_args(parser, argv, "schedules")


def report(console, options, outcomes: dict[str, Outcome], seconds: float) -> None:
    """The table, what was done, and where the rest is."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0))
    for column in COLUMNS:
        left = column == "schedule"
        table.add_column(column, justify="left" if left else "right", no_wrap=True)
    for name, out in outcomes.items():
        table.add_row(*row_of(name, out))
    console.print(table)
    for name, out in outcomes.items():
        if out.did:
            console.print(f"{name}: {out.did}", highlight=False)
    console.print(
        f"{options.steps} steps a run on {jax.default_backend()}, {seconds:.0f} s in "
        f"all; loss and accuracy on {len(options.test.labels)} test digits; > 10 x: "
        "steps above ten times the median norm.\n"
        f"figure and telemetry in {options.out}",
        highlight=False,
        soft_wrap=True,
    )


def main(argv=None) -> int:
    """Runs all, then prints the table and writes the figure."""
    options = parse_args(argv)
    console, started, status = Console(), time.perf_counter(), 0
    outcomes, chosen = {}, runs(options.learning_rate, options.steps)
    telling = Console(stderr=True)  # What is written is not mixed with it.
    with Telemetry(options.out) as log, Progress(console=telling) as progress:
        try:
            for run in chosen:
                bar = progress.add_task(run.name, total=options.steps)
                advance = lambda done, bar=bar: progress.update(bar, completed=done)
                outcomes[run.name] = train(run, options, log, advance)
        except KeyboardInterrupt:
            status = 130
    if status:
        console.print(f"interrupted after {len(outcomes)} of {len(chosen)} runs")
    if outcomes:
        kinds = {run.name: run.kind for run in chosen}
        draw_schedules(outcomes, kinds, options.out / "schedules.png")
        report(console, options, outcomes, time.perf_counter() - started)
    return status


if __name__ == "__main__":
    sys.exit(main())
