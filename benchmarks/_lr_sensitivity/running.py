"""Trains one method at every learning rate of a task at once."""

import hashlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .tasks import Task

Build = Callable[[Any], optax.GradientTransformation]  # rate -> optimizer
Evaluated = Callable[[Any, Any], Any]  # state, parameters -> what is judged
EXTRAS = ("value", "grad", "value_fn")  # All that some method asks for.


class Curve(NamedTuple):
    """What became of a method at every rate: arrays of shape (rates,)."""

    initial_loss: np.ndarray
    final_loss: np.ndarray  # nan or inf if it broke.
    accuracy: np.ndarray  # nan if the task has none.
    dead: np.ndarray


def as_trained(state, params):
    """The parameters as the last step left them."""
    del state
    return params


def gradient(task: Task, params, key, extras):
    """Loss and gradient on one batch, and the extras for the step."""
    batch = task.batch(key)
    loss, grads = jax.value_and_grad(task.loss)(params, batch)
    known = {
        "value": loss,
        "grad": grads,
        "value_fn": lambda params: task.loss(params, batch),
    }
    return loss, grads, {name: known[name] for name in extras}


def train_step(task: Task, tx, carry, key, extras=EXTRAS):
    """One step as optax users write it."""
    params, state = carry
    loss, grads, given = gradient(task, params, key, extras)
    updates, state = optax.with_extra_args_support(tx).update(
        grads, state, params, **given
    )
    return (optax.apply_updates(params, updates), state), loss


def program(task: Task, build: Build, evaluated: Evaluated = as_trained, extras=EXTRAS):
    """All rates as one compiled function of (rates, parameters, keys)."""

    def one(rate, params, keys):
        tx = build(rate)
        (last, state), losses = jax.lax.scan(
            lambda carry, key: train_step(task, tx, carry, key, extras),
            (params, tx.init(params)),
            keys,
        )
        last = evaluated(state, last)
        accuracy = jnp.nan if task.accuracy is None else task.accuracy(last)
        judged = losses[-task.tail :].mean() if task.tail else task.final_loss(last)
        return judged, accuracy, task.dead(last)

    if task.together:
        return jax.jit(jax.vmap(one, in_axes=(0, None, None)))
    return jax.jit(
        lambda rates, params, keys: jax.lax.map(lambda x: one(x, params, keys), rates)
    )


def inputs(task: Task, seed: int):
    """The rates, and a seed's weights and batches, the same for every method."""
    first, later = jax.random.split(jax.random.key(seed))
    rates = jnp.asarray(task.rates, jnp.float32)
    return rates, task.init(first), jax.random.split(later, task.steps)


def digest(run, task: Task) -> str:
    """Tells programs apart: task, steps, settings and code, but not the machine."""
    whole = run.trace(*inputs(task, 0)).jaxpr
    # Addresses and lines of source differ without any difference in what is computed.
    text = re.sub(r"0x[0-9a-f]+|\S+\.py:\d+", "", str(whole))
    told = hashlib.sha256(text.encode())
    for array in [task.rates, *whole.consts]:
        told.update(np.asarray(array).tobytes())
    return told.hexdigest()[:16]


def measured(run, task: Task, seed: int) -> Curve:
    """Runs a program for one seed."""
    rates, params, keys = inputs(task, seed)
    final, accuracy, dead = run(rates, params, keys)
    start = np.full(len(task.rates), float(jax.jit(task.final_loss)(params)))
    return Curve(start, *map(np.asarray, (final, accuracy, dead)))


def curve(
    task: Task, build: Build, seed: int, evaluated: Evaluated = as_trained
) -> Curve:
    """Runs `build(rate)` at all rates, from the same weights on the same batches."""
    return measured(program(task, build, evaluated), task, seed)
