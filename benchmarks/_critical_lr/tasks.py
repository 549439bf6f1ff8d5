"""The configurations: network, activation, loss, optimizer and batch."""

import functools
from collections.abc import Callable
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

from . import models

OPTIMIZERS = {
    "SGD": optax.sgd(1.0),
    "momentum": optax.sgd(1.0, momentum=0.9),
    "Adam": optax.adam(1.0),
}
BATCHES = {"MLP": (16, 64, 256), "CNN": (16, 64, 256), "transformer": (4, 8, 16)}


class Task(NamedTuple):
    """One configuration."""

    network: str
    activation: str
    criterion: str
    optimizer: str
    batch: int
    seed: int

    @property
    def name(self) -> str:
        """For tables."""
        return " ".join(map(str, self[:5]))

    @property
    def tx(self) -> optax.GradientTransformation:
        """The optimizer, at learning rate 1."""
        return OPTIMIZERS[self.optimizer]


class Made(NamedTuple):
    """What a task trains."""

    loss_fn: Callable
    params: Any
    batch: Any


def tasks(seed: int = 0) -> list[Task]:
    """Every network with every activation and optimizer, at one of three batch sizes.

    Networks and losses: MLP, CNN and transformer with cross-entropy, MLP also with the
    squared error. 36 in all; each batch size falls on each optimizer and activation.
    """
    chosen = []
    kinds = [(name, "xent") for name in BATCHES] + [("MLP", "mse")]
    for k, (network, criterion) in enumerate(kinds):
        for a, activation in enumerate(models.ACTIVATIONS):
            for o, optimizer in enumerate(OPTIMIZERS):
                batch = BATCHES[network][(a + o + k) % 3]
                own = 1000 * seed + len(chosen)
                chosen.append(
                    Task(network, activation, criterion, optimizer, batch, own)
                )
    return chosen


def make(task: Task) -> Made:
    """Initial parameters, one batch, and the loss."""
    key = jax.random.key(task.seed)
    draw = np.random.default_rng(task.seed)
    loss_fn = _loss(task.network, task.activation, task.criterion)
    if task.network == "transformer":
        text, symbols = _text()
        starts = draw.integers(0, len(text) - models.CONTEXT - 1, task.batch)
        batch = jnp.asarray(text[starts[:, None] + np.arange(models.CONTEXT + 1)])
        return Made(loss_fn, models.transformer(key, symbols), batch)
    images, labels = _digits()
    rows = draw.choice(len(labels), task.batch, replace=False)
    params = (models.mlp if task.network == "MLP" else models.cnn)(key)
    return Made(loss_fn, params, (jnp.asarray(images[rows]), jnp.asarray(labels[rows])))


@functools.cache
def _loss(network: str, activation: str, criterion: str) -> Callable:
    act = models.ACTIVATIONS[activation]
    if network == "transformer":

        def of_text(params, symbols):
            logits = models.apply_transformer(params, symbols[:, :-1], act)
            return optax.softmax_cross_entropy_with_integer_labels(
                logits, symbols[:, 1:]
            ).mean()

        return of_text
    apply = models.apply_mlp if network == "MLP" else models.apply_cnn

    def of_images(params, batch):
        images, labels = batch
        logits = apply(params, images, act)
        if criterion == "mse":
            wanted = jax.nn.one_hot(labels, models.CLASSES)
            return 0.5 * jnp.mean(jnp.sum((logits - wanted) ** 2, axis=1))
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return of_images


@functools.cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    digits: Any = load_digits()
    images = digits.data.astype(np.float32)
    return (images - images.mean()) / images.std(), digits.target


@functools.cache
def _text() -> tuple[np.ndarray, int]:
    """The manual that Python ships, as numbers of its characters."""
    text = "".join(topics[name] for name in sorted(topics))
    names, numbers = np.unique(list(text), return_inverse=True)
    return numbers.astype(np.int32), len(names)
