"""What a network's structure does about gradients that vanish or explode with depth.

    command:   pip install -e ".[examples]" && python examples/structure.py
               with --data-dir FOLDER --epochs 2 on MNIST
    hardware:  two CPU cores; the same script runs unchanged on a GPU or TPU
    time:      two and a half minutes, most of it compilation; seven on MNIST
    expected:  accuracy (two-core CPU, 2026-11-21, jax 0.10.2), digits and MNIST
               depth 4    96 to 99 %, dropout 0.5 89 and 92 %
               depth 20   residual with layer norm 98 and 97, He init 95 and 95, plain
                          93 and 94, dropout 0.2 28 and 28 %, dropout 0.5 chance
               depth 50   residual with layer norm 97 and 96, He init 88 and 84,
                          residual 18 and 18 %, the others near chance: plain starts
                          at gradients of 1e-8, residual at 1e8

Networks of 4, 20 and 50 hidden layers of width 64 learn handwritten digits with Adam,
on the same batches, without a guard: `plain` (ReLU, LeCun's initialisation, which is
Flax's default) and eight others, of which seven differ from it in one thing:

    batch norm, layer norm    normalisation before every ReLU
    dropout 0.2, 0.5          that share of the units is left out of every step
    leaky ReLU                0.1 x instead of 0 where x is negative
    residual                  every layer adds to what it got
    residual, layer norm      both of them
    He init                   kernels sqrt(2) larger, as ReLU halves the variance

The figure shows the norm of the gradient of every layer's kernel, at the start and
after training. Ctrl-C reports and draws what is finished.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import digits
import jax
import jax.numpy as jnp
import numpy as np
import optax
from classifiers import epoch, make_evaluate, make_step, start
from figures import draw_layers
from flax import nnx
from models import MLP, he_normal
from options import Parser, above, whole
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from telemetry import Telemetry

STRUCTURES = {
    "plain": {},
    "batch norm": {"norm": "batch"},
    "layer norm": {"norm": "layer"},
    "dropout 0.2": {"dropout": 0.2},
    "dropout 0.5": {"dropout": 0.5},
    "leaky ReLU": {"activation": partial(nnx.leaky_relu, negative_slope=0.1)},
    "residual": {"residual": True},
    "residual, layer norm": {"residual": True, "norm": "layer"},
    "He init": {"kernel_init": he_normal},
}
PLAIN = {"kernel_init": nnx.initializers.lecun_normal()}
COLUMNS = (
    "structure",
    "accuracy",
    "loss",
    "first",
    "last",
    "to 90 %",
    "compile",
    "train",
    "test",
)


class Outcome(NamedTuple):
    """What a network came to, and what it took."""

    accuracy: float  # On the test digits, in [0, 1], as the loss.
    loss: float
    at_start: np.ndarray  # Gradient norm of each layer's kernel at the first step.
    at_end: np.ndarray  # The mean of the same over the last epoch.
    epochs: int | None  # Until the test accuracy was 90 %; None: never.
    compiling: float  # Seconds, of the first step and of the first test.
    training: float  # Seconds, of all other steps.
    testing: float  # Seconds, of one look at all test digits.


def remember_layers(layers: int) -> optax.GradientTransformation:
    """Changes nothing; its state is the gradient norm of each layer's kernel."""

    def update(updates, state, params=None):
        kernels = [updates["layers"][i]["kernel"] for i in range(layers)]
        return updates, jnp.stack([optax.tree.norm(kernel) for kernel in kernels])

    return optax.GradientTransformation(lambda params: jnp.zeros(layers), update)


