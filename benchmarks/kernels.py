"""How many kernels a step launches on an H100, counted on a machine without one.

    command:   python benchmarks/kernels.py, in an environment with XLA's compiler for
               NVIDIA: pip install "jax==0.10.2" optax, then pip install --no-deps
               jax-cuda13-plugin==0.10.2 jax-cuda13-pjrt==0.10.2 nvidia-cuda-nvcc
               nvidia-nvvm, and this package; 1.5 GB
    hardware:  any
    time:      five minutes on two CPU cores; --leaves 8 one minute
    expected:  `stabilize, apply` 41 kernels with 8 leaves and 319 with 100

A kernel of a few numbers takes 2 to 5 microseconds of an accelerator, whatever it
computes, so on a small model the number of kernels is what a guard costs. The step of
each row is compiled with donated parameters and state, for leaves of 1,581 x 1,581
float32, and the kernels are counted in the optimized HLO:

    kernels     launched by every step, copies included
    inside      held by conditions and loops
    conditions  for each, the host waits for the device
    temporary   memory beside parameters, state and gradients, MiB
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # The GPU is described, not present.

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from _cost.steps import Step, steps
from _kernels.count import Kernels, count
from markdown_table import table
from options import Parser, file, finish, whole

TARGET = Path(__file__).parent / "_kernels" / "h100.txtpb"
SIDE = 1581  # 8 such leaves are 20 million parameters.
ROWS = (
    "adamw",
    "optax.clip_by_global_norm",
    "optax, clip + apply_if_finite",
    "clip_by_norm",
    "clip_by_zscore",
    "guard, update",
    "guard, apply",
    "stabilize, update",
    "stabilize, apply",
    "stabilize per leaf, apply",
)


def h100():
    """The device to compile for; exits where XLA's compiler for it is missing."""
    try:
        described = topologies.get_topology_desc(
            platform="cuda", target_config=TARGET.read_text(), topology="1x1x1"
        )
    except Exception as error:  # Of JAX or of the plugin, by version.
        reason = str(error).splitlines()[0]
        sys.exit(f"XLA cannot compile for an H100 here: {reason}\n{needed()}")
    return described.devices[0]


def needed() -> str:
    """What the docstring says of the environment."""
    return __doc__[__doc__.index("    command:") : __doc__.index("    hardware:")]


def compiled(step: Step, leaves: int, device):
    """The program of one step for parameters of `leaves` arrays."""
    on_device = lambda x: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=SingleDeviceSharding(device)
    )
    shape = jax.ShapeDtypeStruct((SIDE, SIDE), jnp.float32)
    params = {f"w{i:03d}": shape for i in range(leaves)}
    state = jax.eval_shape(step.tx.init, params)

    def take(params, state, grads):
        value = jnp.ones(())
        return step.take(step.tx, grads, state, params, value=value)

    trees = [jax.tree.map(on_device, tree) for tree in (params, state, params)]
    return jax.jit(take, donate_argnums=(0, 1)).lower(*trees).compile()


def cells(name: str, leaves: int, found: Kernels, temporary: int) -> list[str]:
    """One line of the table."""
    counts = (leaves, *found, round(temporary / 2**20))
    return [name, *map(str, counts)]


def main(argv=None) -> int:
    """Prints the table, and writes it where asked."""
    known = {step.name: step for step in steps() if not step.looks}
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--leaves", type=whole(1), nargs="+", default=[8, 100])
    parser.add_argument("--only", nargs="+", choices=list(known), default=ROWS)
    parser.add_argument("--out", type=file, help="Markdown file to write")
    options = parser.parse_args(argv)
    device, rows = h100(), []
    for leaves in options.leaves:
        for name in options.only:
            print(f"{name}, {leaves} leaves", file=sys.stderr)
            program = compiled(known[name], leaves, device)
            temporary = program.memory_analysis().temp_size_in_bytes
            rows.append(cells(name, leaves, count(program.as_text()), temporary))
    head = ["step", "leaves", *Kernels._fields, "temporary, MiB"]
    head[2] = "kernels"
    text = f"{table(head, rows)}\n\nCompiled for an H100 by jax {jax.__version__}.\n"
    print(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    finish(main)
