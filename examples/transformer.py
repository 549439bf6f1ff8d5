"""A small character transformer, trained under `sg.stabilize`.

    command:   pip install -e ".[examples]" && python examples/transformer.py
               with --data-dir FOLDER it learns the *.txt files of a folder
    hardware:  two CPU cores; the same script runs unchanged on a GPU or TPU
    time:      three minutes, compilation included
    expected:  a held-out loss of 1.28 nats (1.85 bits) a character on the default text,
               the manual that Python ships, where the shares of the characters alone
               give 3.24; on Shakespeare's plays (1.1 MB) 1.76 nats (2.54 bits) against
               3.35 (two-core CPU, 2026-11-21, jax 0.10.2)

Two layers of width 64 read 64 characters and predict the next, after each of them.
AdamW's rate warms up and falls as a cosine. The guard gets the loss, and with --look a
function that repeats it, so that it looks along every fourth step before it is taken.
Every number of every step is in telemetry.jsonl, and in TensorBoard if tensorboardX or
PyTorch is installed. Ctrl-C draws and reports what was measured up to then.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import style
import text
from classifiers import Trained, make_evaluate, make_step, start
from flax import nnx
from models import Transformer
from options import Parser, above, whole
from rich.console import Console
from rich.progress import Progress
from telemetry import Telemetry

import stablegrad as sg

CHUNK = 25  # Steps between two reads of the device, for the progress bar.
HELD_OUT = 500  # Windows of held-out text, at most.


def make_sample(graphdef, length: int, temperature: float) -> Callable:
    """`sample(trained, window, key)`: what follows a window, shape (length,), int32."""

    def sample(trained: Trained, window, key):
        model = nnx.merge(graphdef, trained.params, trained.rest)

        def write(window, key):
            logits = model(window[None])[0, -1]
            character = jax.random.categorical(key, logits / temperature)
            character = character.astype(window.dtype)
            return jnp.append(window[1:], character), character

        return jax.lax.scan(write, window, jax.random.split(key, length))[1]

    return jax.jit(sample)


def schedule(options) -> optax.Schedule:
    """Up to the learning rate in a tenth of the steps, then down to a hundredth."""
    return optax.warmup_cosine_decay_schedule(
        0.0,
        options.learning_rate,
        max(1, options.steps // 10),
        max(2, options.steps),
        options.learning_rate / 100,
    )


class Run:
    """A transformer in training: what it knows, and what was measured so far."""

    def __init__(self, options, log: Telemetry):
        """The weights and the batches come from the seed."""
        model = Transformer(
            len(options.text.alphabet),
            layers=options.layers,
            width=options.width,
            heads=options.heads,
            context=options.context,
            rngs=nnx.Rngs(options.seed),
        )
        tx = sg.stabilize(optax.adamw(schedule(options), b2=0.95))
        self.graphdef, self.trained = start(model, tx)
        self.options, self.log = options, log
        self.history, self.held_out = [], []  # Rows; (step, nats a character).
        self._step = make_step(self.graphdef, tx, look=options.look)
        self._evaluate = make_evaluate(self.graphdef)
        self._windows = text.spread(options.text.held_out, HELD_OUT, options.context)

    def train(self, progress: Progress) -> None:
        """All steps, with a look at the held-out text now and then."""
        options, waiting = self.options, []
        order = np.random.default_rng(options.seed)
        bar = progress.add_task("training", total=options.steps)
        self.evaluate()
        for step in range(1, options.steps + 1):
            batch = text.batch(
                options.text.train, options.batch_size, options.context, order
            )
            self.trained, seen = self._step(self.trained, *batch)
            waiting.append(seen)
            last = step == options.steps
            if last or step % options.every == 0 or len(waiting) == CHUNK:
                for row in jax.device_get(waiting):
                    row = self.log.write(len(self.history) + 1, row)
                    self.history.append(row)
                waiting = []
                progress.update(bar, completed=step)
            if last or step % options.every == 0:
                self.evaluate()
                said = f"training, held out {self.held_out[-1][1]:.3f}"
                progress.update(bar, description=said)
                sg.raise_if_halted(self.trained.opt_state)

    def evaluate(self) -> None:
        """Notes the loss on the held-out text, in nats a character."""
        loss = self._evaluate(self.trained, self._windows)[0] / self.options.context
        self.held_out.append((len(self.history), loss))
        bits = loss / math.log(2)
        self.log.write(
            len(self.history), {"held_out_loss": loss, "held_out_bits": bits}
        )
        self.log.flush()

    def sample(self) -> str:
        """A text that starts where the held-out one does, and what it started from."""
        options = self.options
        sample = make_sample(self.graphdef, options.sample, options.temperature)
        window = options.text.held_out[: options.context]
        written = sample(
            self.trained, jnp.asarray(window), jax.random.key(options.seed)
        )
        return options.text.decode(np.asarray(written))


def draw(run: Run, trivial: float, path: Path) -> None:
    """Loss, gradient norm and learning-rate scale over the steps."""
    title = "A language model under `stabilize`"
    figure, axes = style.new_figure(
        9, 8, 3, title=title, sharex=True, height_ratios=(3, 2, 2)
    )
    axes = axes[:, 0]
    steps = np.arange(1, len(run.history) + 1)
    of = lambda name: np.array([row[name] for row in run.history], np.float64)
    axes[0].plot(steps, of("loss"), color="0.7", linewidth=0.8, label="batch")
    axes[0].plot(
        *zip(*run.held_out, strict=True), ".-", color=style.BLUE, label="held out"
    )
    axes[0].axhline(trivial, color=style.RED, linestyle=":", label="unigram")
    axes[0].legend(loc="upper right")
    axes[1].plot(steps, of("grad_norm"), color=style.BLUE, linewidth=0.8)
    axes[1].set_yscale("log")
    axes[2].plot(steps, of("lr_scale"), color=style.BLUE, linewidth=0.8)
    skipped = steps[of("skipped") > 0]
    axes[2].plot(skipped, np.full(len(skipped), 1.05), "|", color=style.RED)
    axes[2].set_ylim(0, 1.1)
    labels = ("loss, nats a character", "gradient norm", "lr_scale, skips |")
    for axis, label in zip(axes, labels, strict=True):
        axis.set_ylabel(label)
    axes[2].set_xlabel("step")
    figure.savefig(path, dpi=110)


def parse_args(argv) -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__.splitlines()[0])
    numbers = {
        "--steps": (1, 1500, "training steps"),
        "--batch-size": (1, 32, "texts a step"),
        "--context": (1, 64, "characters a text"),
        "--layers": (1, 2, "layers"),
        "--width": (1, 64, "features a character"),
        "--heads": (1, 4, "attention heads; must divide the width"),
        "--every": (1, 250, "steps between two looks at the held-out text"),
        "--sample": (1, 300, "characters to write at the end"),
        "--seed": (0, 0, "of the weights, the batches and the sample"),
    }
    for name, (least, default, said) in numbers.items():
        parser.add_argument(name, type=whole(least), default=default, help=said)
    parser.add_argument(
        "--learning-rate", type=above(0), default=5e-3, help="AdamW's, at its highest"
    )
    parser.add_argument(
        "--temperature", type=above(0), default=0.8, help="of the sample"
    )
    parser.add_argument(
        "--look", action="store_true", help="look along every fourth step first"
    )
    parser.add_argument(
        "--data-dir", help="folder of *.txt files, UTF-8; pydoc's topics without it"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/transformer"),
        help="folder for transformer.png, telemetry.jsonl and TensorBoard's files",
    )
    options = parser.parse_args(argv)
    if options.width % options.heads:
        parser.error(
            f"--heads must divide --width, got {options.heads} and {options.width}"
        )
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        options.text = text.load(options.data_dir, options.context)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return options


def report(say: Callable, run: Run, seconds: float) -> None:
    """What was learnt, what the guard did, and where the rest is."""
    trivial = run.options.text.trivial_loss()
    for name, loss in (("held out", run.held_out[-1][1]), ("unigram", trivial)):
        say(f"{name:9} {loss:.3f} nats, {loss / math.log(2):.3f} bits a character")
    now = run.history[-1]
    counts = [
        f"{now[f'{what}_steps']} {what.replace('_', ' ')}"
        for what in ("clipped", "skipped", "backed_off", "shortened")
    ]
    say(f"guard     {', '.join(counts)}, lr_scale {now['lr_scale']:.3g}")
    say(f"{len(run.history)} steps on {jax.default_backend()}, {seconds:.0f} s")
    say(
        f"TensorBoard: tensorboard --logdir {run.options.out}"
        if run.log.tensorboard
        else "TensorBoard: no files, as neither tensorboardX nor torch has a writer"
    )
    draw(run, trivial, run.options.out / "transformer.png")
    say(f"figure and telemetry in {run.options.out}")


def main(argv=None) -> int:
    """Trains, writes a text, reports and draws."""
    options = parse_args(argv)
    console, started, status = Console(), time.perf_counter(), 0
    say = lambda line: console.print(
        line, highlight=False, soft_wrap=True, markup=False
    )
    with Telemetry(options.out, tensorboard=True) as log:
        run = None
        try:
            run = Run(options, log)
            with Progress(console=Console(stderr=True)) as progress:
                run.train(progress)
            say(f"a text of its own:\n{run.sample()}\n")
        except KeyboardInterrupt:
            say("interrupted")
            status = 130
        except sg.TrainingHalted as error:
            say(f"halted: {error}")
            status = 1
        if run and run.history:
            report(say, run, time.perf_counter() - started)
    return status


if __name__ == "__main__":
    sys.exit(main())
