"""What few steps teach: signals that come more rarely than `share`.

To a guard they look like accidents: on one step in 512 a gradient a thousand times as
large as the others. Nothing but the user knows that these steps are what matters.
"""

import jax
import jax.numpy as jnp
import optax

from ..networks import forward, mlp
from ..task import Start, Task, single, supervised

LOCK, SYMBOLS = 3, 8  # A policy finds the combination by chance on one step in 512.
INPUTS, RARE = 10, 500  # One example in 500 is of the rare class; batches are of one.


def begin_lock(key) -> Start:
    """A policy that knows nothing, and a combination."""
    combination = jax.random.randint(key, (LOCK,), 0, SYMBOLS)
    return Start({"model": jnp.zeros((LOCK, SYMBOLS))}, combination)


def lock_step(world, data, key, t, learn):
    """One try a step: policy gradient with a small bonus for entropy."""
    tried = jax.random.categorical(key, world.params["model"])
    reward = jnp.all(tried == data).astype(jnp.float32)

    def loss(logits):
        logs = jax.nn.log_softmax(logits)
        entropy = -jnp.sum(jnp.exp(logs) * logs)
        return -reward * jnp.sum(logs[jnp.arange(LOCK), tried]) - 1e-3 * entropy

    return learn(world, loss)


def lock_score(world, data):
    """The chance of the combination."""
    logs = jax.nn.log_softmax(world.params["model"])
    return jnp.exp(jnp.sum(logs[jnp.arange(LOCK), data]))


def begin_class(key) -> Start:
    """A network, and where the rare class lies."""
    init_key, data_key = jax.random.split(key)
    shift = jax.random.normal(data_key, (INPUTS,))
    return Start({"model": mlp(init_key, (INPUTS, 64, 2))}, shift)


def examples(shift, key, count: int, share: float):
    """Inputs, and whether they are of the rare class."""
    class_key, input_key = jax.random.split(key)
    y = jax.random.bernoulli(class_key, share, (count,)).astype(jnp.int32)
    x = jax.random.normal(input_key, (count, INPUTS)) + y[:, None] * shift
    return x, y


def draw_one(shift, key, t):
    """A batch of one example."""
    return examples(shift, key, 1, 1 / RARE)


def class_loss(params, batch):
    """Cross-entropy, without weights."""
    x, y = batch
    logits = forward(params, x)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))


def balanced_accuracy(world, shift):
    """Of 4,000 examples, half of them rare, with the prior taken out."""
    x, y = examples(shift, jax.random.key(3), 4000, 0.5)
    logits = forward(world.params["model"], x)
    found = logits[:, 1] - logits[:, 0] + jnp.log(RARE) > 0
    recall = jnp.sum(found * y) / jnp.sum(y)
    return 0.5 * (recall + jnp.sum(~found * (1 - y)) / jnp.sum(1 - y))


def tasks() -> list[Task]:
    """This family."""
    lock = Task(
        "reward-1-in-512",
        "rarer than `share`",
        "chance of the reward",
        higher=True,
        goal=0.95,
        steps=30_000,
        optimizers=single(lambda: optax.sgd(0.5)),
        begin=begin_lock,
        step=lock_step,
        score=lock_score,
        looks=False,  # The loss is a stand-in: only its gradient means something.
    )
    rare = Task(
        "class-1-in-500",
        "rarer than `share`",
        "balanced test accuracy",
        higher=True,
        goal=0.75,
        steps=30_000,
        optimizers=single(lambda: optax.adam(1e-3)),
        begin=begin_class,
        step=supervised(draw_one, class_loss),
        score=balanced_accuracy,
    )
    return [lock, rare]
