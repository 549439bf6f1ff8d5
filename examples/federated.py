"""Federated training in which some clients are broken, and the model does not notice.

    command:   pip install -e ".[examples]" && python examples/federated.py
               with --data-dir FOLDER on MNIST; --map shard_map --cpu-devices 5
    hardware:  two CPU cores; the same script runs unchanged on a GPU or TPU
    time:      a minute and a half beside other work; with MNIST three and a half
    expected:  accuracy after 400 rounds (two-core CPU, 2026-11-27, jax 0.10.2) on
               scikit-learn's digits 96.5 % without a fault, 96.0 with faults and
               guards, 10.0 with faults alone; on MNIST 95.0, 94.4 and 9.8

Ten clients keep their digits: client k has images of k and k + 1 alone. In a round each
takes some local steps of SGD and sends the difference to the server's parameters. The
server takes the mean as a gradient (FedAvg with server momentum). One client sends nan,
one sends differences a thousand times too large, one is absent in half of the rounds.

Before it is added, every difference passes a guard of that client: what is not finite
is refused, and norms above S are shrunk to S. Half of the clients should be above it:

    S <- S exp(-0.2 (share of differences below S - 1/2))

(Andrew et al., 2021, https://arxiv.org/abs/1905.03871), so no single client sets it.
The server's step is guarded by `stabilize`. Three runs: without a fault, with faults,
and with faults but without guards.

With `--masked-sum` the clients guard their own differences, and the server gets but
their sum: see `masked_sum.py`, which is a demonstration and no security product. With
`--map shard_map` the clients are spread over the devices. Ctrl-C reports what is done.
"""

import argparse
import sys
import time
from functools import partial
from typing import Any, NamedTuple

import digits
import jax
import jax.numpy as jnp
import models
import numpy as np
import optax
import style
from classifiers import Trained, cross_entropy, make_evaluate, start
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from masked_sum import decode, masked
from options import Parser, above, whole
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from telemetry import Telemetry

import stablegrad as sg

CLIENTS, AXIS = 10, "client"
NAN, LOUD, ABSENT = 3, 6, 8  # The clients that are broken.
FAULTS = {NAN: "sends nan", LOUD: "1,000 times too large", ABSENT: "often absent"}
RUNS = {  # Whether there are faults, and whether there are guards.
    "no fault": (False, True),
    "faults, guarded": (True, True),
    "faults, bare": (True, False),
}
QUANTILE, PACE = 0.5, 0.2  # Of the limit S.
DOOR = sg.guard(optax.identity(), sg.clip(sg.fixed(1.0)), sg.skip())


class Clients(NamedTuple):
    """What the clients keep; the first axis is theirs."""

    images: Any  # float32 (clients, images, pixels)
    labels: Any  # int32 (clients, images)
    numbers: Any  # int32 (clients,)
    doors: Any  # The states of their guards.


class Server(NamedTuple):
    """What the server keeps."""

    params: Any
    opt_state: Any
    limit: Any  # float32 (): S.


