"""Small networks as functions of a tree of arrays."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

TRAINING_DIGITS = 1437


def dense(key, inputs: int, outputs: int, gain: float = 2.0):
    """Weights of variance `gain` over the inputs, and no bias."""
    weights = jax.random.normal(key, (inputs, outputs)) * jnp.sqrt(gain / inputs)
    return {"w": weights, "b": jnp.zeros(outputs)}


def affine(layer, x):
    """One dense layer."""
    return x @ layer["w"] + layer["b"]


def mlp(key, sizes: Sequence[int], gain: float = 2.0) -> list:
    """Dense layers of the given sizes."""
    keys = jax.random.split(key, len(sizes) - 1)
    pairs = zip(keys, sizes[:-1], sizes[1:], strict=True)
    return [dense(k, i, o, gain) for k, i, o in pairs]


def forward(layers: list, x, activation: Callable = jax.nn.relu):
    """The last layer is linear."""
    for layer in layers[:-1]:
        x = activation(affine(layer, x))
    return affine(layers[-1], x)


def cross_entropy(logits, labels):
    """The mean over all labels."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.mean(losses)


def accuracy(logits, labels):
    """The share of right answers."""
    return jnp.mean((jnp.argmax(logits, -1) == labels).astype(jnp.float32))


def normalized(x, axis: int = -1):
    """Mean zero and variance one along an axis."""
    x = x - jnp.mean(x, axis, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis, keepdims=True) + 1e-5)


def digits(key) -> dict[str, jax.Array]:
    """scikit-learn's digits in [0, 1], divided by the key."""
    images, labels = load_digits(return_X_y=True)
    order = jax.random.permutation(key, len(labels))
    x = jnp.asarray(images / 16, jnp.float32)[order]
    y = jnp.asarray(labels.astype(np.int32))[order]
    cut = TRAINING_DIGITS
    return {"x": x[:cut], "y": y[:cut], "test_x": x[cut:], "test_y": y[cut:]}


def draw_digits(size: int) -> Callable:
    """Batches of images and labels, with replacement."""

    def draw(data, key, t):
        chosen = jax.random.randint(key, (size,), 0, data["y"].shape[0])
        return data["x"][chosen], data["y"][chosen]

    return draw
