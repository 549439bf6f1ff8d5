r"""Data-parallel training over every device there is, with a nan on one of them.

    one machine:   pip install -e ".[examples]" && python examples/data_parallel.py
    virtual CPUs:  python examples/data_parallel.py --cpu-devices 4
    by hand, once for each process, with --process 0, 1, ...:
                   python examples/data_parallel.py --coordinator 127.0.0.1:1234 \
                       --processes 2 --process 0 --cpu-devices 2
    SLURM:         srun --ntasks 16 python examples/data_parallel.py
    GKE:           the same command in every pod of a TPU slice or of an indexed Job
    hardware:      any; made for two CPU cores
    time:          a quarter of a minute, compilation included
    expected:      one step skipped, by all processes alike; 98 % accuracy

Every process runs this one script. Between tasks of a SLURM step, workers of a TPU
slice and pods of an indexed Kubernetes Job (with `pip install "jax[k8s]"`) it connects
through `jax.distributed.initialize()`, which reads their variables; `--cluster` asks
for that anywhere else.

A ReLU network (64 - 128 - 10) learns scikit-learn's digits. Parameters are on every
device, each batch is divided among them. At one step the share of the last device is
nan: the gradients, averaged over all devices by then, are nan on each of them, and so
every device rejects the same step. The guard needs no setting for any of this.
"""

import argparse
import itertools
import os
import time

import digits
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from options import Parser, above, finish, whole

import stablegrad as sg

SIZES = (64, 128, 10)


