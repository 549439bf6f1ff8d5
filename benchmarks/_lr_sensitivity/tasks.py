"""Two small tasks that blow up at high learning rates, with data any machine has.

A: a character transformer on the English text that every Python ships.
B: a ten-layer ReLU network without normalisation on scikit-learn's digits.

And C, which is sound over most of its rates: a small tanh network fits a curve, without
noise, for so long that it trains at the edge of stability.
"""

import functools
from collections.abc import Callable
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

from . import transformer

WARM_UP = 30
DEPTH, WIDTH = 10, 64
OPTIMIZERS = {  # And the rates of B and C.
    "adam": (optax.adam, np.geomspace(1e-4, 1.0, 9)),
    "momentum": (
        lambda rate: optax.sgd(rate, momentum=0.9),
        np.geomspace(1e-3, 10, 9),
    ),
}


class Task(NamedTuple):
    """What is trained, on what, for how long, and how it is judged."""

    name: str
    rates: np.ndarray  # Learning rates, log-spaced.
    steps: int
    batch_size: int
    init: Callable[[jax.Array], Any]  # key -> parameters
    batch: Callable[[jax.Array], Any]  # key -> batch
    loss: Callable[[Any, Any], jax.Array]  # parameters, batch -> mean loss
    final_loss: Callable[[Any], jax.Array]  # On a fixed set.
    accuracy: Callable[[Any], jax.Array] | None  # On held-out data, in [0, 1].
    dead: Callable[[Any], jax.Array]  # Share of hidden units that are always zero.
    trivial_loss: float  # Of the best constant predictor.
    optimizer: Callable[[Any], optax.GradientTransformation]  # rate -> optimizer
    tail: int = 0  # Last steps whose mean loss is the final loss, if not 0.
    together: bool = True  # Whether all rates fit the device at once.


def mean_loss(scores, labels):
    return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()


def entropy(labels, classes) -> float:
    shares = np.bincount(labels.ravel(), minlength=classes) / labels.size
    shares = shares[shares > 0]
    return float(-(shares * np.log(shares)).sum())


def _layers(key, widths, gain):
    """Dense layers whose kernels have the variance gain / fan-in."""
    keys = jax.random.split(key, len(widths) - 1)
    return [
        {
            "kernel": jax.random.normal(k, (fan_in, fan_out)) * (gain / fan_in) ** 0.5,
            "bias": jnp.zeros(fan_out),
        }
        for k, fan_in, fan_out in zip(keys, widths[:-1], widths[1:], strict=True)
    ]


@functools.cache
def _text():
    joined = "".join(topics[name] for name in sorted(topics))
    alphabet = sorted(set(joined))
    number = {character: i for i, character in enumerate(alphabet)}
    encoded = np.array([number[character] for character in joined], np.int32)
    split = len(encoded) * 9 // 10
    return encoded[:split], encoded[split:], len(alphabet)


def text_task(steps: int = 300, batch_size: int = 16) -> Task:
    """Task A: two layers, width 64, four heads, context 64, AdamW with b2 = 0.95."""
    train, held_out, characters = _text()
    text = jnp.asarray(train)
    length = transformer.CONTEXT + 1
    starts = np.linspace(0, len(held_out) - length, 128).astype(int)
    windows = jnp.asarray(np.stack([held_out[i : i + length] for i in starts]))

    def batch(key):
        first = jax.random.randint(key, (batch_size, 1), 0, len(train) - length)
        return text[first + jnp.arange(length)]

    def loss(params, window):
        scores = transformer.logits(params, window[:, :-1])
        return mean_loss(scores, window[:, 1:])

    return Task(
        name="A",
        rates=np.geomspace(3e-4, 1.0, 8),
        steps=steps,
        batch_size=batch_size,
        init=lambda key: transformer.init(key, characters),
        batch=batch,
        loss=loss,
        final_loss=lambda params: loss(params, windows),
        accuracy=None,
        dead=lambda params: jnp.zeros(()),
        trivial_loss=entropy(held_out, characters),
        optimizer=lambda rate: optax.adamw(
            optax.warmup_constant_schedule(0.0, rate, WARM_UP), b2=0.95
        ),
    )


@functools.cache
def _digits():
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images = (digits.data / 16.0).astype(np.float32)[order]
    labels = digits.target.astype(np.int32)[order]
    return images[:1400], labels[:1400], images[1400:], labels[1400:]


def digits_task(optimizer: str = "adam", batch_size: int = 64, steps: int = 600):
    """Task B: ten layers of 64 ReLU units, He initialisation, no normalisation."""
    train_images, train_labels, test_images, test_labels = map(jnp.asarray, _digits())
    widths = [train_images.shape[1], *[WIDTH] * (DEPTH - 1), 10]

    def hidden(params, x):
        layers = []
        for layer in params[:-1]:
            x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
            layers.append(x)
        return layers

    def scores(params, x):
        return hidden(params, x)[-1] @ params[-1]["kernel"] + params[-1]["bias"]

    def loss(params, batch):
        images, labels = batch
        return mean_loss(scores(params, images), labels)

    def batch(key):
        rows = jax.random.randint(key, (batch_size,), 0, len(train_labels))
        return train_images[rows], train_labels[rows]

    def dead(params):
        silent = [jnp.all(x <= 0, axis=0) for x in hidden(params, train_images)]
        return jnp.mean(jnp.stack(silent))

    def accuracy(params):
        guesses = scores(params, test_images).argmax(-1)
        return jnp.mean(guesses == test_labels)

    build, rates = OPTIMIZERS[optimizer]
    return Task(
        name=f"B {optimizer}" + (f", batch {batch_size}" if batch_size != 64 else ""),
        rates=rates,
        steps=steps,
        batch_size=batch_size,
        init=lambda key: _layers(key, widths, gain=2.0),
        batch=batch,
        loss=loss,
        final_loss=lambda params: loss(params, (train_images, train_labels)),
        accuracy=accuracy,
        dead=dead,
        trivial_loss=entropy(_digits()[1], 10),
        optimizer=build,
    )


def curve_task(optimizer: str = "adam", steps: int = 3000, batch_size: int = 32):
    """Task C: two layers of 64 tanh units, sin(4 x) + 0.3 x^2 at 128 points."""
    x = jnp.linspace(-2, 2, 128)[:, None]
    y = jnp.sin(4 * x) + 0.3 * x**2

    def loss(params, rows):
        out = x[rows]
        for layer in params[:-1]:
            out = jnp.tanh(out @ layer["kernel"] + layer["bias"])
        out = out @ params[-1]["kernel"] + params[-1]["bias"]
        return jnp.mean((out - y[rows]) ** 2)

    build, rates = OPTIMIZERS[optimizer]
    return Task(
        name=f"C {optimizer}",
        rates=rates,
        steps=steps,
        batch_size=batch_size,
        init=lambda key: _layers(key, (1, 64, 64, 1), gain=1.0),
        batch=lambda key: jax.random.randint(key, (batch_size,), 0, len(x)),
        loss=loss,
        final_loss=lambda params: loss(params, jnp.arange(len(x))),
        accuracy=None,
        dead=lambda params: jnp.zeros(()),
        trivial_loss=float(jnp.var(y)),
        optimizer=build,
    )
