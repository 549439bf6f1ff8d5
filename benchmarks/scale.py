"""What a guard sends between devices: counted on 1 to 8, worked out for 1,000 hosts.

    command:   pip install -e ".[examples]" && python benchmarks/scale.py
    hardware:  any; the devices are virtual, their programs' collectives are real
    time:      about a minute and a half on two CPU cores
    expected:  some bytes a leaf and step, whatever the number of devices

Parameters, gradients and moments are divided over all devices (FSDP). Each optimizer's
step alone is compiled for each number of devices. The collectives of a healthy step are
those that the profiler saw run, on average; those in the program include every branch
that a bad step may take. The gradient's own reduction is not part of the step: its
bytes are worked out beside it.
"""

import argparse
import contextlib
import math
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

import stablegrad as sg

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from _scale.collectives import collectives, executed, payload
from options import Parser, above, finish, whole

WARM_UP = 30  # Steps until every threshold judges.
# Compiles faster; the collectives are there before LLVM optimizes.
QUICK = {"xla_backend_optimization_level": 0}


class Counted(NamedTuple):
    """Collectives and bytes on each device: of a healthy step, and in the program."""

    step: str
    devices: int
    collectives: float
    payload: float
    all_collectives: int
    all_payload: int


def optimizers() -> dict[str, optax.GradientTransformation]:
    """Bare AdamW first, then Optax's clipping, then ours."""
    bare = optax.adamw(1e-3)
    return {
        "adamw": bare,
        "clip_by_global_norm": optax.chain(optax.clip_by_global_norm(1.0), bare),
        "guard()": sg.guard(bare),
        "stabilize": sg.stabilize(bare),
        "stabilize, per leaf": sg.stabilize(bare, per="leaf"),
    }


def count(name, tx, options, devices: int) -> Counted:
    """What one optimizer's step exchanges on that many devices."""
    mesh = Mesh(
        np.array(jax.devices()[:devices]), ("data",), axis_types=(AxisType.Auto,)
    )
    divided, everywhere = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    width = options.size // options.leaves // max(options.devices)
    one = np.ones((max(options.devices), width), np.float32)
    params = jax.device_put({f"w{i}": one for i in range(options.leaves)}, divided)
    # A state's leaf that is shaped as the parameters are is divided as they are.
    where = jax.tree.map(
        lambda leaf: divided if leaf.shape == one.shape else everywhere,
        jax.eval_shape(tx.init, params),
    )
    state = jax.jit(tx.init, out_shardings=where)(params)
    step = jax.jit(
        lambda params, state, grads, level: sg.apply(
            tx, jax.tree.map(lambda g: level * g, grads), state, params, value=level
        ),
        compiler_options=QUICK,
    )
    program = step.lower(params, state, params, jnp.float32(1)).compile()
    levels = np.random.default_rng(0).lognormal(0, 0.1, WARM_UP + options.steps)

    def run(carry, some):
        for level in some:
            carry = program(*carry, params, np.float32(level))
            jax.block_until_ready(carry)
        return carry

    carry = run((params, state), levels[:WARM_UP])
    ran = executed(program, lambda: run(carry, levels[WARM_UP:]), devices)
    found = collectives(program)
    steps = options.steps
    return Counted(
        name,
        devices,
        len(ran) / steps,
        payload(ran) / steps,
        len(found),
        payload(found),
    )


def table_of(counted: list[Counted]) -> Table:
    """One row for each optimizer and number of devices."""
    table = Table(box=box.SIMPLE_HEAD)
    for column in (
        "step",
        "devices",
        "collectives",
        "bytes",
        "in program",
        "bytes",
    ):
        table.add_column(
            column, justify="left" if column == "step" else "right", no_wrap=True
        )
    for row in counted:
        numbers = [f"{x:g}" for x in row[1:]]
        table.add_row(row.step, *numbers)
    return table


def extrapolate(counted: list[Counted], options) -> list[str]:
    """All-reduces of a guard's bytes and of the gradient on many hosts, worked out."""
    hosts, share = options.hosts, 2 * (options.hosts - 1) / options.hosts
    tree, ring = 2 * math.ceil(math.log2(hosts)), 2 * (hosts - 1)
    gradient = 4 * options.parameters
    sending = 1e-6 * share * gradient / options.bandwidth
    lines = [
        f"{hosts} hosts of {options.bandwidth:g} GB/s, {options.latency:g} us a hop, "
        f"{options.parameters:g} parameters with float32 gradients:",
        f"gradient: 2 * {hosts - 1} / {hosts} * {gradient:g} bytes = "
        f"{share * gradient:.4g} bytes from each host, {sending:.3g} ms",
    ]
    for name in dict.fromkeys(row.step for row in counted):
        rows = [row for row in counted if row.step == name and row.devices > 1]
        sizes = {row.payload for row in rows}
        if len(sizes) != 1:
            why = "bytes differ between devices" if rows else "one device sends nothing"
            lines.append(f"{name}: no extrapolation, {why}")
            continue
        size, times = sizes.pop(), max(row.collectives for row in rows)
        waiting = 1e-3 * options.latency * times
        lines.append(
            f"{name}: 2 * {hosts - 1} / {hosts} * {size:g} bytes = {share * size:.4g} "
            f"bytes from each host; {times:g} collectives * {tree} hops (a tree, up "
            f"and down) * {options.latency:g} us = {tree * waiting:.3g} ms, "
            f"{100 * tree * waiting / sending:.2g} % of the gradient's; a ring would "
            f"take {ring} hops, {ring * waiting:.3g} ms"
        )
    return lines


def parse_args(argv) -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--devices", type=whole(1), nargs="+", default=[1, 2, 4, 8], help="how many")
    add("--size", type=whole(64), default=2**20, help="parameters that are compiled")
    add("--leaves", type=whole(1), default=32, help="arrays they are in")
    add("--steps", type=whole(1), default=16, help="healthy steps that are counted")
    add("--hosts", type=whole(2), default=1000, help="to extrapolate to")
    add("--parameters", type=above(0), default=1e9, help="of the model there")
    add("--bandwidth", type=above(0), default=12.5, help="of a host there, GB/s")
    add("--latency", type=above(0), default=10.0, help="of a hop there, microseconds")
    options = parser.parse_args(argv)
    options.devices = sorted(set(options.devices))
    if any(max(options.devices) % n for n in options.devices):
        parser.error(f"--devices must divide the largest, got {options.devices}")
    if options.size < options.leaves * max(options.devices):
        parser.error("--size must hold a number for each leaf and device")
    with contextlib.suppress(RuntimeError):  # Where JAX has its devices already.
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", max(options.devices))
    if jax.device_count() < max(options.devices):
        parser.error(f"--devices must be at most {jax.device_count()} here")
    return options


def main(argv=None) -> int:
    """Counts, prints the table, extrapolates."""
    options = parse_args(argv)
    jobs = [(name, n) for name in optimizers() for n in options.devices]
    counted = [
        count(name, optimizers()[name], options, n)
        for name, n in track(jobs, description="compiling", transient=True)
    ]
    console = Console()
    console.print(table_of(counted))
    for line in extrapolate(counted, options):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(
        f"{options.size} parameters in {options.leaves} arrays, mean of "
        f"{options.steps} healthy steps, jax {jax.__version__}",
        highlight=False,
        soft_wrap=True,
    )
    return 0


if __name__ == "__main__":
    finish(main)