def shares_of(train: digits.Split) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels by client, equally many: half of two digits each."""
    rows = [np.flatnonzero(train.labels == digit) for digit in range(CLIENTS)]
    halves = [np.array_split(own, 2) for own in rows]
    own = [
        np.concatenate([halves[k][0], halves[(k + 1) % CLIENTS][1]])
        for k in range(CLIENTS)
    ]
    size = min(map(len, own))
    # Both digits, whatever is left out.
    own = np.stack([np.random.default_rng(0).permutation(x)[:size] for x in own])
    return train.images[own], train.labels[own]


def fault_in(update, number):
    """An update as a broken client sends it."""
    leaves, structure = jax.tree.flatten(update)
    first = jnp.where(number == NAN, leaves[0].at[0].set(jnp.nan), leaves[0])
    loud = lambda leaf: jnp.where(number == LOUD, 1000 * leaf, leaf)
    return structure.unflatten([loud(leaf) for leaf in (first, *leaves[1:])])


def make_round(graphdef, rest, tx, options, faulty: bool, guarded: bool):
    """One round, compiled: `round(server, clients, t) -> server, doors, seen`."""

    def loss_fn(params, images, labels):
        model = nnx.merge(graphdef, params, rest, copy=True)
        return cross_entropy(model(images), labels)

    def learn(params, images, labels, key):
        """The difference that some local steps make."""

        def step(own, key):
            rows = jax.random.randint(key, (options.batch_size,), 0, labels.size)
            grads = jax.grad(loss_fn)(own, images[rows], labels[rows])
            rate = options.learning_rate
            return jax.tree.map(lambda p, g: p - rate * g, own, grads), None

        keys = jax.random.split(key, options.local_steps)
        own, _ = jax.lax.scan(step, params, keys)
        return jax.tree.map(jnp.subtract, own, params)

    def client(server: Server, present, key, images, labels, number, door):
        """What a client sends, and its guard's state."""
        limit = server.limit
        own_key = jax.random.fold_in(key, number)
        update = learn(server.params, images, labels, own_key)
        update = fault_in(update, number) if faulty else update
        here = present[number]
        if not guarded:
            sent = optax.tree.where(here, update, optax.tree.zeros_like(update))
            one = here.astype(jnp.float32)
            message = {"update": sent, "count": one, "below": one}
            return message, door, optax.tree.norm(update)
        inside, after = DOOR.update(jax.tree.map(lambda u: u / limit, update), door)
        seen = sg.metrics(after)
        taken = here & ~seen["skipped"]
        message = {
            "update": jax.tree.map(lambda u: jnp.where(taken, u, 0), inside),
            "count": taken.astype(jnp.float32),
            "below": (taken & (seen["grad_norm"] <= 1)).astype(jnp.float32),
        }
        if options.masked_sum:
            message = masked(message, number, present, jax.random.fold_in(key, CLIENTS))
        door = optax.tree.where(here, after, door)
        return message, door, seen["grad_norm"] * limit

    def every(server, present, key, clients: Clients):
        """The sum of all messages, over the devices if they are several."""
        alone = partial(client, server, present, key)
        messages, doors, norms = jax.vmap(alone)(*clients)
        summed = jax.tree.map(lambda leaf: jnp.sum(leaf, 0, leaf.dtype), messages)
        if options.map == "shard_map":
            summed = jax.lax.psum(summed, AXIS)
        return summed, doors, norms

    if options.map == "shard_map":
        own, all_of = P(AXIS), P()
        every = jax.shard_map(
            every,
            mesh=options.mesh,
            in_specs=(all_of, all_of, all_of, own),
            out_specs=(all_of, own, own),
            # JAX 0.10 cannot batch a condition whose operands it tracks apart.
            check_vma=False,
        )

    def round(server: Server, clients: Clients, t):
        key, absence = jax.random.split(jax.random.fold_in(options.key, t))
        is_there = (jnp.arange(CLIENTS) != ABSENT) | jax.random.bernoulli(absence)
        present = is_there if faulty else jnp.ones((CLIENTS,), bool)
        summed, doors, norms = every(server, present, key, clients)
        if options.masked_sum and guarded:
            summed = jax.tree.map(decode, summed)
        count, limit = jnp.maximum(summed["count"], 1), server.limit
        scale = limit / count if guarded else 1 / count
        grads = jax.tree.map(lambda u: -scale * u, summed["update"])
        params, opt_state = sg.apply(
            tx, grads, server.opt_state, server.params, value=None
        )
        if guarded:
            share = summed["below"] / jnp.sum(present)
            limit = limit * jnp.exp(-PACE * (share - QUANTILE))
        seen = {"limit": limit, "taken": summed["count"], "present": present}
        return Server(params, opt_state, limit), doors, {**seen, "norms": norms}

    return jax.jit(round)


class Outcome(NamedTuple):
    """One run."""

    accuracies: list[float]  # Of each round, on the test digits.
    norms: np.ndarray  # (rounds, clients): of the differences, before the guards.
    limits: np.ndarray  # (rounds,): S.
    present: np.ndarray  # bool (rounds, clients)
    doors: list[dict[str, int]]  # By client: steps, those refused, those shrunk.
    server: dict[str, Any]  # Metrics of the server's guard; {} without one.


