"""Images, Flax NNX: a small convolutional network with batch norm and `nnx.jit`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

FAULTY = "image"
tx = optax.adamw(3e-3)


class CNN(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 8, kernel_size=(3, 3), strides=2, rngs=rngs)
        self.norm = nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
        self.linear = nnx.Linear(8 * 16, 4, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x)))
        return self.linear(x.reshape(x.shape[0], -1))


def batch_at(step, size=32):
    rng = np.random.default_rng(step)
    label = rng.integers(0, 4, size)
    image = 0.5 * rng.standard_normal((size, 8, 8, 1))
    for row, kind in enumerate(label):
        corner = (kind // 2 * 4, kind % 2 * 4)
        image[row, corner[0] : corner[0] + 4, corner[1] : corner[1] + 4] += 1
    return {"image": np.float32(image), "label": np.int32(label)}


def loss_fn(model, batch):
    logits = model(batch["image"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    return losses.mean(), logits


@nnx.jit
def train_step(model, optimizer, batch):
    grad_fn = nnx.value_and_grad(loss_fn, has_aux=True)
    (loss, logits), grads = grad_fn(model, batch)
    optimizer.update(model, grads)


@nnx.jit
def eval_step(model, batch):
    return loss_fn(nnx.merge(*nnx.split(model)), batch)[0]


def train(batches, held_out):
    model = CNN(nnx.Rngs(0))
    model.train()
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for batch in batches:
        train_step(model, optimizer, batch)
    model.eval()
    trees = nnx.state(model, (nnx.Param, nnx.BatchStat))
    return float(eval_step(model, held_out)), jax.tree.leaves(trees), optimizer


def initial_loss(held_out):
    model = CNN(nnx.Rngs(0))
    model.eval()
    return float(jnp.mean(loss_fn(model, held_out)[0]))
