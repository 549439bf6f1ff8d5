"""Larger language models, and a network that no one tuned on.

D: a transformer initialised as GPT-2 is, on the text of task A.
E: the network of D, trained on Python's language reference, is tuned on topics of the
   library. The loss is that of what it learns, the accuracy that of what it forgets.
G: the same network at 10.6 million parameters, in bfloat16, on a folder's text.
K, kept: an LSTM under RMSProp. No constant of a method was chosen on it.
"""

import functools
from collections.abc import Callable
from pydoc_data.topics import topics
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from text import Text, load

from . import transformer
from .tasks import Task, entropy, mean_loss

RATES = np.array([3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0])
GPT_RATES = np.array([3e-4, 1e-3, 3e-3, 1e-2, 0.1, 1.0])
TUNING_RATES = np.array([1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1])
WARM_UP, TAIL = 50, 50
JUDGED = 256  # Windows of a fixed set.
FIRST_RATE = 3e-3  # At which the network of E was trained before.
LIBRARY = ("bltin-", "debugger", "formatstrings", "string-methods", "types")


class Shape(NamedTuple):
    """Of a transformer, and of its batches."""

    layers: int
    width: int
    heads: int
    context: int
    batch: int
    dtype: type = jnp.float32


D = Shape(layers=4, width=64, heads=4, context=64, batch=128)
G = Shape(layers=6, width=384, heads=6, context=256, batch=64, dtype=jnp.bfloat16)


def encoded(text: str, alphabet: str) -> Text:
    """A text cut in two, in an alphabet that it may share with others."""
    number = {character: i for i, character in enumerate(alphabet)}
    numbers = np.array([number[character] for character in text], np.int32)
    cut = len(numbers) * 9 // 10
    return Text(numbers[:cut], numbers[cut:], alphabet)


@functools.cache
def manual() -> dict[str, Text]:
    """Python's manual, whole and by kind, in one alphabet."""

    def joined(wanted: Callable[[str], bool]) -> str:
        return "".join(topics[name] for name in sorted(topics) if wanted(name))

    of_library = lambda name: name.startswith(LIBRARY) and name != "types"
    texts = {
        "whole": joined(lambda name: True),
        "language": joined(lambda name: not of_library(name)),
        "library": joined(of_library),
    }
    alphabet = "".join(sorted(set(texts["whole"])))
    return {kind: encoded(text, alphabet) for kind, text in texts.items()}


def _windows(numbers, length: int, count: int = JUDGED):
    """Spread evenly over a text, shape (count, length)."""
    starts = np.linspace(0, len(numbers) - length, count).astype(int)
    return jnp.asarray(np.stack([numbers[i : i + length] for i in starts]))


def _language_task(
    name: str,
    text: Text,
    context: int,
    size: int,
    logits: Callable,
    *,
    judged: np.ndarray | None = None,  # The text of the fixed set.
    known: np.ndarray | None = None,  # The text of the accuracy.
    **fields,
) -> Task:
    """A task on characters; `fields` are those of Task that are not about the text."""
    train, length = jnp.asarray(text.train), context + 1
    windows = _windows(text.train if judged is None else judged, length)
    held_out = _windows(text.held_out if known is None else known, length)

    def batch(key):
        first = jax.random.randint(key, (size, 1), 0, len(train) - length)
        return train[first + jnp.arange(length)]

    def loss(params, window):
        scores = logits(params, window[:, :-1]).astype(jnp.float32)
        return mean_loss(scores, window[:, 1:])

    def accuracy(params):
        right = logits(params, held_out[:, :-1]).argmax(-1) == held_out[:, 1:]
        return right.mean()

    return Task(
        name=name,
        batch_size=size,
        batch=batch,
        loss=loss,
        final_loss=lambda params: loss(params, windows),
        accuracy=accuracy,
        dead=lambda params: jnp.zeros(()),
        trivial_loss=entropy(text.train, len(text.alphabet)),
        **fields,
    )


def _adamw(rate):
    warm_up = optax.warmup_constant_schedule(0.0, rate, WARM_UP)
    return optax.adamw(warm_up, b2=0.99, weight_decay=0.1)


