"""What a guard costs: one optimizer step, as a ratio to bare AdamW in the same run.

    command:   pip install -e ".[examples]" && python benchmarks/cost.py
    hardware:  any; the ratios differ between machines, so compare within one table
    time:      about one minute on two CPU cores

Every row takes one step on the same gradients with donated parameters and state, in
turn with all others, and is compared with the bare step of the same round. Peers are
optax's own functions: `clip_by_global_norm(1.0)` and `apply_if_finite(..., 5)`.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

import stablegrad as sg

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from options import Parser, whole


class Row(NamedTuple):
    """A name, an optimizer, and how it steps."""

    name: str
    tx: optax.GradientTransformation
    step: Callable


def by_update(tx):
    """The step as optax users write it."""
    extended = optax.with_extra_args_support(tx)

    def step(params, state, grads):
        updates, state = extended.update(grads, state, params, value=1.0)
        return optax.apply_updates(params, updates), state

    return step


def by_apply(tx):
    """The step through `stablegrad.apply`."""
    return lambda params, state, grads: sg.apply(tx, grads, state, params, value=1.0)


def rows() -> list[Row]:
    """Bare AdamW first, then optax's pieces, then ours."""
    bare = optax.adamw(1e-3)
    clipped = optax.chain(optax.clip_by_global_norm(1.0), bare)
    through_update = {
        "adamw": bare,
        "clip_by_global_norm": clipped,
        "apply_if_finite": optax.apply_if_finite(bare, 5),
        "both of these": optax.apply_if_finite(clipped, 5),
        "guard(), update": sg.guard(bare),
        "stabilize, update": sg.stabilize(bare),
    }
    through_apply = {
        "guard(), apply": sg.guard(bare),
        "stabilize, apply": sg.stabilize(bare),
    }
    return [
        *(Row(name, tx, by_update(tx)) for name, tx in through_update.items()),
        *(Row(name, tx, by_apply(tx)) for name, tx in through_apply.items()),
    ]


def measure(size: int, leaves: int, rounds: int) -> list[tuple[str, float, float, int]]:
    """Name, median ratio, seconds to compile and temporary bytes of every row."""
    keys = jax.random.split(jax.random.key(0), leaves)
    params = {
        f"w{i}": jax.random.normal(k, (size // leaves,)) for i, k in enumerate(keys)
    }
    grads = jax.tree.map(lambda x: 0.01 * x, params)
    programs = {}
    for row in rows():
        state, started = row.tx.init(params), time.perf_counter()
        lowered = jax.jit(row.step, donate_argnums=(0, 1)).lower(params, state, grads)
        program = lowered.compile()
        seconds = time.perf_counter() - started
        memory = program.memory_analysis().temp_size_in_bytes
        carry = (jax.tree.map(jnp.copy, params), state)
        programs[row.name] = [program, carry, seconds, memory, []]
    for _ in track(range(rounds + 2), description="rounds", transient=True):
        for entry in programs.values():
            started = time.perf_counter()
            entry[1] = jax.block_until_ready(entry[0](*entry[1], grads))
            entry[4].append(time.perf_counter() - started)
    base = next(iter(programs.values()))[4]
    table = []
    for name, (_, _, seconds, memory, times) in programs.items():
        ratios = [mine / bare for mine, bare in zip(times[2:], base[2:], strict=True)]
        table.append((name, statistics.median(ratios), seconds, memory))
    return table


def main(argv=None) -> int:
    """Prints the table."""
    parser = Parser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--size", type=whole(64), default=20_000_000, help="parameters")
    parser.add_argument("--leaves", type=whole(1), default=8, help="arrays they are in")
    parser.add_argument("--rounds", type=whole(1), default=9, help="counted rounds")
    options = parser.parse_args(argv)
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("step", "time / adamw", "compile (s)", "temporary (MB)"):
        table.add_column(column, justify="left" if column == "step" else "right")
    for name, ratio, seconds, memory in measure(
        options.size, options.leaves, options.rounds
    ):
        table.add_row(name, f"{ratio:.2f}", f"{seconds:.2f}", f"{memory / 1e6:.0f}")
    console = Console()
    console.print(table)
    console.print(
        f"{options.size} parameters in {options.leaves} arrays, median of "
        f"{options.rounds} rounds on {jax.default_backend()}, jax {jax.__version__}",
        highlight=False,
        soft_wrap=True,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
