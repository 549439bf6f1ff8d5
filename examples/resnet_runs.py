"""The runs of `cifar_resnet.py`: networks, rates and optimizers, epoch by epoch."""

import argparse
import functools
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import cifar
import classifiers
import jax
import models
import numpy as np
import optax
from checkpoints import Checkpoints
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from ranking import Result
from rich.progress import Progress
from telemetry import Telemetry

import stablegrad as sg

CHUNK = 10  # Steps between two reads of the device, for the progress bar.
PLAIN = {"adagrad": 1e-2, "rmsprop": 1e-3, "adam": 1e-3}  # Their usual rates.
ADAPTIVE = "adaptive"


class Setting(NamedTuple):
    """What all runs share."""

    options: argparse.Namespace
    mesh: Mesh
    checkpoints: Checkpoints
    log: Telemetry
    progress: Progress


def build(options, limit: Callable | None = None) -> models.ResNet:
    """The network, always with the same weights."""
    return models.ResNet(
        channels=options.train.images.shape[-1],
        blocks=options.blocks,
        width=options.width,
        limit=limit,
        rngs=nnx.Rngs(options.seed),
    )


def first_rate(options) -> dict[str, Any]:
    """The rate to start with, from one batch, and the sentences that explain it."""
    started = time.perf_counter()

    def loss_fn(model, batch):
        model.train()
        return classifiers.cross_entropy(model(batch[0]), batch[1])

    batch = tuple(array[: options.batch_size] for array in options.train)
    found = sg.critical_learning_rate(
        loss_fn, build(options), batch, optax.adam, steps=options.probe
    )
    usable = 0 < found.safe_start < math.inf
    return {
        "rate": found.safe_start if usable else PLAIN["adam"],
        "why": str(found),
        "seconds": time.perf_counter() - started,
    }


def optimizer(name: str, rate: float) -> optax.GradientTransformation:
    """One of the four, at a rate."""
    if name != ADAPTIVE:
        return getattr(optax, name)(rate)
    # metric=None: the guard is told the training loss, the plateau the validation loss.
    plateau = sg.reduce_on_plateau(0.5, patience=3, metric=None)
    return sg.stabilize(optax.chain(optax.adam(rate), plateau))


def learn(step, trained, epoch: int, setting: Setting, bar):
    """One epoch: what is trained afterwards, and a row of numbers for each step."""
    options, rows, waiting = setting.options, [], []
    # From the epoch's number, so that a resumed run sees the same batches.
    order, changes = (np.random.default_rng([options.seed, epoch, i]) for i in (0, 1))
    divided = NamedSharding(setting.mesh, P("data"))
    steps = len(options.train.labels) // options.batch_size
    for images, labels in classifiers.epoch(options.train, options.batch_size, order):
        if options.data_dir is not None:
            images = cifar.augment(images, changes)
        trained, seen = step(trained, *jax.device_put((images, labels), divided))
        if jax.default_backend() == "cpu":
            # Virtual devices share threads: two steps in flight may deadlock.
            jax.block_until_ready(seen)
        waiting.append(seen)
        if len(waiting) == CHUNK or len(rows) + len(waiting) == steps:
            rows += jax.device_get(waiting)
            setting.progress.update(bar, advance=len(waiting))
            waiting = []
    return trained, rows


def score(evaluate, trained: classifiers.Trained, split) -> tuple[float, float]:
    """Loss and accuracy, on the first device alone."""
    here = jax.tree.map(lambda x: x.addressable_data(0), trained._replace(opt_state=()))
    return evaluate(here, split)


def begin(name: str, setting: Setting):
    """A run's step, what it trains, and its records so far: new, or restored."""
    options, say = setting.options, setting.progress.console.print
    saved = setting.checkpoints.metadata(name)
    new = {"rate": PLAIN.get(name), "why": "", "seconds": 0.0, "epochs": []}
    records = saved or new
    if records["rate"] is None:
        records |= first_rate(options)
    if records["why"]:
        say(f"{name}: {records['why']}", highlight=False)
    limit = functools.partial(
        sg.limit_gradient, max_norm=options.gradient_limit / options.batch_size
    )
    tx = optimizer(name, records["rate"])
    graphdef, trained = classifiers.start(
        build(options, limit if name == ADAPTIVE else None), tx
    )
    trained = jax.device_put(trained, NamedSharding(setting.mesh, P()))
    if saved:
        trained = setting.checkpoints.state(name, trained)
        say(f"{name}: resumed after epoch {len(records['epochs'])}", highlight=False)
    return classifiers.make_step(graphdef, tx), trained, records


def train_one(name: str, setting: Setting, evaluate, results: list[Result]) -> None:
    """One run; it is the last of `results`, however far it comes."""
    options = setting.options
    step, trained, records = begin(name, setting)
    history = records["epochs"]
    results.append(Result(name, records["rate"], records["seconds"], history))
    steps = len(options.train.labels) // options.batch_size
    bar = setting.progress.add_task(
        name, total=steps * options.epochs, completed=steps * len(history)
    )
    for epoch in range(len(history) + 1, options.epochs + 1):
        started = time.perf_counter()
        trained, rows = learn(step, trained, epoch, setting, bar)
        loss, accuracy = score(evaluate, trained, options.validation)
        if name == ADAPTIVE:
            state = sg.observe_metric(trained.opt_state, value=loss)
            trained = trained._replace(opt_state=state)
        now = jax.device_get(classifiers.told(trained.opt_state))
        row = {
            "train_loss": float(np.mean([row["loss"] for row in rows])),
            "validation_loss": loss,
            "validation_accuracy": accuracy,
            "rate_scale": float(now.get("lr_scale", 1) * now.get("plateau_scale", 1)),
            "skipped": int(now["skipped_steps"]) if now else None,
            "seconds": time.perf_counter() - started,
        }
        history.append(row)
        # Before its lines are written, so that no epoch is in the telemetry twice.
        setting.checkpoints.save(name, epoch, trained, records)
        for i, numbers in enumerate(rows):
            setting.log.write(steps * (epoch - 1) + i, {"run": name, **numbers})
        setting.log.write(steps * epoch, {"run": name, "epoch": epoch, **row})
        setting.log.flush()
    _, results[-1].test_accuracy = score(evaluate, trained, options.test)
