"""Sequences, Flax Linen: an LSTM reads a number, another writes it backwards."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.training import train_state

FAULTY, LENGTH, DIGITS = "query", 3, 6


class Seq2seq(nn.Module):
    @nn.compact
    def __call__(self, query, answer):
        encoder = nn.RNN(nn.LSTMCell(24), return_carry=True)
        carry, _ = encoder(query)
        start = jnp.zeros_like(answer[:, :1])
        shifted = jnp.concatenate([start, answer[:, :-1]], axis=1)  # Teacher forcing.
        return nn.Dense(DIGITS)(nn.RNN(nn.LSTMCell(24))(shifted, initial_carry=carry))


def batch_at(step, size=32):
    digits = np.random.default_rng(step).integers(0, DIGITS, (size, LENGTH))
    one_hot = np.eye(DIGITS, dtype=np.float32)[digits]
    return {"query": one_hot, "answer": one_hot[:, ::-1]}


def cross_entropy_loss(logits, answer):
    return -jnp.mean(jnp.sum(nn.log_softmax(logits) * answer, axis=-1))


model, tx = Seq2seq(), optax.adam(1e-2)


@jax.jit
def train_step(state, batch):
    def loss_fn(params):
        logits = state.apply_fn({"params": params}, batch["query"], batch["answer"])
        return cross_entropy_loss(logits, batch["answer"]), logits

    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, logits), grads = grad_fn(state.params)
    return state.apply_gradients(grads=grads)


@jax.jit
def eval_step(state, batch):
    logits = state.apply_fn({"params": state.params}, batch["query"], batch["answer"])
    return cross_entropy_loss(logits, batch["answer"])


def create():
    batch = batch_at(0, size=1)
    params = model.init(jax.random.key(0), batch["query"], batch["answer"])["params"]
    return train_state.TrainState.create(apply_fn=model.apply, params=params, tx=tx)


def train(batches, held_out):
    state = create()
    for batch in batches:
        state = train_step(state, batch)
    return float(eval_step(state, held_out)), jax.tree.leaves(state.params), state


def initial_loss(held_out):
    return float(eval_step(create(), held_out))
