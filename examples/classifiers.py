"""Training steps for the classifiers of the examples: Flax NNX, guarded or not."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from digits import Split
from flax import nnx

import stablegrad as sg

EVALUATED_AT_ONCE = 500  # Images.


class Trained(NamedTuple):
    """All that a step changes."""

    params: Any  # Floating-point parameters, a pure pytree.
    rest: Any  # Batch statistics and random streams.
    opt_state: Any


def start(model: nnx.Module, tx: optax.GradientTransformation) -> tuple[Any, Trained]:
    """The model's graph, which stays, and what a step changes."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    return graphdef, Trained(params, rest, tx.init(params))


def cross_entropy(logits, labels):
    """The mean over the batch, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def make_step(
    graphdef, tx: optax.GradientTransformation, *, look: bool = False
) -> Callable:
    """One step, compiled: `step(trained, inputs, labels) -> trained, seen`.

    `seen` holds `loss`, `accuracy` in [0, 1] and `grad_norm`, all of the batch before
    the step, and the guard's `metrics` if there is one. With `look`, the step gets
    `value_fn=`, which a trust region needs.
    """

    def loss_fn(params, rest, inputs, labels):
        model = nnx.merge(graphdef, params, rest, copy=True)
        model.train()
        logits = model(inputs)
        _, _, rest = nnx.split(model, nnx.Param, ...)
        accuracy = jnp.mean(jnp.argmax(logits, -1) == labels)
        return cross_entropy(logits, labels), (rest, accuracy)

    def step(trained: Trained, inputs, labels):
        params, rest, opt_state = trained
        (loss, (after, accuracy)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            params, rest, inputs, labels
        )
        extra: dict[str, Any] = {"value": loss}
        if look:
            again = lambda params: loss_fn(params, rest, inputs, labels)[0]
            extra["value_fn"] = again
        params, opt_state = sg.apply(
            optax.with_extra_args_support(tx), grads, opt_state, params, **extra
        )
        seen = {
            "loss": loss,
            "accuracy": accuracy,
            "grad_norm": optax.tree.norm(grads),
            **told(opt_state),
        }
        if "skipped" in seen:
            # Batch statistics are no parameters: a bad batch has spoilt them too.
            after = keep_statistics(seen["skipped"], rest, after)
        return Trained(params, after, opt_state), seen

    return jax.jit(step, donate_argnums=0)


def told(opt_state) -> dict[str, jax.Array]:
    """The metrics of the guards, clips and plateaus in a state; none without them."""
    try:
        return sg.metrics(opt_state)
    except ValueError:
        return {}


def keep_statistics(skipped, before, after):
    """Batch statistics of before the step where it was skipped; the rest moves on."""
    select = lambda old, new: (
        jnp.where(skipped, old, new) if jnp.issubdtype(new.dtype, jnp.floating) else new
    )
    return jax.tree.map(select, before, after)


def make_evaluate(graphdef) -> Callable:
    """`evaluate(trained, split) -> (loss in nats, accuracy in [0, 1])`, compiled."""

    @jax.jit
    def sums(params, rest, inputs, labels):
        model = nnx.merge(graphdef, params, rest, copy=True)
        model.eval()
        logits = model(inputs)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.sum(losses), jnp.sum(jnp.argmax(logits, -1) == labels)

    def evaluate(trained: Trained, split: Split) -> tuple[float, float]:
        totals = np.zeros(2)
        for first in range(0, len(split.labels), EVALUATED_AT_ONCE):
            rows = slice(first, first + EVALUATED_AT_ONCE)
            found = sums(
                trained.params, trained.rest, split.images[rows], split.labels[rows]
            )
            totals += np.array(jax.device_get(found), np.float64)
        loss, right = totals / len(split.labels)
        return float(loss), float(right)

    return evaluate


def epoch(
    train: Split, batch_size: int, order: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Every image once, in a new order; what does not fill a batch is left out."""
    rows = order.permutation(len(train.labels))
    for first in range(0, len(rows) - batch_size + 1, batch_size):
        chosen = rows[first : first + batch_size]
        yield train.images[chosen], train.labels[chosen]