def parse_args(argv) -> tuple[Parser, argparse.Namespace]:
    """The command line, and whom to tell of errors."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=whole(1), default=400, help="training steps")
    parser.add_argument(
        "--batch-size", type=whole(1), default=64, help="digits a step, on all devices"
    )
    parser.add_argument("--learning-rate", type=above(0), default=3e-3, help="AdamW's")
    parser.add_argument(
        "--nan-step",
        type=whole(0),
        default=100,
        help="when one share is nan; never, if beyond the last",
    )
    parser.add_argument("--seed", type=whole(0), default=0, help="weights and batches")
    parser.add_argument(
        "--coordinator", metavar="HOST:PORT", help="where process 0 listens"
    )
    parser.add_argument("--processes", type=whole(1), help="how many there are")
    parser.add_argument("--process", type=whole(0), help="which this is, from 0")
    parser.add_argument(
        "--cluster", action="store_true", help="ask the cluster for all three"
    )
    parser.add_argument(
        "--cpu-devices", type=whole(1), help="virtual CPU devices of this process"
    )
    options = parser.parse_args(argv)
    by_hand = (options.coordinator, options.processes, options.process)
    if any(x is not None for x in by_hand) and any(x is None for x in by_hand):
        parser.error("--coordinator, --processes and --process go together")
    if options.coordinator is not None:
        if options.cluster:
            parser.error("--cluster finds the coordinator itself")
        if not options.coordinator.rpartition(":")[2].isdigit():
            parser.error(
                f"--coordinator must be HOST:PORT, got {options.coordinator!r}"
            )
        if options.process >= options.processes:
            parser.error(
                f"--process must be below --processes {options.processes}, got "
                f"{options.process}"
            )
    return parser, options


def in_cluster() -> bool:
    """Whether the environment is that of one process among several."""
    has = os.environ.get
    slurm = has("SLURM_STEP_NODELIST") and int(has("SLURM_NTASKS", "1")) > 1
    slice_of_tpus = "," in has("TPU_PROCESS_ADDRESSES", has("TPU_WORKER_HOSTNAMES", ""))
    indexed_job = has("KUBERNETES_SERVICE_HOST") and has("JOB_COMPLETION_INDEX")
    return bool(slurm or slice_of_tpus or indexed_job)


def connect(parser: Parser, options) -> None:
    """Joins the other processes, if there are any; before JAX looks for devices."""
    try:
        if options.cpu_devices is not None:
            jax.config.update("jax_platforms", "cpu")
            jax.config.update("jax_num_cpu_devices", options.cpu_devices)
        if options.coordinator is not None:
            jax.distributed.initialize(
                options.coordinator, options.processes, options.process
            )
        elif options.cluster or in_cluster():
            jax.distributed.initialize()
    except (RuntimeError, ValueError) as error:
        parser.error(f"cannot connect: {str(error).splitlines()[0]}")


def init_params(seed: int) -> list[dict[str, np.ndarray]]:
    """He initialisation; the same numbers in every process."""
    rng = np.random.default_rng(seed)
    return [
        {
            "kernel": rng.normal(0, (2 / n) ** 0.5, (n, m)).astype(np.float32),
            "bias": np.zeros(m, np.float32),
        }
        for n, m in itertools.pairwise(SIZES)
    ]


def predict(params, images):
    """Logits, shape (batch, 10)."""
    hidden, last = params
    images = jax.nn.relu(images @ hidden["kernel"] + hidden["bias"][None])
    return images @ last["kernel"] + last["bias"][None]


def loss_fn(params, images, labels):
    """The mean over the whole batch, wherever it lies."""
    logits = predict(params, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def make_step(tx):
    """A training step: nothing in it knows how many devices there are."""

    def step(params, state, images, labels):
        loss, grads = jax.value_and_grad(loss_fn)(params, images, labels)
        return sg.apply(tx, grads, state, params, value=loss)

    return jax.jit(step, donate_argnums=(0, 1))


def place(tree, sharding):
    """Arrays over the devices of all processes, each of which brings its own part."""
    return jax.tree.map(
        lambda leaf: jax.make_array_from_callback(
            np.shape(leaf), sharding, lambda index: np.asarray(leaf)[index]
        ),
        tree,
    )


def train(options, mesh, tx, digits_to_learn):
    """Parameters and optimizer state after all steps."""
    everywhere, divided = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    params = place(init_params(options.seed), everywhere)
    state = jax.jit(tx.init, out_shardings=everywhere)(params)
    step, rng = make_step(tx), np.random.default_rng(options.seed)
    for i in range(options.steps):
        chosen = rng.integers(len(digits_to_learn.labels), size=options.batch_size)
        images = digits_to_learn.images[chosen]
        if i == options.nan_step:
            images[-(options.batch_size // mesh.size) :] = np.nan  # The last share.
        batch = place((images, digits_to_learn.labels[chosen]), divided)
        params, state = step(params, state, *batch)
        if jax.default_backend() == "cpu":
            # Between processes, CPU collectives of two steps in flight may deadlock.
            jax.block_until_ready((params, state))
    return params, state


def main(argv=None) -> int:
    """Trains, then the first process reports."""
    parser, options = parse_args(argv)
    connect(parser, options)
    devices = jax.device_count()
    if options.batch_size % devices:
        parser.error(
            f"--batch-size must be a multiple of the {devices} devices, got "
            f"{options.batch_size}"
        )
    started = time.perf_counter()
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
    training, test = digits.load(None)
    tx = sg.stabilize(optax.adamw(options.learning_rate))
    params, state = train(options, mesh, tx, training)
    right = jnp.argmax(jax.jit(predict)(params, test.images), -1) == test.labels
    counted = np.asarray(sg.metrics(state)["skipped_steps"])
    skips = multihost_utils.process_allgather(counted)
    if jax.process_index() == 0:
        report(options, state, np.mean(right), np.ravel(skips), started)
    return 0


def report(options, state, accuracy, skips, started) -> None:
    """What the first process prints."""
    print(
        f"{options.steps} steps on {jax.device_count()} devices "
        f"({jax.default_backend()}) of {jax.process_count()} processes, "
        f"{time.perf_counter() - started:.0f} s"
    )
    print(f"skipped steps, as each process counts: {' '.join(map(str, skips))}")
    for event in sg.events(state):
        print(f"  {event}")
    print(f"accuracy {100 * accuracy:.2f} % on the test digits")


if __name__ == "__main__":
    finish(main)
