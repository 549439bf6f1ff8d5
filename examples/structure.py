"""What a network's structure does about gradients that vanish or explode with depth.

    command:   pip install -e ".[examples]" && python examples/structure.py
               with --data-dir FOLDER --epochs 1 on MNIST
    hardware:  two CPU cores; the same script runs unchanged on a GPU or TPU
    time:      278 s on two cores, --quick --epochs 2 about a minute
    expected:  accuracy on scikit-learn's digits at depth 50 (two-core CPU, 2026-11-27,
               jax 0.10.2), vanishing and exploding: none 9 and 15 %, all of it 95 and
               95, residual with layer norm 85 and 93, residual 68 and 92, batch norm
               9 and 77, layer norm 9 and 23; the others near chance, NAG, Adam, clip
               and initialisation alone among them

Two networks of 4 and of 50 hidden layers of width 64 learn handwritten digits with
plain SGD. In the first, of sigmoids, gradients vanish; in the second, of tanh with
kernels three times too large, they explode. Each is then given one remedy at a time,
and a combination, on the same batches:

    ReLU, leaky ReLU       another activation
    batch norm, layer norm normalisation before every activation
    dropout 0.2            that share of the units is left out of every step
    initialisation         orthogonal kernels with the gain of the activation
    residual               every layer adds to what it got, with a factor that starts
                           at 0 (SkipInit)
    residual, layer norm   every layer adds to what it got, behind a norm (pre-norm)
    NAG, Adam              another optimizer
    gradient clip          norms above 1 are shrunk to 1, as `clip_by_norm` does
    all of it              ReLU, initialisation, residual with layer norm, Adam

The theory, printed first, needs no data: `chi` is the factor on squared gradients from
one layer to the layer before. The profile shows the gradient norm of the hidden layers
from first to last, before training and after it. At the largest depth, `sg.diagnose`
reads each network before and after training, and a second table has the first cause
that it names. Ctrl-C reports what is finished.
"""

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import digits
import jax
import jax.numpy as jnp
import numpy as np
import optax
from classifiers import cross_entropy, epoch, make_evaluate, make_step, start
from figures import draw_layers
from flax import nnx
from options import Parser, whole
from remedies import PATIENTS, QUICK, REMEDIES, Deep
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from telemetry import Telemetry

import stablegrad as sg
from stablegrad.structure import activation_init, fixed_point, gain

COLUMNS = (
    "remedy",
    "accuracy",
    "loss",
    "before: first",
    "last layer",
    "profile",
    "after: first",
    "last layer",
    "profile",
    "time",
)


class Outcome(NamedTuple):
    """What a network came to, and what it took."""

    accuracy: float  # On the test digits, in [0, 1], as the loss.
    loss: float
    at_start: np.ndarray  # What `examine` found at the first step.
    at_end: np.ndarray  # The same at the last step.
    seconds: float
    causes: tuple[str, str] | None  # What `diagnosis` said before and after training.


def remember_layers() -> optax.GradientTransformation:
    """Changes nothing; its state is the gradient norm of each hidden layer's kernel."""

    def norms(tree):
        (kernels,) = [
            leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree["hidden"])
            if "kernel" in jax.tree_util.keystr(path)
        ]
        return jnp.linalg.norm(kernels, axis=(1, 2))

    return optax.GradientTransformation(
        norms, lambda updates, state, params=None: (updates, norms(updates))
    )


def examine(trained) -> np.ndarray:
    """The gradient norm of every hidden layer in the last step: the diagnosis.

    A report with more in it fits here; `bars` and the table show what it returns.
    """
    return np.array(trained.opt_state[0])


