"""Four runs, one set of faults: what guards a training run, and what does not.

    command:   pip install -e ".[examples]" && python examples/rescue.py
    hardware:  two CPU cores; the same script runs unchanged on a GPU or TPU
    time:      under one minute, compilation included
    expected:  the plain run ends at chance (about 10 % accuracy), the guarded run within
               one percentage point of the reference, which saw no fault

A ReLU network (784 or 64 inputs - 128 - 64 - 10) learns handwritten digits four times,
from the same weights and the same batches:

    plain      optax.adamw
    usual      clip_by_global_norm(1.0) and adamw under apply_if_finite, the usual remedy
    guarded    optax.adamw under stablegrad.stabilize
    reference  optax.adamw, without any of the faults

The faults, in order: a batch whose inputs are 1e20 too large (finite gradients whose
squares overflow float32); a batch of nan pixels; a stretch of mislabelled batches; three
nan batches in a row; and a learning rate far above the stable one, until the end.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import NamedTuple

import digits
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import stablegrad as sg

CHUNK = 50  # Steps between two reads of the device, for the progress bar.


class Classifier(nnx.Module):
    """Inputs - 128 - 64 - 10, ReLU."""

    def __init__(self, inputs: int, rngs: nnx.Rngs):
        he = nnx.initializers.he_normal()
        self.layers = nnx.List(
            [
                nnx.Linear(n_in, n_out, kernel_init=he, rngs=rngs)
                for n_in, n_out in ((inputs, 128), (128, 64), (64, 10))
            ]
        )

    def __call__(self, x):
        for layer in self.layers[:-1]:
            x = nnx.relu(layer(x))
        return self.layers[-1](x)


class Plan(NamedTuple):
    """Which step sees which fault; all in steps, counted from 0."""

    huge_batch: int
    nan_batch: int
    wrong_labels: range
    nan_burst: range
    high_rate: int

    @classmethod
    def over(cls, steps: int) -> "Plan":
        """Spreads the faults over a run of `steps` steps."""
        at = lambda share: int(share * steps)
        return cls(
            huge_batch=at(0.05),
            nan_batch=at(0.2),
            wrong_labels=range(at(0.35), at(0.35) + max(1, min(15, steps // 40))),
            nan_burst=range(at(0.5), at(0.5) + 3),
            high_rate=at(0.65),
        )


class Run(NamedTuple):
    """One run's name, optimizer, and whether its data has the faults."""

    name: str
    tx: optax.GradientTransformation
    faulty: bool


def runs(options, plan: Plan) -> list[Run]:
    """The four runs. The rate is the same for all; the reference has no jump in it."""
    jump = optax.piecewise_constant_schedule(
        options.learning_rate, {plan.high_rate: options.jump}
    )
    usual = optax.apply_if_finite(
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(jump)), 5
    )
    return [
        Run("plain", optax.adamw(jump), faulty=True),
        Run("usual", usual, faulty=True),
        Run("guarded", sg.stabilize(optax.adamw(jump)), faulty=True),
        Run("reference", optax.adamw(options.learning_rate), faulty=False),
    ]


def batches(train: digits.Split, options, plan: Plan | None):
    """The same batches for every run, with the plan's faults if there is one."""
    order = np.random.default_rng(options.seed)
    mistakes = np.random.default_rng(options.seed + 1)
    for step in range(options.steps):
        rows = order.integers(0, len(train.labels), options.batch_size)
        images, labels = train.images[rows], train.labels[rows]
        if plan is not None:
            if step == plan.nan_batch or step in plan.nan_burst:
                images = np.full_like(images, np.nan)
            if step == plan.huge_batch:
                images = images * np.float32(1e20)
            if step in plan.wrong_labels:
                labels = mistakes.integers(0, 10, labels.shape).astype(np.int32)
        yield images, labels


