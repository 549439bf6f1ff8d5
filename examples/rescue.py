"""Five runs, one set of faults: what guards a training run, and what does not.

    command:   pip install -e ".[examples]" && python examples/rescue.py
    hardware:  two CPU cores; the same script runs unchanged on a GPU or TPU
    time:      about one minute, compilation included
    expected:  the plain run ends at chance (about 10 % accuracy), the guarded run
               within one percentage point of the reference, which saw no fault

A ReLU network (784 or 64 inputs - 128 - 64 - 10) learns handwritten digits five times,
from the same weights and the same batches:

    plain      optax.adamw
    usual      clip_by_global_norm(1.0) and adamw under apply_if_finite
    unprobed   optax.adamw under stablegrad.stabilize, which is given `value=`
    guarded    the same, with `value_fn=` as well: too long steps are shortened
    reference  optax.adamw, without any of the faults

The faults, in order: a batch whose inputs are 1e20 too large (finite gradients whose
squares overflow float32); a batch of nan pixels; a stretch of mislabelled batches;
three nan batches in a row; and a learning rate far above the stable one, until the end.
Between them lies calm, in which `lr_scale` comes back, so that no fault is survived by
what another one left behind.
"""

import argparse
import sys
import time
from typing import NamedTuple

import digits
import faults
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from models import MLP
from options import Parser, above, whole
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from telemetry import to_json

import stablegrad as sg

COLUMNS = ("run", "loss", "accuracy", "skipped", "clipped", "lr_scale", "bad leaf")
CHUNK = 50  # Steps between two reads of the device, for the progress bar.


class Run(NamedTuple):
    """One run's name and optimizer, and whether its data has the faults."""

    name: str
    tx: optax.GradientTransformation
    faulty: bool
    probes: bool = False  # Whether the guard is given `value_fn=`.


def runs(options, plan: faults.Plan) -> list[Run]:
    """The five runs. The rate is the same for all; the reference has no jump in it."""
    jump = optax.piecewise_constant_schedule(
        options.learning_rate, {plan.high_rate: options.jump}
    )
    usual = optax.apply_if_finite(
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(jump)), 5
    )
    return [
        Run("plain", optax.adamw(jump), faulty=True),
        Run("usual", usual, faulty=True),
        Run("unprobed", sg.stabilize(optax.adamw(jump)), faulty=True),
        Run("guarded", sg.stabilize(optax.adamw(jump)), faulty=True, probes=True),
        Run("reference", optax.adamw(options.learning_rate), faulty=False),
    ]


def make_step(graphdef, tx, probes: bool):
    """One training step, compiled once: gradient, guarded update, telemetry."""

    def loss_fn(params, images, labels):
        logits = nnx.merge(graphdef, params)(images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def step(params, opt_state, images, labels):
        loss, grads = jax.value_and_grad(loss_fn)(params, images, labels)
        extra = {"value": loss}
        if probes:
            extra["value_fn"] = lambda params: loss_fn(params, images, labels)
        params, opt_state = sg.apply(tx, grads, opt_state, params, **extra)
        if isinstance(opt_state, optax.ApplyIfFiniteState):
            seen = {"skipped": ~opt_state.last_finite}
        elif isinstance(tx, sg.GuardedTransformation):
            seen = sg.metrics(opt_state)
        else:
            seen = {}
        # A guard reports its own norm, which does not overflow.
        seen = {"loss": loss, "grad_norm": optax.tree.norm(grads), **seen}
        return params, opt_state, seen

    return jax.jit(step, donate_argnums=(0, 1))


def train_one(run: Run, train, options, plan, progress, log):
    """Trains from the shared weights; returns the model, state and telemetry."""
    widths = (train.images.shape[1], 128, 64, 10)
    model = MLP(widths, rngs=nnx.Rngs(options.seed))
    graphdef, params = nnx.split(model)
    opt_state = run.tx.init(params)
    step = make_step(graphdef, run.tx, run.probes)
    bar = progress.add_task(run.name, total=options.steps)
    history, waiting = [], []
    feed = faults.batches(
        train,
        options.steps,
        options.batch_size,
        options.seed,
        plan if run.faulty else None,
    )
    for images, labels in feed:
        params, opt_state, seen = step(params, opt_state, images, labels)
        waiting.append(seen)
        if len(waiting) == CHUNK or len(history) + len(waiting) == options.steps:
            for row in jax.device_get(waiting):
                row = {name: np.asarray(number).item() for name, number in row.items()}
                log.write(to_json({"run": run.name, "step": len(history), **row}))
                history.append(row)
            progress.update(bar, completed=len(history))
            waiting = []
    return nnx.merge(graphdef, params), opt_state, history


def evaluate(model, test: digits.Split) -> tuple[float, float]:
    """Loss and accuracy on the test digits."""
    logits = model(jnp.asarray(test.images))
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, test.labels).mean()
    return loss.item(), jnp.mean(jnp.argmax(logits, -1) == test.labels).item()


