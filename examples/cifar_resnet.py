"""A learning rate that finds itself, against three usual optimizers, on a ResNet.

    command:   pip install -e ".[examples]" && python examples/cifar_resnet.py
               python examples/cifar_resnet.py --data-dir <CIFAR-10> --epochs 12
    hardware:  two CPU cores; runs unchanged on any number of GPUs or TPUs
    time:      two minutes on the digits; 18 on 10,000 images of CIFAR-10 (2026-11-21,
               jax 0.10.2, on two cores that others used as well)
    expected:  digits, test accuracy: rmsprop 99.0 %, adam 98.6 %, adaptive 98.5 %,
               adagrad 97.8 %; the plateau halves the adaptive rate four times.
               CIFAR-10 (one training file): adam 57.1 %, adaptive 53.0 %, its rate
               halved once, rmsprop 49.6 %, adagrad 44.2 %; no step skipped

ResNet-8 (He et al., 2015) learns CIFAR-10, or scikit-learn's 8x8 digits, several times,
from the same weights and the same batches:

    adaptive  Adam under `stablegrad.stabilize`. Its rate comes from the parameters and
              the error of one batch, before training (`critical_learning_rate`), is
              halved where the validation loss no longer falls (`reduce_on_plateau`);
              what flows back from the Dense layers is limited example by example
              (`limit_gradient`)
    adagrad   `optax.adagrad(1e-2)`, the rate that PyTorch has as its default
    rmsprop   `optax.rmsprop(1e-3)`, Keras's default
    adam      `optax.adam(1e-3)`, the default of both

The adaptive run needs no rate from outside. It is not the best here: in four epochs of
CIFAR-10 the plateau has no time to act, and it is last by validation loss (1.72; Adam
1.62). A tenth of the training images is held out, ranks the runs and feeds the plateau.
Batches are divided among all devices, parameters are on each. After every epoch the
run is in a checkpoint, guard included, and `--resume` goes on from there.
"""

import argparse
from pathlib import Path

import cifar
import classifiers
import jax
import resnet_runs
from checkpoints import Checkpoints
from flax import nnx
from jax.sharding import AxisType
from options import Parser, above, finish, whole
from ranking import draw, ranked
from rich.console import Console
from rich.progress import Progress
from telemetry import Telemetry

HELD_OUT = 0.1  # Of the training images.


def parse_args(argv) -> argparse.Namespace:
    """The command line, with the data and the checkpoints."""
    parser = Parser(description=__doc__.splitlines()[0])
    names = (resnet_runs.ADAPTIVE, *resnet_runs.PLAIN)
    parser.add_argument(
        "--runs", nargs="+", choices=names, default=names, help="which, in this order"
    )
    parser.add_argument("--epochs", type=whole(1), default=20, help="passes a run")
    parser.add_argument("--batch-size", type=whole(1), default=64, help="images a step")
    parser.add_argument("--blocks", type=whole(1), default=1, help="1: ResNet-8")
    parser.add_argument("--width", type=whole(1), default=16, help="first channels")
    parser.add_argument(
        "--gradient-limit",
        type=above(0),
        default=1.0,
        help="on the norm of an example's gradient behind the convolutions",
    )
    parser.add_argument(
        "--probe",
        type=whole(0),
        default=0,
        help="steps that the search for the first rate tries; 10 is surer, and takes "
        "minutes on a CPU",
    )
    parser.add_argument("--devices", type=whole(1), help="how many; None: all")
    parser.add_argument(
        "--seed", type=whole(0), default=0, help="of weights, batches and validation"
    )
    parser.add_argument(
        "--data-dir",
        help="folder with data_batch_1.bin, ..., test_batch.bin; "
        "scikit-learn's 8x8 digits without it",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/cifar_resnet"),
        help="folder for cifar_resnet.png, telemetry.jsonl (null: nan or inf) and "
        "checkpoints, which a new start deletes",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the checkpoints in --out"
    )
    options = parser.parse_args(argv)
    options.devices = options.devices or jax.device_count()
    if options.devices > jax.device_count():
        parser.error(f"argument --devices: there are only {jax.device_count()}")
    if options.batch_size % options.devices:
        parser.error(
            f"argument --batch-size: must be a multiple of the {options.devices} "
            f"devices, got {options.batch_size}"
        )
    try:
        train, options.test = cifar.load(options.data_dir)
        options.train, options.validation = cifar.hold_out(
            train, HELD_OUT, options.seed
        )
        images = len(options.train.labels)
        if options.batch_size > images:
            raise ValueError(
                f"argument --batch-size: must be at most the {images} training images, "
                f"got {options.batch_size}"
            )
        options.out.mkdir(parents=True, exist_ok=True)
        options.checkpoints = Checkpoints(
            options.out / "checkpoints", settings(options), resume=options.resume
        )
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return options


def settings(options) -> dict:
    """What a resumed run must have in common with its beginning."""
    names = ("batch_size", "blocks", "width", "gradient_limit", "seed")
    shared = {f"--{name.replace('_', '-')}": vars(options)[name] for name in names}
    return {**shared, "training images": len(options.train.labels)}


def main(argv=None) -> int:
    """All runs, then the table and the figure."""
    options = parse_args(argv)
    console, results, interrupted = Console(), [], False
    mesh = jax.make_mesh(
        (options.devices,),
        ("data",),
        axis_types=(AxisType.Auto,),
        devices=jax.devices()[: options.devices],
    )
    # Without limits, which act on gradients alone, all runs are one network.
    evaluate = classifiers.make_evaluate(nnx.graphdef(resnet_runs.build(options)))
    with Telemetry(options.out, append=options.resume) as log:
        try:
            with Progress(console=console) as progress:
                setting = resnet_runs.Setting(
                    options, mesh, options.checkpoints, log, progress
                )
                for name in dict.fromkeys(options.runs):
                    resnet_runs.train_one(name, setting, evaluate, results)
        except KeyboardInterrupt:
            interrupted = True
    say = lambda text: console.print(text, highlight=False, soft_wrap=True)
    if begun := [result for result in results if result.epochs]:
        console.print(ranked(begun))
        draw(begun, options.out / "cifar_resnet.png")
    if interrupted:
        say(f"interrupted; --resume goes on from the last whole epoch in {options.out}")
        return 130
    say(
        f"{len(options.train.labels)} images to learn from, "
        f"{len(options.validation.labels)} to validate on, "
        f"{len(options.test.labels)} to test on\n"
        f"devices: {options.devices} ({jax.default_backend()})\n"
        f"figure, telemetry and checkpoints in {options.out}"
    )
    return 0


if __name__ == "__main__":
    finish(main)
