"""Small networks that spike by themselves when Adam trains them for long."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import stablegrad as sg

WARMUP = 100  # Steps.


class Kind(NamedTuple):
    """One kind of run; all of it but the seed and the rate."""

    init: Callable
    loss: Callable  # (params, key) -> loss; the key draws the batch.
    optimizer: Callable = optax.adam
    rates: tuple[float, ...] = (3e-3, 1e-2)


def mlp(activation: Callable, widths: tuple[int, ...]) -> tuple[Callable, Callable]:
    """`init(key)` with He's kernels, and `apply(params, x)`."""
    names = [f"layer{i}" for i in range(len(widths) - 1)]

    def init(key):
        params = {}
        keys = jax.random.split(key, len(names))
        for name, own, n_in, n_out in zip(
            names, keys, widths[:-1], widths[1:], strict=True
        ):
            kernel = jax.nn.initializers.he_normal()(own, (n_in, n_out))
            params[name] = {"kernel": kernel, "bias": jnp.zeros(n_out)}
        return params

    def apply(params, x):
        for name in names:
            x = x @ params[name]["kernel"] + params[name]["bias"][None]
            x = x if name == names[-1] else activation(x)
        return x

    return init, apply


def attention(width: int) -> tuple[Callable, Callable]:
    """One attention over the eight rows of a digit, and an MLP behind it."""
    head_init, head = mlp(jax.nn.gelu, (width, 64, 10))

    def init(key):
        keys = jax.random.split(key, 5)
        kernel = jax.nn.initializers.lecun_normal()
        named = zip(("query", "key", "value"), keys[:3], strict=True)
        return {
            "embed": kernel(keys[3], (8, width)),
            **{name: kernel(own, (width, width)) for name, own in named},
            "head": head_init(keys[4]),
        }

    def apply(params, x):
        tokens = x.reshape(-1, 8, 8) @ params["embed"]
        heads = [
            (tokens @ params[name])[:, :, None] for name in ("query", "key", "value")
        ]
        seen = sg.structure.attend(*heads).output[:, :, 0]
        return head(params["head"], jnp.mean(tokens + seen, axis=1))

    return init, apply


def squared(network: tuple[Callable, Callable], x, y, batch: int = 0, **more) -> Kind:
    """Mean squared error on all data, or on a batch of them."""
    init, apply = network

    def loss(params, key):
        rows = jax.random.randint(key, (batch,), 0, len(x)) if batch else slice(None)
        return jnp.mean(jnp.square(apply(params, x[rows]) - y[rows]))

    return Kind(init, loss, **more)


def kinds() -> dict[str, Kind]:
    """All kinds of runs by name."""
    digits = load_digits()
    images = jnp.asarray(digits.data[:512] / 16, jnp.float32)
    labels = jax.nn.one_hot(jnp.asarray(digits.target[:512]), 10)
    x = jax.random.normal(jax.random.key(9), (512, 8))
    y = jnp.sin(2 * x[:, :1]) + x[:, 1:2] * x[:, 2:3]
    z = jnp.cos(3 * x[:, 3:4]) * x[:, 4:5] + jnp.abs(x[:, 5:6])
    small = (8, 48, 48, 48, 1)
    gelu, tanh, relu = jax.nn.gelu, jnp.tanh, jax.nn.relu
    return {
        "regression, tanh": squared(mlp(tanh, small), x, y),
        "regression, GELU": squared(mlp(gelu, small), x, y),
        "autoencoder, tanh": squared(mlp(tanh, (64, 32, 8, 32, 64)), images, images),
        "another regression, ReLU, wider": squared(mlp(relu, (8, 96, 96, 1)), x, z),
        "another regression, SiLU, deeper": squared(
            mlp(jax.nn.silu, (8, *[32] * 6, 1)), x, z
        ),
        "digits, GELU": squared(mlp(gelu, (64, 64, 64, 10)), images, labels),
        "digits, attention": squared(attention(32), images, labels),
        "regression, tanh, batch 256": squared(mlp(tanh, small), x, y, 256),
        "regression, ReLU, batch 64": squared(mlp(relu, small), x, y, 64),
        "regression, tanh, momentum": squared(
            mlp(tanh, small),
            x,
            y,
            optimizer=lambda rate: optax.sgd(rate, momentum=0.9),
            rates=(0.03, 0.1),
        ),
    }


def train(kind: Kind, seeds: list[int], steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Losses, and the octaves by which the worst layer is above its limit.

    Both have the shape (runs, steps). Limits are those of a margin of 1.
    """

    def run(seed, rate):
        start, stream = jax.random.split(jax.random.key(seed))
        schedule = optax.warmup_constant_schedule(0.0, rate, WARMUP)
        tx = sg.guard(kind.optimizer(schedule), sg.layer_health(every=1, margin=1.0))
        params = kind.init(start)

        def step(carry, key):
            params, state = carry
            loss, grads = jax.value_and_grad(kind.loss)(params, key)
            params, state = sg.apply(tx, grads, state, params)
            excess = sg.metrics(state)["layer_health_excess"]
            return (params, state), (loss, excess)

        keys = jax.random.split(stream, steps)
        return jax.lax.scan(step, (params, tx.init(params)), keys)[1]

    pairs = np.array([(seed, rate) for seed in seeds for rate in kind.rates])
    told = jax.jit(jax.vmap(run))(
        jnp.asarray(pairs[:, 0], jnp.int32), jnp.asarray(pairs[:, 1], jnp.float32)
    )
    losses, excess = jax.tree.map(np.asarray, told)
    return losses, excess