def make_step(graphdef, tx):
    """One training step, compiled once: gradient, guarded update, telemetry."""

    def loss_fn(params, images, labels):
        logits = nnx.merge(graphdef, params)(images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def step(params, opt_state, images, labels):
        loss, grads = jax.value_and_grad(loss_fn)(params, images, labels)
        params, opt_state = sg.apply(tx, grads, opt_state, params, value=loss)
        if isinstance(opt_state, optax.ApplyIfFiniteState):
            seen = {"skipped": ~opt_state.last_finite}
        elif isinstance(tx, sg.GuardedTransformation):
            seen = sg.metrics(opt_state)
        else:
            seen = {}
        # A guard reports its own norm, which does not overflow.
        seen = {"loss": loss, "grad_norm": optax.global_norm(grads), **seen}
        return params, opt_state, seen

    return jax.jit(step, donate_argnums=(0, 1))


def train_one(run: Run, train, options, plan, progress, log):
    """Trains from the shared initial weights; returns the model, state and telemetry."""
    model = Classifier(train.images.shape[1], nnx.Rngs(options.seed))
    graphdef, params = nnx.split(model)
    opt_state = run.tx.init(params)
    step = make_step(graphdef, run.tx)
    bar = progress.add_task(run.name, total=options.steps)
    history, waiting = [], []
    for images, labels in batches(train, options, plan if run.faulty else None):
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


def to_json(row: dict) -> str:
    """One JSON line; JSON has no nan or inf, so they become null."""
    finite = lambda x: None if isinstance(x, float) and not math.isfinite(x) else x
    return json.dumps({name: finite(x) for name, x in row.items()}) + "\n"


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


def draw(histories: dict[str, list[dict]], plan: Plan, path: Path) -> None:
    """Loss, gradient norm and learning-rate scale over the steps, skips marked."""
    figure = Figure(figsize=(10, 8), layout="constrained")
    axes = figure.subplots(3, 1, sharex=True, height_ratios=(3, 3, 2))
    colors = dict(zip(histories, ("C3", "C1", "C0", "0.6"), strict=True))
    for name, history in histories.items():
        style = {"color": colors[name], "label": name, "linewidth": 1}
        for axis, key in ((axes[0], "loss"), (axes[1], "grad_norm")):
            values = np.array([seen[key] for seen in history], np.float64)
            values = np.clip(np.where(np.isfinite(values), values, np.nan), 1e-4, 1e4)
            axis.plot(values, **style)
            dead = np.flatnonzero(np.isfinite(values))
            if len(dead) and dead[-1] + 1 < len(values):
                axis.plot(dead[-1], values[dead[-1]], "x", color=colors[name])
        scale = [seen.get("lr_scale", 1.0) for seen in history]
        axes[2].plot(scale, **style)
        skips = [step for step, seen in enumerate(history) if seen.get("skipped")]
        if skips and "lr_scale" in history[0]:
            axes[2].plot(skips, np.full(len(skips), 1.15), "|", color=colors[name])
    for axis, label in zip(
        axes, ("training loss", "gradient norm", "lr_scale, skips |"), strict=True
    ):
        axis.set_yscale("log")
        axis.set_ylabel(label)
        for start, width in faults(plan).values():
            axis.axvspan(start, start + max(width, 2), color="0.9", zorder=0)
    for name, (start, _) in faults(plan).items():
        axes[0].annotate(name, (start, 1.02), xycoords=("data", "axes fraction"))
    axes[1].legend(loc="upper left", ncols=4)
    axes[2].set_xlabel("step (values beyond 1e-4 to 1e4 are drawn at the edge)")
    figure.savefig(path, dpi=110)


def faults(plan: Plan) -> dict[str, tuple[int, int]]:
    """First step and length of each fault, by the name the figure shows."""
    return {
        "inputs x 1e20": (plan.huge_batch, 1),
        "nan": (plan.nan_batch, 1),
        "wrong labels": (plan.wrong_labels.start, len(plan.wrong_labels)),
        "3 nan": (plan.nan_burst.start, len(plan.nan_burst)),
        "high learning rate from here": (plan.high_rate, 0),
    }


class Parser(argparse.ArgumentParser):
    """Reports a bad option in one line."""

    def error(self, message):
        """Exits with status 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def number(kind, holds, expected: str):
    """An option's type: a number for which `holds`, or a message that says so."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not holds(value):
            raise argparse.ArgumentTypeError(f"must be {expected}, got {text!r}")
        return value

    return parse


def parse_args(argv) -> argparse.Namespace:
    """The command line."""
    parser = Parser(
        description="Trains a small network four times under the same faults.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    whole = lambda least: number(int, lambda x: x >= least, f"an integer >= {least}")
    above = lambda low: number(
        float, lambda x: low < x < math.inf, f"a finite number > {low}"
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
    parser.add_argument(
        "--seed", type=whole(0), default=0, help="of the weights and of the batches"
    )
    parser.add_argument(
        "--data-dir",
        help="folder with the four MNIST files (IDX, gzipped or not); "
        "scikit-learn's 8x8 digits without it",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/rescue"),
        help="folder for rescue.png and telemetry.jsonl (null stands for nan and inf)",
    )
    options = parser.parse_args(argv)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        options.train, options.test = digits.load(options.data_dir)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return options


def main(argv=None) -> int:
    """Runs all four, then prints the table and writes the figure."""
    options = parse_args(argv)
    plan = Plan.over(options.steps)
    console, started = Console(), time.perf_counter()
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    for column in (
        "run",
        "loss",
        "accuracy",
        "skipped",
        "clipped",
        "lr_scale",
        "first bad leaf",
    ):
        left = column == "run"
        table.add_column(column, justify="left" if left else "right", no_wrap=True)
    histories = {}
    telemetry = options.out / "telemetry.jsonl"
    try:
        with telemetry.open("w") as log, Progress(console=console) as progress:
            for run in runs(options, plan):
                model, opt_state, history = train_one(
                    run, options.train, options, plan, progress, log
                )
                histories[run.name] = history
                table.add_row(*row_of(run, model, opt_state, history, options.test))
                if isinstance(run.tx, sg.GuardedTransformation):
                    recent = sg.events(opt_state)
    except KeyboardInterrupt:
        console.print(f"interrupted; what was measured so far is in {telemetry}")
        return 130
    draw(histories, plan, options.out / "rescue.png")
    console.print(table)
    console.print("what the guard did, apart from clipping:")
    for event in recent:
        console.print(f"  {event}", highlight=False, soft_wrap=True)
    seconds = time.perf_counter() - started
    console.print(
        f"{options.steps} steps a run on {jax.default_backend()}, {seconds:.0f} s in all; "
        f"loss and accuracy on {len(options.test.labels)} test digits.\n"
        f"figure and telemetry in {options.out}",
        highlight=False,
        soft_wrap=True,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