def train(name: str, depth: int, options, log: Telemetry, advance: Callable) -> Outcome:
    """One network, from the seed's weights; `advance` is called after each epoch."""
    widths = (options.train.images.shape[1], *[options.width] * depth, 10)
    model = MLP(widths, **(PLAIN | STRUCTURES[name]), rngs=nnx.Rngs(options.seed))
    tx = optax.chain(remember_layers(depth + 1), optax.adam(options.learning_rate))
    graphdef, trained = start(model, tx)
    step, evaluate = make_step(graphdef, tx), make_evaluate(graphdef)
    order = np.random.default_rng(options.seed)
    reached, clock, steps = None, Clock(), 0
    evaluate(trained, options.test)
    for number in range(1, options.epochs + 1):
        losses, norms = [], []
        for images, labels in epoch(options.train, options.batch_size, order):
            trained, seen = step(trained, images, labels)
            losses.append(seen["loss"])
            # Copies: the next step reuses the state's memory.
            if number == options.epochs:
                norms.append(np.array(trained.opt_state[0]))
            if steps == 0:
                at_start = np.array(trained.opt_state[0])
                clock.lap("compiling")
            steps += 1
        losses = np.array(jax.device_get(losses))
        clock.lap("training")
        loss, accuracy = evaluate(trained, options.test)
        clock.lap("testing")
        if accuracy >= 0.9 and reached is None:
            reached = number
        row = {"structure": name, "depth": depth, "epoch": number}
        row |= {"train_loss": losses.mean(), "loss": loss, "accuracy": accuracy}
        log.write(steps, row)
        advance()
    at_end = np.mean(norms, axis=0)
    for layer, (first, last) in enumerate(zip(at_start, at_end, strict=True)):
        row = {"structure": name, "depth": depth, "layer": layer}
        log.write(steps, row | {"norm_at_start": first, "norm_at_end": last})
    log.flush()
    seconds = {**clock.seconds, "testing": clock.seconds["testing"] / options.epochs}
    return Outcome(accuracy, loss, at_start, at_end, reached, **seconds)


class Clock:
    """Seconds by what they were spent on."""

    def __init__(self):
        """Starts now."""
        self.seconds, self._last = {}, time.perf_counter()

    def lap(self, what: str) -> None:
        """The time since the last call went into `what`."""
        now = time.perf_counter()
        self.seconds[what] = self.seconds.get(what, 0.0) + now - self._last
        self._last = now


def table_of(depth: int, outcomes: dict[str, Outcome]) -> Table:
    """The networks of one depth, the most accurate first."""
    title = f"{depth} hidden layers"
    table = Table(
        title=title, box=box.SIMPLE_HEAD, padding=(0, 0), title_justify="left"
    )
    for column in COLUMNS:
        left = column == "structure"
        table.add_column(column, justify="left" if left else "right", no_wrap=True)
    ranked = sorted(outcomes.items(), key=lambda item: -item[1].accuracy)
    for name, out in ranked:
        table.add_row(
            name,
            f"{100 * out.accuracy:.2f} %",
            f"{out.loss:.4f}",
            f"{out.at_start[0]:.2g}",
            f"{out.at_start[-1]:.2g}",
            "never" if out.epochs is None else str(out.epochs),
            f"{out.compiling:.1f} s",
            f"{out.training:.1f} s",
            f"{1000 * out.testing:.0f} ms",
        )
    return table


def parse_args(argv) -> argparse.Namespace:
    """The command line."""
    parser = Parser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--depths", type=whole(1), nargs="+", default=[4, 20, 50], help="hidden layers"
    )
    parser.add_argument("--width", type=whole(1), default=64, help="their units")
    parser.add_argument("--epochs", type=whole(1), default=30, help="rounds, each all")
    parser.add_argument("--batch-size", type=whole(1), default=64, help="images a step")
    parser.add_argument(
        "--learning-rate", type=above(0), default=1e-3, help="Adam's, for all"
    )
    return digits.parse_args(parser, argv, "structure")


def main(argv=None) -> int:
    """Trains all, prints a table for each depth, and draws."""
    options = parse_args(argv)
    console, started, status = Console(), time.perf_counter(), 0
    depths = list(dict.fromkeys(options.depths))
    outcomes: dict[int, dict[str, Outcome]] = {}
    with Telemetry(options.out) as log, Progress(console=console) as progress:
        total = len(depths) * len(STRUCTURES) * options.epochs
        bar = progress.add_task("networks", total=total)
        try:
            for depth in depths:
                for name in STRUCTURES:
                    progress.update(bar, description=f"{depth} layers, {name}")
                    out = train(
                        name, depth, options, log, lambda: progress.advance(bar)
                    )
                    outcomes.setdefault(depth, {})[name] = out
        except KeyboardInterrupt:
            status = 130
    say = lambda line: console.print(line, highlight=False, soft_wrap=True)
    if status:
        done = sum(map(len, outcomes.values()))
        say(f"interrupted after {done} of {len(depths) * len(STRUCTURES)} networks")
    for depth, networks in outcomes.items():
        console.print(table_of(depth, networks))
    if outcomes:
        draw_layers(outcomes, options.out / "structure.png")
        say(
            f"{options.epochs} epochs on {jax.default_backend()}, "
            f"{time.perf_counter() - started:.0f} s in all; accuracy and loss on "
            f"{len(options.test.labels)} test digits; first, last: gradient norm of "
            "that layer at the first step; to 90 %: epochs until that accuracy.\n"
            f"figure and telemetry in {options.out}"
        )
    return status


if __name__ == "__main__":
    sys.exit(main())