def train(name: str, options, log: Telemetry, advance) -> Outcome:
    """One run, from the seed's weights."""
    faulty, guarded = RUNS[name]
    inputs = options.train.images.shape[1]
    model = models.MLP((inputs, 128, 10), rngs=nnx.Rngs(options.seed))
    bare = optax.sgd(options.server_rate, momentum=0.9)
    tx = sg.stabilize(bare) if guarded else bare
    graphdef, trained = start(model, tx)
    evaluate = make_evaluate(graphdef)
    take = make_round(graphdef, trained.rest, tx, options, faulty, guarded)
    doors = jax.vmap(lambda _: DOOR.init(trained.params))(jnp.arange(CLIENTS))
    images, labels = shares_of(options.train)
    clients = Clients(images, labels, np.arange(CLIENTS, dtype=np.int32), doors)
    server = Server(trained.params, trained.opt_state, jnp.float32(options.limit))
    if options.map == "shard_map":
        put = lambda tree, spec: jax.device_put(tree, NamedSharding(options.mesh, spec))
        clients, server = put(clients, P(AXIS)), put(server, P())
    else:
        clients = jax.device_put(clients)
    rows, accuracies = [], []
    for t in range(options.rounds):
        server, doors, seen = take(server, clients, t)
        clients = clients._replace(doors=doors)
        now = Trained(server.params, trained.rest, server.opt_state)
        loss, accuracy = evaluate(now, options.test)
        rows.append(jax.device_get(seen))
        accuracies.append(accuracy)
        row = {"test_loss": loss, "test_accuracy": accuracy, "limit": seen["limit"]}
        log.write(t, {"run": name, **row, "taken": seen["taken"]})
        advance()
    told = sg.metrics(clients.doors)
    names = ("guarded_steps", "skipped_steps", "clipped_steps")
    by_client = [{n: int(told[n][k]) for n in names} for k in range(CLIENTS)]
    for k, counts in enumerate(by_client):
        log.write(options.rounds, {"run": name, "client": k, **counts})
    log.flush()
    column = lambda what: np.stack([row[what] for row in rows])
    return Outcome(
        accuracies,
        column("norms"),
        column("limit"),
        column("present"),
        by_client,
        jax.device_get(sg.metrics(server.opt_state)) if guarded else {},
    )


def tables(outcomes: dict[str, Outcome]) -> list[Table]:
    """The runs, and the clients of the guarded run with faults."""
    runs = Table(box=box.SIMPLE_HEAD)
    for text in ("run", "accuracy", "best round", "server's steps refused", "shrunk"):
        runs.add_column(text, justify="left" if text == "run" else "right")
    for name, out in outcomes.items():
        counts = ("-", "-")
        if out.server:
            kinds = ("skipped_steps", "clipped_steps")
            counts = tuple(str(out.server[kind]) for kind in kinds)
        last, best = 100 * out.accuracies[-1], 100 * max(out.accuracies)
        runs.add_row(name, f"{last:.2f} %", f"{best:.2f} %", *counts)
    found = outcomes.get("faults, guarded")
    if not found:
        return [runs]
    clients = Table(title="with faults, guarded", box=box.SIMPLE_HEAD)
    for text in ("client", "digits", "fault", "rounds", "refused", "shrunk"):
        clients.add_column(text, justify="left" if text == "fault" else "right")
    for k, seen in enumerate(found.doors):
        counts = seen["guarded_steps"], seen["skipped_steps"], seen["clipped_steps"]
        own = f"{k}, {(k + 1) % CLIENTS}"
        clients.add_row(str(k), own, FAULTS.get(k, ""), *map(str, counts))
    return [runs, clients]


