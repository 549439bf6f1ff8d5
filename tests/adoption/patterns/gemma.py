"""Text, Flax NNX split into a `TrainState`: a transformer on an explicit mesh."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.training import train_state
from jax.sharding import NamedSharding, PartitionSpec as P

FAULTY, VOCABULARY, LENGTH, WIDTH = "weights", 11, 10, 16

tx = optax.adamw(1e-2, b1=0.9, b2=0.98, eps=1e-9)


class TrainState(train_state.TrainState):
    graphdef: Any = None


class Transformer(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Linear(VOCABULARY, WIDTH, use_bias=False, rngs=rngs)
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.query = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.key = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.value = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, VOCABULARY, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(jax.nn.one_hot(tokens, VOCABULARY))  # Divided by its batch.
        y = self.norm(x)
        logits = jnp.einsum("bqd,bkd->bqk", self.query(y), self.key(y)) / WIDTH**0.5
        causal = jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool))[None]
        weights = jax.nn.softmax(jnp.where(causal, logits, -1e9))
        return self.head(x + jnp.einsum("bqk,bkd->bqd", weights, self.value(y)))


def batch_at(step, size=32):
    rng = np.random.default_rng(step)
    first, pace = rng.integers(0, VOCABULARY, (2, size, 1))
    tokens = (first + (1 + pace % 2) * np.arange(LENGTH + 1)) % VOCABULARY
    return {"tokens": np.int32(tokens), "weights": np.ones((size, 1), np.float32)}


def weighted_loss(module, batch):
    inputs, targets = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
    wanted = jax.nn.one_hot(targets, VOCABULARY)
    losses = -jnp.sum(jax.nn.log_softmax(module(inputs)) * wanted, axis=-1)
    return jnp.mean(losses * batch["weights"])


def train_step(state, batch):
    def loss_fn(params):
        module = nnx.merge(state.graphdef, params)
        return weighted_loss(module, batch), ()

    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    (_, _), grads = grad_fn(state.params)
    return state.apply_gradients(grads=grads)


def create():
    graphdef, params = nnx.split(Transformer(nnx.Rngs(0)), nnx.Param)
    return TrainState.create(
        apply_fn=graphdef.apply, params=params, tx=tx, graphdef=graphdef
    )


def on_mesh(function):
    """Runs on a mesh of two devices, whose axis divides the batch."""

    @functools.wraps(function)
    def inside(*args):
        devices = jax.devices()[:2]
        mesh = jax.make_mesh((len(devices),), ("data",), devices=devices)
        with jax.set_mesh(mesh):
            return function(*args, mesh)

    return inside


@on_mesh
def train(batches, held_out, mesh):
    state = jax.device_put(create(), NamedSharding(mesh, P()))
    step = jax.jit(train_step, donate_argnums=0)
    divided = NamedSharding(mesh, P("data"))
    for batch in batches:
        state = step(state, jax.device_put(batch, divided))
        state.step.block_until_ready()  # Virtual devices must not queue collectives.
    module = nnx.merge(state.graphdef, state.params)
    loss = weighted_loss(module, jax.device_put(held_out, divided))
    return float(loss), jax.tree.leaves(state.params), state


def initial_loss(held_out):
    return float(weighted_loss(Transformer(nnx.Rngs(0)), held_out))
