"""Flax Linen: a step of a `TrainState` that takes `value=`.

command:   pip install -e ".[flax]" && python examples/recipes/flax_linen.py
time:      ten seconds on two CPU cores, most of it compilation
expected:  loss below 0.05 after 300 steps, 1 of them skipped

Flax's own `apply_gradients` forwards no `value=`. And no optimizer can keep a bad batch
out of the batch statistics: a step that is skipped leaves them as they were, too.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.training import train_state

import stablegrad as sg
from stablegrad.integrations.linen import apply_gradients

BAD_STEP = 20


class TrainState(train_state.TrainState):
    """Flax's own, with batch statistics."""

    batch_stats: Any


class Model(nn.Module):
    """A network with batch normalisation."""

    @nn.compact
    def __call__(self, x, train: bool):
        """One number for each row of `x`."""
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(64)(x))
        return nn.Dense(1)(nn.tanh(x))


@jax.jit
def train_step(state, x):
    """One step on a batch."""

    def loss_fn(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        out, new = state.apply_fn(variables, x, train=True, mutable=["batch_stats"])
        return jnp.mean((out - jnp.sin(x[:, :1])) ** 2), new["batch_stats"]

    (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    fields = {"batch_stats": stats}
    return apply_gradients(state, grads=grads, value=loss, fields=fields), loss


def main(steps: int = 300) -> tuple[float, TrainState]:
    """Trains through one nan batch; returns the last loss and the state."""
    model, tx = Model(), sg.stabilize(optax.adam(0.01))
    variables = model.init(jax.random.key(0), jnp.ones((1, 4)), train=False)
    state = TrainState.create(apply_fn=model.apply, tx=tx, **variables)
    for step in range(steps):
        x = jax.random.normal(jax.random.key(step), (128, 4))
        state, loss = train_step(state, x * jnp.nan if step == BAD_STEP else x)
    sg.raise_if_halted(state)
    skipped = sg.metrics(state)["skipped_steps"]
    print(f"loss {loss:.4f}, {skipped} of {steps} steps skipped")
    print(*sg.events(state), sep="\n")
    return float(loss), state


if __name__ == "__main__":
    main()
