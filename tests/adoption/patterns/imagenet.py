"""Images, Flax Linen: a residual network, a `TrainState` with batch statistics."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.training import train_state

FAULTY = "image"
rate = optax.cosine_decay_schedule(0.1, 100)
tx = optax.sgd(rate, momentum=0.9, nesterov=True)


class TrainState(train_state.TrainState):
    batch_stats: Any


class ResNet(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        norm = functools.partial(
            nn.BatchNorm, use_running_average=not train, momentum=0.9
        )
        x = nn.Conv(8, (3, 3), strides=2, use_bias=False)(x)
        shortcut = x
        x = nn.relu(norm()(x))
        x = nn.Conv(8, (3, 3), use_bias=False)(x)
        x = nn.relu(norm(scale_init=nn.initializers.zeros)(x)) + shortcut
        return nn.Dense(4)(x.mean(axis=(1, 2)))


def batch_at(step, size=32):
    rng = np.random.default_rng(step)
    label = rng.integers(0, 4, size)
    image = 0.5 * rng.standard_normal((size, 8, 8, 3))
    image[..., 0] += (label % 2)[:, None, None]
    image[:, :, ::2, 1] += 2 * (label // 2)[:, None, None]
    return {"image": np.float32(image), "label": np.int32(label)}


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


model = ResNet()


@jax.jit
def train_step(state, batch):
    def loss_fn(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, new = state.apply_fn(variables, batch["image"], mutable=["batch_stats"])
        decay = sum(jnp.sum(p**2) for p in jax.tree.leaves(params) if p.ndim > 1)
        return cross_entropy(logits, batch["label"]) + 5e-5 * decay, new

    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, new), grads = grad_fn(state.params)
    return state.apply_gradients(grads=grads, batch_stats=new["batch_stats"])


@jax.jit
def eval_step(state, batch):
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    logits = state.apply_fn(variables, batch["image"], train=False)
    return cross_entropy(logits, batch["label"])


def create():
    variables = model.init(jax.random.key(0), jnp.ones((1, 8, 8, 3)), train=False)
    return TrainState.create(apply_fn=model.apply, tx=tx, **variables)


def train(batches, held_out):
    state = create()
    for batch in batches:
        state = train_step(state, batch)
    trees = jax.tree.leaves((state.params, state.batch_stats))
    return float(eval_step(state, held_out)), trees, state


def initial_loss(held_out):
    return float(eval_step(create(), held_out))
