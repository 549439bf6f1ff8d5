"""Equinox: a model whose leaves are not all arrays.

command:   pip install -e . && pip install equinox
           python examples/recipes/equinox_model.py
time:      ten seconds on two CPU cores, most of it compilation
expected:  loss below 0.02 after 300 steps, 1 of them skipped
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import stablegrad as sg

BAD_STEP = 20

tx = sg.stabilize(optax.adam(0.01))


class Model(eqx.Module):
    """Arrays to train; a function and integers are leaves all the same."""

    mlp: eqx.nn.MLP
    activation: Callable
    columns: jax.Array  # Integers: which inputs to use.

    def __init__(self, key):
        """Weights from `key`."""
        self.mlp = eqx.nn.MLP(2, 1, 32, 2, activation=jax.nn.tanh, key=key)
        self.activation = jnp.asinh
        self.columns = jnp.array([0, 1])

    def __call__(self, x):
        """One number for one input, shape (4,)."""
        return self.activation(self.mlp(x[self.columns]))


@eqx.filter_jit
def train_step(model, state, x):
    """One step: only the trained part of the model goes through the optimizer."""
    params, rest = eqx.partition(model, eqx.is_inexact_array)

    def loss_fn(params):
        out = jax.vmap(eqx.combine(params, rest))(x)
        return jnp.mean((out - jnp.asinh(x[:, :1] * x[:, 1:2])) ** 2)

    loss, grads = jax.value_and_grad(loss_fn)(params)
    params, state = sg.apply(tx, grads, state, params, value=loss)
    return eqx.combine(params, rest), state, loss


def main(steps: int = 300) -> tuple[float, tuple]:
    """Trains through one nan batch; returns the last loss, and model and state."""
    model = Model(jax.random.key(0))
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))
    for step in range(steps):
        x = jax.random.normal(jax.random.key(step), (128, 4))
        x = x * jnp.nan if step == BAD_STEP else x
        model, state, loss = train_step(model, state, x)
    sg.raise_if_halted(state)
    skipped = sg.metrics(state)["skipped_steps"]
    print(f"loss {loss:.4f}, {skipped} of {steps} steps skipped")
    print(*sg.events(state), sep="\n")
    return float(loss), (model, state)


if __name__ == "__main__":
    main()