def row_of(run: Run, model, opt_state, history, test) -> list[str]:
    """One row of the table: what came out, and what was done about it."""
    loss, accuracy = evaluate(model, test)
    row = [run.name, f"{loss:.4f}", f"{100 * accuracy:.2f} %"]
    skipped = sum(seen.get("skipped", False) for seen in history)
    if not isinstance(run.tx, sg.GuardedTransformation):
        usual = isinstance(opt_state, optax.ApplyIfFiniteState)
        return [*row, str(skipped) if usual else "-", "-", "-", "-"]
    now = sg.metrics(opt_state)
    bad = [event for event in sg.events(opt_state) if "nonfinite" in event.reason]
    return [
        *row,
        str(skipped),
        str(now["clipped_steps"].item()),
        f"{now['lr_scale'].item():.3f}",
        bad[0].leaf if bad else "-",
    ]


def parse_args(argv) -> argparse.Namespace:
    """The command line."""
    parser = Parser(
        description="Trains a small network five times under the same faults."
    )
    parser.add_argument("--steps", type=whole(40), default=1200, help="steps a run")
    parser.add_argument("--batch-size", type=whole(1), default=64, help="images a step")
    parser.add_argument(
        "--learning-rate", type=above(0), default=2e-3, help="AdamW's, in all runs"
    )
    parser.add_argument(
        "--jump",
        type=above(0),
        default=30.0,
        help="factor on the learning rate in the last third, not in the reference",
    )
    return digits.parse_args(parser, argv, "rescue")


def report(console, options, rows, events, seconds: float) -> None:
    """The table, what the guard did, and where the rest is."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0))
    for column in COLUMNS:
        left = column in ("run", "bad leaf")
        table.add_column(column, justify="left" if left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print("what the guard did, apart from clipping:")
    for event in events:
        console.print(f"  {event}", highlight=False, soft_wrap=True)
    console.print(
        f"{options.steps} steps a run on {jax.default_backend()}, {seconds:.0f} s in "
        f"all; loss and accuracy on {len(options.test.labels)} test digits.\n"
        f"figure and telemetry in {options.out}",
        highlight=False,
        soft_wrap=True,
    )


def main(argv=None) -> int:
    """Runs all five, then prints the table and writes the figure."""
    options = parse_args(argv)
    plan = faults.Plan.over(options.steps)
    console, started = Console(), time.perf_counter()
    histories, rows, events = {}, [], []
    telemetry = options.out / "telemetry.jsonl"
    telling = Console(stderr=True)  # What is written is not mixed with it.
    try:
        with telemetry.open("w") as log, Progress(console=telling) as progress:
            for run in runs(options, plan):
                model, opt_state, history = train_one(
                    run, options.train, options, plan, progress, log
                )
                histories[run.name] = history
                rows.append(row_of(run, model, opt_state, history, options.test))
                if run.name == "guarded":
                    events = sg.events(opt_state)
    except KeyboardInterrupt:
        console.print(f"interrupted; what was measured so far is in {telemetry}")
        return 130
    scores = {row[0]: row[2] for row in rows}
    faults.draw(histories, scores, plan, options.out / "rescue.png")
    report(console, options, rows, events, time.perf_counter() - started)
    return 0


if __name__ == "__main__":
    sys.exit(main())
