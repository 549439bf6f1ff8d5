"""The run that the faults hit: a small network on noisy data, in three precisions."""

import jax
import jax.numpy as jnp
import optax

STEPS = 2000  # Each optimizer has converged by then, so lost steps cost nothing.
JUDGED = 50  # Steps at the end over which the loss is averaged.
BATCH = 32
SCALE = 2.0**8  # Of the float16 loss.
DTYPES = ("float32", "bfloat16", "float16")
OPTIMIZERS = {
    "adam": lambda: optax.adam(0.01),
    "momentum": lambda: optax.sgd(0.03, momentum=0.9),
    "lion": lambda: optax.lion(0.003),
    "muon": lambda: optax.contrib.muon(0.01),
    "adafactor": lambda: optax.adafactor(0.1, min_dim_size_to_factor=2),
    "schedule-free": lambda: optax.contrib.schedule_free_adamw(0.02, warmup_steps=10),
}


def data():
    """Inputs, noisy targets, and the rows of each step's batch."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (512, 3))
    y = jnp.sin(x[:, :1]) - 0.5 * x[:, 1:2]
    y += 0.3 * jax.random.normal(keys[1], y.shape)
    return x, y, jax.random.randint(keys[2], (STEPS, BATCH), 0, len(x))


def start(dtype: str):
    """The parameters before the first step; with float16, in float32."""
    first, last = jax.random.split(jax.random.key(1))
    params = {
        "first": {
            "kernel": 0.6 * jax.random.normal(first, (3, 16)),
            "bias": jnp.zeros(16),
        },
        "last": {
            "kernel": 0.3 * jax.random.normal(last, (16, 1)),
            "bias": jnp.zeros(1),
        },
    }
    kept = jnp.bfloat16 if dtype == "bfloat16" else jnp.float32
    return jax.tree.map(lambda x: x.astype(kept), params)


def loss_fn(params, x, y):
    """Mean squared error, in the dtype of the parameters; the mean in float32."""
    dtype = params["first"]["bias"].dtype
    hidden = jnp.tanh(
        x.astype(dtype) @ params["first"]["kernel"] + params["first"]["bias"][None]
    )
    found = hidden @ params["last"]["kernel"] + params["last"]["bias"][None]
    return jnp.mean((found.astype(jnp.float32) - y) ** 2)


def value_and_grad(params, x, y, dtype: str, spoil):
    """Loss and gradient as they reach an optimizer; `spoil` hits the raw gradient."""
    if dtype != "float16":
        loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
        return loss, spoil(grads)
    narrow = jax.tree.map(lambda p: p.astype(jnp.float16), params)
    scaled = lambda params: SCALE * loss_fn(params, x, y)
    loss, grads = jax.value_and_grad(scaled)(narrow)
    wide = jax.tree.map(lambda g: g.astype(jnp.float32) / SCALE, spoil(grads))
    return loss / SCALE, wide