def draw(outcomes: dict[str, Outcome], path) -> None:
    """Accuracy of all runs; norms of the differences and their limit."""
    title = "Ten clients, three of them broken"
    figure, ((top,), (bottom,)) = style.new_figure(10, 8, 2, title=title, sharex=True)
    for name, color in zip(RUNS, (style.GREY, style.BLUE, style.RED), strict=False):
        if name in outcomes:
            accuracies = 100 * np.array(outcomes[name].accuracies)
            top.plot(accuracies, color=color, label=name)
    top.set(ylabel="accuracy on the test digits in %")
    top.legend(loc="center right")
    name = "faults, guarded" if "faults, guarded" in outcomes else "no fault"
    found = outcomes[name]
    for k in range(CLIENTS):
        norms = np.where(found.present[:, k], found.norms[:, k], np.nan)
        is_odd = name != "no fault" and k in FAULTS
        look = {"linewidth": 0.5, "color": "0.6"}
        look = {"linewidth": 0.8, "marker": "."} if is_odd else look
        label = f"client {k}, {FAULTS[k]}" if is_odd else None
        bottom.plot(np.where(np.isfinite(norms), norms, np.nan), label=label, **look)
    bottom.plot(found.limits, "k--", label="limit S")
    bottom.set(yscale="log", xlabel="round", ylabel=f"norm of a difference, {name}")
    bottom.legend(loc="center right")
    figure.savefig(path, dpi=110)


def parse_args(argv) -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=whole(1), default=400, help="a run")
    parser.add_argument("--local-steps", type=whole(1), default=5, help="in a round")
    parser.add_argument(
        "--batch-size", type=whole(1), default=32, help="images a local step"
    )
    parser.add_argument("--learning-rate", type=above(0), default=0.1, help="local")
    parser.add_argument("--server-rate", type=above(0), default=0.3, help="of SGD")
    parser.add_argument("--limit", type=above(0), default=0.3, help="the first S")
    parser.add_argument(
        "--map", choices=("vmap", "shard_map"), default="vmap", help="over clients"
    )
    parser.add_argument("--cpu-devices", type=whole(1), help="virtual devices")
    parser.add_argument(
        "--masked-sum", action="store_true", help="the server sees the sum alone"
    )
    options = digits.parse_args(parser, argv, "federated")
    share = shares_of(options.train)[1].shape[1]
    if options.batch_size > share:
        parser.error(
            f"argument --batch-size: must be at most the {share} images of a client, "
            f"got {options.batch_size}"
        )
    if options.cpu_devices is not None:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", options.cpu_devices)
    count = jax.device_count()
    used = max(n for n in range(1, count + 1) if CLIENTS % n == 0)
    if options.map == "shard_map":
        options.mesh = jax.make_mesh((used,), (AXIS,), axis_types=(AxisType.Auto,))
    options.devices = used if options.map == "shard_map" else 1
    options.key = jax.random.key(options.seed)
    return options


def main(argv=None) -> int:
    """Trains, then prints the tables and writes the figure."""
    options = parse_args(argv)
    console, started, status = Console(), time.perf_counter(), 0
    outcomes: dict[str, Outcome] = {}
    telling = Console(stderr=True)  # What is written is not mixed with it.
    with Telemetry(options.out) as log, Progress(console=telling) as progress:
        bar = progress.add_task("rounds", total=len(RUNS) * options.rounds)
        try:
            for name in RUNS:
                progress.update(bar, description=name)
                advance = lambda: progress.advance(bar)
                outcomes[name] = train(name, options, log, advance)
        except KeyboardInterrupt:
            status = 130
    say = lambda line: console.print(line, highlight=False, soft_wrap=True)
    if status:
        say(f"interrupted after {len(outcomes)} of {len(RUNS)} runs")
    if outcomes:
        for table in tables(outcomes):
            console.print(table)
        draw(outcomes, options.out / "federated.png")
        how = f"{options.map} on {options.devices} of {jax.device_count()} devices"
        summed = ", a masked sum" if options.masked_sum else ""
        say(
            f"{options.rounds} rounds, {how} ({jax.default_backend()}){summed}; "
            f"{time.perf_counter() - started:.0f} s in all; figure and telemetry in "
            f"{options.out}"
        )
    return status


if __name__ == "__main__":
    sys.exit(main())
