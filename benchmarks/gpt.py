"""What a guard costs in a training step of GPT-2's smallest network.

    command:   pip install -e ".[examples]" && python benchmarks/gpt.py
    hardware:  an H100; on a CPU choose a smaller network by the options
    time:      73 s on an H100 with `--only stabilize --rounds 5`
    expected:  `stabilize` near 1.03

The network is Flax NNX's, in bfloat16 with float32 parameters, on random text. Its head
is not tied to the embedding: 163 million parameters, where tied ones would be 124. Each
step is `nnx.Optimizer.update`, compiled with what it replaces donated.
Rounds of steps are timed in turn with those of bare AdamW. Memory is that of the step's
arguments and temporary arrays, beyond bare AdamW's. `roll_back` takes a snapshot
on one step in a hundred, which few rounds have in them; a row has one in two.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from rich import box
from rich.console import Console
from rich.table import Table

import stablegrad as sg

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from _cost.measuring import in_turn, ratios
from _cost.report import machine
from models import Transformer
from options import Parser, command, file, finish, whole

BARE = "adamw"
LOOKS = "stabilize, trust region"


def optimizers() -> dict[str, optax.GradientTransformation]:
    """The rows: bare AdamW, Optax's pair, and ours."""
    bare = optax.adamw(3e-4)
    often = sg.roll_back(every=2, hold_steps=1)
    clipped = optax.chain(optax.clip_by_global_norm(1.0), bare)
    return {
        BARE: bare,
        "optax, clip + apply_if_finite": optax.apply_if_finite(clipped, 5),
        "clip_by_norm": optax.chain(sg.clip_by_norm(1.0), bare),
        "stabilize": sg.stabilize(bare),
        LOOKS: sg.stabilize(bare),
        "stabilize, roll_back": sg.stabilize(bare, sg.roll_back()),
        "the same, a snapshot every 2 steps": sg.stabilize(bare, often),
        "stabilize, record_norms": sg.stabilize(bare, record_norms=100),
    }


def loss_of(model: Transformer, text: jax.Array) -> jax.Array:
    """Mean cross-entropy of the next token, float32."""
    logits = model(text[:, :-1]).astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:])
    return losses.mean()


class Run:
    """A network in training: rounds of steps, each from what the last one gave."""

    def __init__(self, make: Callable[[], Transformer], tx, text, steps: int, looks):
        """Compile the step; `looks` says whether it is given `value_fn=`."""
        model = make()
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        graph, self._state = nnx.split((model, optimizer))
        self._text, self._steps = text, steps

        def step(state, text):
            model, optimizer = nnx.merge(graph, state)
            loss, grads = nnx.value_and_grad(loss_of)(model, text)
            extra = {}
            if isinstance(tx, optax.GradientTransformationExtraArgs):
                extra["value"] = loss
            if looks:
                definition, _, rest = nnx.split(model, nnx.Param, ...)
                extra["value_fn"] = lambda params: loss_of(
                    nnx.merge(definition, params, rest, copy=True), text
                )
            optimizer.update(model, grads, **extra)
            return nnx.state((model, optimizer))

        started = time.perf_counter()
        lowered = jax.jit(step, donate_argnums=0).lower(self._state, text)
        self._step = lowered.compile()
        self.compile_s = time.perf_counter() - started
        sizes = self._step.memory_analysis()
        held = sizes.argument_size_in_bytes + sizes.temp_size_in_bytes
        self.memory_mib = held / 2**20

    def __call__(self) -> None:
        """Take a round of steps."""
        for _ in range(self._steps):
            self._state = self._step(self._state, self._text)
        jax.block_until_ready(self._state)


def main(argv=None) -> int:
    """Prints the table, and writes it where asked."""
    parser = Parser(description=__doc__.splitlines()[0])
    sizes = {"layers": 12, "width": 768, "heads": 12, "context": 1024, "batch": 8}
    for name, default in (sizes | {"tokens": 50304}).items():
        parser.add_argument(f"--{name}", type=whole(1), default=default, help="network")
    parser.add_argument("--steps", type=whole(1), default=10, help="a round")
    parser.add_argument("--rounds", type=whole(1), default=9, help="counted rounds")
    names = [name for name in optimizers() if name != BARE]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="rows")
    parser.add_argument("--out", type=file, help="Markdown file to write")
    options = parser.parse_args(argv)
    if options.width % options.heads:
        parser.error("--width must be a multiple of --heads")
    shape = (options.batch, options.context + 1)
    text = jax.random.randint(jax.random.key(0), shape, 0, options.tokens, jnp.int32)

    def make() -> Transformer:
        return Transformer(
            options.tokens,
            layers=options.layers,
            width=options.width,
            heads=options.heads,
            context=options.context,
            dtype=jnp.bfloat16,
            rngs=nnx.Rngs(0),
        )

    count = sum(x.size for x in jax.tree.leaves(nnx.eval_shape(make)))
    title = f"Training step of a GPT with {count / 1e6:.0f} million parameters"
    columns = ("step", "time", "quartiles", "milliseconds", "compile", "memory (MiB)")
    rows = []
    # The first compilation also chooses algorithms, which later ones find.
    Run(make, optimizers()[BARE], text, 1, False)
    bare = Run(make, optimizers()[BARE], text, options.steps, False)
    for name in options.only:
        run = Run(make, optimizers()[name], text, options.steps, name == LOOKS)
        times = in_turn([bare, run], options.rounds, warm_up=2)
        middle, (low, high) = ratios(times)
        each = 1000 * statistics.median(times[1]) / options.steps
        compiled = run.compile_s / bare.compile_s
        spread = f"{low:.3f} to {high:.3f}"
        memory = f"{run.memory_mib - bare.memory_mib:+.1f}"
        figures = (f"{middle:.3f}", spread, f"{each:.1f}", f"{compiled:.2f}", memory)
        rows.append((name, *figures))
        print(*rows[-1], sep="  ", flush=True)
    table = Table(*columns, title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for row in rows:
        table.add_row(*row)
    Console().print(table, machine(), highlight=False)
    if options.out:
        told = command("benchmarks/gpt.py", argv)
        lines = [f"# {title}", "", f"`{told}`: {machine()}.", ""]
        lines += [f"| {' | '.join(columns)} |", "|---" + "|---:" * 5 + "|"]
        lines += [f"| {' | '.join(row)} |" for row in rows]
        options.out.write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    finish(main)