def make_diagnosis(graphdef, rest) -> Callable:
    """`diagnosis(params, batch)`: the first cause that `diagnose` names, and where."""
    rest = jax.tree.map(jnp.copy, rest)  # The step donates its own.

    def loss_fn(params, batch):
        model = nnx.merge(graphdef, params, rest, copy=True)
        model.train()
        images, labels = batch
        return cross_entropy(model(images), labels)

    def diagnosis(params, batch) -> str:
        causes = sg.diagnose(loss_fn, params, batch).causes
        if not causes:
            return "within usual limits"
        first = causes[0]
        alike = sum(cause.rule == first.rule for cause in causes)
        where = f" at {first.layer}" if first.layer else ""
        more = f" and {alike - 1} more" if alike > 1 else ""
        return f"{first.severity}: {first.rule}{where}{more}"

    return diagnosis


def bars(norms: np.ndarray, layers: int = 8) -> str:
    """A profile from the first hidden layer to the last: two decades a level."""
    rows = np.linspace(0, len(norms) - 1, min(layers, len(norms))).round().astype(int)
    shades = "▁▂▃▄▅▆▇█"
    drawn = ""
    for norm in norms[rows]:
        if not np.isfinite(norm):
            drawn += "!"
        elif norm < 1e-12:
            drawn += "."
        else:
            level = (np.log10(norm) + 10) / 2  # 1e-10 is the lowest, 1e4 the highest.
            drawn += shades[int(np.clip(level, 0, len(shades) - 1))]
    return drawn


def train(
    patient: str, remedy: str, depth: int, options, log: Telemetry, advance: Callable
) -> Outcome:
    """One network, from the seed's weights; `advance` is called after each epoch."""
    began = time.perf_counter()
    recipe: Any = REMEDIES[remedy]
    activation, kernel_init, _ = PATIENTS[patient]
    recipe = recipe._replace(activation=recipe.activation or activation)
    if recipe.initialised:
        kernel_init = activation_init(recipe.activation, distribution="orthogonal")
    sizes = (options.train.images.shape[1], options.width, depth, 10)
    model = Deep(sizes, recipe, kernel_init, rngs=nnx.Rngs(options.seed))
    tx = optax.chain(remember_layers(), recipe.optimizer(recipe.rate))
    graphdef, trained = start(model, tx)
    batch = options.train.images[:256], options.train.labels[:256]
    diagnosis = make_diagnosis(graphdef, trained.rest)
    deepest = depth == max(options.depths)
    said = [diagnosis(trained.params, batch)] if deepest else []
    step, evaluate = make_step(graphdef, tx), make_evaluate(graphdef)
    order, steps = np.random.default_rng(options.seed), 0
    for number in range(1, options.epochs + 1):
        losses = []
        for images, labels in epoch(options.train, options.batch_size, order):
            trained, seen = step(trained, images, labels)
            losses.append(seen["loss"])
            if steps == 0:
                at_start = examine(trained)
            steps += 1
        row = {"patient": patient, "remedy": remedy, "depth": depth, "epoch": number}
        log.write(steps, row | {"train_loss": np.mean(jax.device_get(losses))})
        advance()
    loss, accuracy = evaluate(trained, options.test)
    at_end = examine(trained)
    log.write(steps, row | {"loss": loss, "accuracy": accuracy})
    if said:
        said.append(diagnosis(trained.params, batch))
        log.write(steps, row | {"cause_at_start": said[0], "cause_at_end": said[1]})
    for layer, (first, last) in enumerate(zip(at_start, at_end, strict=True)):
        row = {"patient": patient, "remedy": remedy, "depth": depth, "layer": layer}
        log.write(steps, row | {"norm_at_start": first, "norm_at_end": last})
    log.flush()
    seconds = time.perf_counter() - began
    causes = (said[0], said[1]) if said else None
    return Outcome(accuracy, loss, at_start, at_end, seconds, causes)


def theory() -> Table:
    """What mean-field theory says of the patients, and of the remedies' gains."""
    table = Table(title="in theory", box=box.SIMPLE_HEAD, title_justify="left")
    for column in ("network", "chi", "gradient over 50 layers", "gain for its scale"):
        table.add_column(column, justify="left" if column == "network" else "right")
    for name, (activation, _, variance) in PATIENTS.items():
        point = fixed_point(activation, variance)
        table.add_row(
            name,
            f"{point.chi:.3f}",
            f"x {point.chi**25:.1e}",
            f"{gain(activation):.3f}",
        )
    return table


