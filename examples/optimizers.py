"""Which optimizer, rate, policy and clip: side by side on one image classifier.

    command:   pip install -e ".[examples]" && python examples/optimizers.py
    data:      scikit-learn's digits; MNIST or CIFAR-10 with --data-dir
    hardware:  two CPU cores; the same script runs unchanged on a GPU or TPU
    time:      seven minutes on the digits, more than half of it compilation; 23 on
               MNIST with --steps 1000 --seeds 1, on cores that others used as well
    expected:  accuracy on held-out digits at the best rate from 98.6 % (rmsprop) to
               96.7 %, most at rates of their own; on MNIST 97.3 % (schedule_free,
               best loss and least LR sensitivity) to 95.8 % (two-core CPU, 2026-11-21)

An MLP (inputs - 128 - 64 - 10) is trained by every candidate at every learning rate
from every seed, all on the same batches. A run ends early once the loss on held-out
images has not improved for --patience evaluations; its best evaluation counts. Three
comparisons follow each other: optimizers at a constant rate; policies for the rate of
one optimizer; clips and guards around one optimizer.
"""

import argparse
import sys
from pathlib import Path

import cifar
import digits
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from models import MLP
from options import Parser, finish, whole
from rich.console import Console

import stablegrad as sg

WIDTHS = (128, 64)
HELD_OUT = 0.1  # Of the training images: what ends a run, and ranks the candidates.
WORDS = sg.sweep.WORDS


def comparisons(optimizer: str) -> dict[str, list[str]]:
    """The three lists of candidates, by title."""
    clips = [f"{optimizer} + {clip}" for clip in WORDS["clip"]]
    guards = [f"{optimizer} + {guard}" for guard in WORDS["guard"]]
    return {
        "optimizers": list(WORDS["optimizer"]),
        "policies": [f"{optimizer} + {policy}" for policy in WORDS["policy"]],
        "guards": [optimizer, *clips, *guards],
    }


class Problem:
    """The classifier as functions of its parameters, for `compare`."""

    def __init__(self, inputs: int):
        """`inputs` is the number of values an image has."""
        self._widths = (inputs, *WIDTHS, 10)
        self._graphdef, _, self._rest = self._split(jax.random.key(0))

    def _split(self, key):
        model = MLP(self._widths, rngs=nnx.Rngs(key))
        return nnx.split(model, nnx.Param, ...)

    def _model(self, params) -> MLP:
        return nnx.merge(self._graphdef, params, self._rest, copy=True)

    def init(self, key):
        """The parameters of a seed."""
        return self._split(key)[1]

    def loss(self, params, batch):
        """Cross-entropy, in nats."""
        images, labels = batch
        logits = self._model(params)(images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def evaluate(self, params, batch):
        """Loss and accuracy."""
        logits = self._model(params)(batch[0])
        right = jnp.mean(jnp.argmax(logits, -1) == batch[1])
        return {"loss": self.loss(params, batch), "accuracy": right}

    def hidden(self, params, batch):
        """What the hidden units say, in which dead ones are counted."""
        return self._model(params).hidden(batch[0])


def load(data_dir: str | None) -> digits.Split:
    """The training images as rows: CIFAR-10 where its files are, else digits."""
    if data_dir is not None and any(Path(data_dir).glob("data_batch_*.bin")):
        train, _ = cifar.load(data_dir)
    else:
        train, _ = digits.load(data_dir)
    return digits.Split(train.images.reshape(len(train.labels), -1), train.labels)


def parse_args(argv) -> argparse.Namespace:
    """The command line."""
    parser = Parser(
        description="Optimizers, policies, clips and guards on one image classifier."
    )
    parser.add_argument("--steps", type=whole(1), default=1500, help="steps a run")
    parser.add_argument("--batch-size", type=whole(1), default=64, help="images a step")
    parser.add_argument("--seeds", type=whole(1), default=2, help="runs of each rate")
    parser.add_argument(
        "--patience", type=whole(1), default=6, help="of 30 evaluations, see above"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=("optimizers", "policies", "guards"),
        default=("optimizers", "policies", "guards"),
        help="comparisons",
    )
    parser.add_argument(
        "--optimizer",
        choices=WORDS["optimizer"],
        default="momentum",
        help="under the policies and guards",
    )
    parser.add_argument(
        "--candidates",
        nargs="+",
        help="these instead, such as 'adam + cosine + stabilize'",
    )
    parser.add_argument(
        "--data-dir",
        help="folder with the four MNIST files or CIFAR-10's binary batches; "
        "scikit-learn's 8x8 digits without it",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/optimizers"),
        help="folder for a table, a figure and all curves of each comparison",
    )
    options = parser.parse_args(argv)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        options.train = load(options.data_dir)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return options


def main(argv=None) -> int:
    """Runs the comparisons, and writes what came out of each."""
    options = parse_args(argv)
    console = Console(soft_wrap=True, highlight=False)
    order = np.random.default_rng(0).permutation(len(options.train.labels))
    cut = int(len(order) * HELD_OUT)
    held_out, train = (
        digits.Split(*(array[rows] for array in options.train))
        for rows in (order[:cut], order[cut:])
    )
    problem = Problem(train.images.shape[1])
    chosen = (
        {"candidates": options.candidates}
        if options.candidates
        else {name: comparisons(options.optimizer)[name] for name in options.only}
    )
    for name, candidates in chosen.items():
        try:
            result = sg.sweep.compare(
                problem.loss,
                problem.init,
                tuple(train),
                candidates,
                seeds=options.seeds,
                steps=options.steps,
                batch_size=options.batch_size,
                validation=tuple(held_out),
                evaluate=problem.evaluate,
                hidden=problem.hidden,
                trivial_loss=sg.sweep.label_entropy(held_out.labels),
                evaluations=30,
                patience=options.patience,
            )
        except (ValueError, TypeError) as error:
            print(f"optimizers.py: error: {error}", file=sys.stderr)
            return 2
        (options.out / f"{name}.txt").write_text(f"{result}\n")
        result.figure().savefig(options.out / f"{name}.png", dpi=150)
        result.save(options.out / f"{name}.json")
        console.print(f"{name}\n\n{result}\n", markup=False)
        if result.interrupted:
            console.print(f"interrupted; what was done so far is in {options.out}")
            return 130
    console.print(f"tables, figures and curves in {options.out}")
    return 0


if __name__ == "__main__":
    finish(main)