def _transformer_task(name: str, text: Text, shape: Shape, **fields) -> Task:
    given = {
        "init": lambda key: transformer.init(
            key,
            len(text.alphabet),
            shape.layers,
            shape.width,
            shape.context,
            deviation=0.02,
        ),
        "optimizer": _adamw,
        "rates": RATES,
        "together": False,  # Faster on a CPU, too, than products in a batch.
    }
    return _language_task(
        name,
        text,
        shape.context,
        shape.batch,
        lambda params, x: transformer.logits(params, x, shape.heads, shape.dtype),
        **(given | fields),
    )


def small_task(steps: int = 500, shape: Shape = D) -> Task:
    """Task D: four layers, width 64, context 64, batch 128, AdamW with b2 = 0.99."""
    return _transformer_task("D", manual()["whole"], shape, steps=steps, tail=TAIL)


@functools.cache
def _trained(steps: int, shape: Shape):
    """The network of D after training on the language reference, seed 0."""
    task = _transformer_task("D", manual()["language"], shape, steps=steps)
    tx = task.optimizer(FIRST_RATE)

    @jax.jit
    def train(key):
        first, later = jax.random.split(key)
        params = task.init(first)

        def step(carry, key):
            params, state = carry
            grads = jax.grad(task.loss)(params, task.batch(key))
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        keys = jax.random.split(later, steps)
        return jax.lax.scan(step, (params, tx.init(params)), keys)[0][0]

    return jax.device_get(train(jax.random.key(0)))


def tuning_task(steps: int = 200, shape: Shape = D, first_steps: int = 500) -> Task:
    """Task E: D, trained on one text, tuned on the library's topics, judged on both."""
    return _transformer_task(
        "E",
        manual()["library"],
        shape,
        judged=manual()["library"].held_out,
        known=manual()["language"].held_out,
        init=lambda key: jax.tree.map(jnp.asarray, _trained(first_steps, shape)),
        rates=TUNING_RATES,
        steps=steps,
    )


def gpt_task(folder: str, steps: int = 500, shape: Shape = G) -> Task:
    """Task G: six layers, width 384, context 256, batch 64, on a folder's text."""
    return _transformer_task(
        "G",
        load(folder, shape.context),
        shape,
        rates=GPT_RATES,
        steps=steps,
        tail=TAIL,
    )


def recurrent_task(steps: int = 500, width: int = 128, context: int = 64) -> Task:
    """Task K: one LSTM of 128 units, context 64, batch 32, RMSProp with decay 0.99."""
    text = manual()["whole"]

    def init(key):
        keys = jax.random.split(key, 3)
        normal = jax.random.normal
        return {
            "embedding": normal(keys[0], (len(text.alphabet), width)),
            "kernel": normal(keys[1], (2 * width, 4 * width)) * (2 * width) ** -0.5,
            "bias": jnp.zeros(4 * width).at[width : 2 * width].set(1.0),  # Forget.
            "head": normal(keys[2], (width, len(text.alphabet))) * width**-0.5,
        }

    def logits(params, window):
        def step(carry, x):
            hidden, cell = carry
            gates = jnp.concatenate([x, hidden], -1) @ params["kernel"] + params["bias"]
            opened, kept, shown, new = jnp.split(gates, 4, -1)
            cell = jax.nn.sigmoid(kept) * cell + jax.nn.sigmoid(opened) * jnp.tanh(new)
            hidden = jax.nn.sigmoid(shown) * jnp.tanh(cell)
            return (hidden, cell), hidden

        embedded = params["embedding"][window]
        start = jnp.zeros((window.shape[0], width))
        _, hidden = jax.lax.scan(step, (start, start), embedded.swapaxes(0, 1))
        return hidden.swapaxes(0, 1) @ params["head"]

    return _language_task(
        "K",
        text,
        context,
        32,
        logits,
        init=init,
        optimizer=lambda rate: optax.rmsprop(rate, decay=0.99),
        rates=RATES,
        steps=steps,
        tail=TAIL,
    )
