"""What is stepped: a tree of a given size, or a transformer that is trained."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from _lr_sensitivity import transformer

LAYERS, WIDTH, CONTEXT, BATCH, CHARACTERS = 8, 320, 128, 8, 96


class Problem(NamedTuple):
    """Parameters, the data of every step, and the gradients that it gives."""

    name: str
    params: Any
    data: Any
    # parameters, data -> loss, gradients
    gradients: Callable[[Any, Any], tuple[jax.Array, Any]]
    # parameters, data -> a function that repeats the loss, there and elsewhere
    loss_of: Callable[[Any, Any], Callable[[Any], jax.Array]]


def optimizer_alone(size: int, leaves: int) -> Problem:
    """`size` parameters in `leaves` matrices, with gradients that are given."""
    rows = max(math.isqrt(size // leaves), 1)
    shape = (rows, max(size // leaves // rows, 1))
    keys = jax.random.split(jax.random.key(0), leaves)
    params = {f"w{i:03d}": jax.random.normal(k, shape) for i, k in enumerate(keys)}
    data = jax.tree.map(lambda x: 0.01 * x, params)
    count = f"{size / 1e6:g} million" if size >= 1e6 else str(size)
    return Problem(
        f"{count} parameters, {leaves} leaves",
        params,
        data,
        lambda params, data: (jnp.ones(()), data),
        _straight_loss,
    )


def _straight_loss(params, data):
    """The loss whose value is 1 at `params`, and whose gradient is `data`."""

    def loss(moved):
        rises = jax.tree.map(lambda g, x, y: jnp.vdot(g, x - y), data, moved, params)
        return 1.0 + sum(jax.tree.leaves(rises))

    return loss


def training_step(
    layers: int = LAYERS, width: int = WIDTH, context: int = CONTEXT, batch: int = BATCH
) -> Problem:
    """A character transformer on random text: forward, backward and optimizer."""
    params = transformer.init(jax.random.key(0), CHARACTERS, layers, width, context)
    text = jax.random.randint(
        jax.random.key(1), (batch, context + 1), 0, CHARACTERS, jnp.int32
    )

    def loss(params, text):
        scores = transformer.logits(params, text[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(
            scores, text[:, 1:]
        ).mean()

    count = sum(x.size for x in jax.tree.leaves(params))
    return Problem(
        f"training step, transformer of {count / 1e6:.1f} million parameters",
        params,
        text,
        jax.value_and_grad(loss),
        lambda _, text: lambda params: loss(params, text),
    )
