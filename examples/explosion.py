"""A run that explodes, and its flight recorder: which layer, when, what was done.

    command:   pip install -e ".[examples]" && python examples/explosion.py
    hardware:  two CPU cores; the same script runs unchanged on a GPU or TPU
    time:      ten seconds, compilation included
    expected:  a figure and the events, of which the first skip is the batch of nan
               pixels, the ids of the batches to leave out, and the account of the halt

A deep ReLU network (64 or 784 inputs, six layers of 64, 10 outputs) learns handwritten
digits by SGD with momentum, whose rate grows by a factor of 1.5 every 25 steps until
training explodes. One batch holds nan pixels. `stabilize` guards the run, remembers the
norms of all layers, and is told the id of each batch.
"""

import argparse

import digits
import jax
import numpy as np
import optax
from flax import nnx
from models import MLP
from options import Parser, above, finish, whole

import stablegrad as sg

GROWTH, EVERY = 1.5, 25  # The rate grows by this factor every so many steps.


def parse_args(argv) -> argparse.Namespace:
    """The command line."""
    parser = Parser(
        description="Trains a deep network until it explodes, and shows where."
    )
    parser.add_argument("--steps", type=whole(40), default=400, help="of training")
    parser.add_argument("--batch-size", type=whole(1), default=64, help="images a step")
    parser.add_argument(
        "--learning-rate", type=above(0), default=2e-3, help="at the first step"
    )
    return digits.parse_args(parser, argv, "explosion", "events")


def train(options):
    """Trains the network; returns the guard's state."""
    rate = optax.exponential_decay(options.learning_rate, EVERY, GROWTH, staircase=True)
    tx = sg.stabilize(optax.sgd(rate, momentum=0.9), record_norms=options.steps)
    widths = (options.train.images.shape[1], *[64] * 6, 10)
    graphdef, params = nnx.split(MLP(widths, rngs=nnx.Rngs(options.seed)))
    opt_state = tx.init(params)

    def loss_fn(params, images, labels):
        logits = nnx.merge(graphdef, params)(images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def step(params, opt_state, images, labels, batch_id):
        loss, grads = jax.value_and_grad(loss_fn)(params, images, labels)
        return sg.apply(tx, grads, opt_state, params, value=loss, batch_id=batch_id)

    order = np.random.default_rng(options.seed)
    for batch_id in range(options.steps):
        rows = order.integers(0, len(options.train.labels), options.batch_size)
        images = options.train.images[rows]
        if batch_id == options.steps // 8:
            images = np.full_like(images, np.nan)
        labels = options.train.labels[rows]
        params, opt_state = step(params, opt_state, images, labels, batch_id)
    return opt_state


def main(argv=None) -> int:
    """Trains, then writes the figure and the events, and prints these."""
    options = parse_args(argv)
    state = train(options)
    figure, lines = options.out / "explosion.png", options.out / "events.jsonl"
    sg.history(state).figure().savefig(figure, dpi=120)
    lines.unlink(missing_ok=True)
    sg.save_events(state, lines)
    print(sg.events(state))
    ids = sg.batches_to_leave_out(sg.load_events(lines))
    print(f"{len(ids)} batches to leave out, from {ids[:5]} on")
    print(f"figure in {figure}, events in {lines}")
    try:
        sg.raise_if_halted(state)
    except sg.TrainingHalted as halted:
        print(halted)
    return 0


if __name__ == "__main__":
    finish(main)