def table_of(title: str, outcomes: dict[str, Outcome]) -> Table:
    """The remedies of one patient at one depth: first without, then by accuracy."""
    table = Table(
        title=title, box=box.SIMPLE_HEAD, padding=(0, 0), title_justify="left"
    )
    for column in COLUMNS:
        left = column in ("remedy", "profile")
        table.add_column(column, justify="left" if left else "right", no_wrap=True)
    ranked = sorted(
        outcomes.items(), key=lambda item: (item[0] != "none", -item[1].accuracy)
    )
    for name, out in ranked:
        profiles = []
        for norms in (out.at_start, out.at_end):
            profiles += [f"{norms[0]:.1e}", f"{norms[-1]:.1e}", bars(norms)]
        table.add_row(
            name,
            f"{100 * out.accuracy:.1f} %",
            f"{out.loss:.3f}",
            *profiles,
            f"{out.seconds:.1f} s",
        )
    return table


def table_of_causes(title: str, outcomes: dict[str, Outcome]) -> Table:
    """What `diagnose` said of each network, before training and after it."""
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for column in ("remedy", "diagnosis before training", "diagnosis after it"):
        table.add_column(column)
    for name, out in outcomes.items():
        if out.causes:
            table.add_row(name, *out.causes)
    return table


def parse_args(argv) -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--depths", type=whole(2), nargs="+", default=[4, 50], help="hidden layers"
    )
    parser.add_argument("--width", type=whole(1), default=64, help="their units")
    parser.add_argument("--epochs", type=whole(1), default=20, help="rounds, each all")
    parser.add_argument("--batch-size", type=whole(1), default=64, help="images a step")
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}")
    return digits.parse_args(parser, argv, "structure")


def main(argv=None) -> int:
    """Trains all, prints a table for each patient and depth, and draws."""
    options = parse_args(argv)
    console, started, status = Console(width=130), time.perf_counter(), 0
    remedies = [name for name in REMEDIES if name in QUICK or not options.quick]
    wanted = [
        (f"{patient}, {depth} hidden layers", patient, remedy, depth)
        for patient in PATIENTS
        for depth in dict.fromkeys(options.depths)
        for remedy in remedies
    ]
    outcomes: dict[str, dict[str, Outcome]] = {}
    console.print(theory())
    telling = Console(stderr=True)  # What is written is not mixed with it.
    with Telemetry(options.out) as log, Progress(console=telling) as progress:
        bar = progress.add_task("networks", total=len(wanted) * options.epochs)
        try:
            for title, *which in wanted:
                progress.update(bar, description=f"{title}, {which[1]}")
                out = train(*which, options, log, lambda: progress.advance(bar))
                outcomes.setdefault(title, {})[which[1]] = out
        except KeyboardInterrupt:
            status = 130
    say = lambda line: console.print(line, highlight=False, soft_wrap=True)
    if status:
        done = sum(map(len, outcomes.values()))
        say(f"interrupted after {done} of {len(wanted)} networks")
    for title, networks in outcomes.items():
        console.print(table_of(title, networks))
        if any(out.causes for out in networks.values()):
            console.print(table_of_causes(title, networks))
    if outcomes:
        draw_layers(outcomes, options.out / "structure.png")
        say(
            f"{options.epochs} epochs on {jax.default_backend()}, "
            f"{time.perf_counter() - started:.0f} s in all; accuracy and loss on "
            f"{len(options.test.labels)} test digits; first, last: gradient norm of "
            "that hidden layer at the first step and at the last; profile: from the "
            "first layer to the last, ▁ 1e-10, █ 1e4, ! not finite.\n"
            f"figure and telemetry in {options.out}"
        )
    return status


if __name__ == "__main__":
    sys.exit(main())
