"""The trust region in Flax NNX and Linen training, as its users write it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.training.train_state import TrainState

import stablegrad as sg

X = jax.random.normal(jax.random.key(0), (16, 3))
TX = sg.guard(optax.sgd(20.0), sg.trust_region())


class Model(nnx.Module):
    """With dropout and batch statistics, which a probe must not disturb."""

    def __init__(self, rngs):
        self.first = nnx.Linear(3, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.last = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x):
        x = self.dropout(nnx.relu(self.norm(self.first(x))))
        return self.last(x)


def loss_of(model, batch):
    return jnp.mean((model(batch) - batch[:, :1]) ** 2)


def as_the_error_says(model):
    """`value_fn` by the recipe of the message."""
    graphdef, _, rest = nnx.split(nnx.clone(model), nnx.Param, ...)
    return lambda p: loss_of(nnx.merge(graphdef, p, rest, copy=True), X)


def test_an_nnx_optimizer_is_held_with_batch_statistics_and_dropout():
    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        value_fn = as_the_error_says(model)
        loss, grads = nnx.value_and_grad(loss_of)(model, X)
        again = value_fn(nnx.state(model, nnx.Param))
        optimizer.update(model, grads, value=loss, value_fn=value_fn)
        return loss, again

    loss, again = step(model, optimizer)
    np.testing.assert_allclose(again, loss, rtol=1e-5)  # The same random numbers.
    assert model.dropout.rngs.count[...] == 1
    assert sg.metrics(optimizer)["trust_scale"] < 0.5
    for _ in range(40):
        loss, _ = step(model, optimizer)
    assert np.isfinite(loss) and sg.metrics(optimizer)["trust_probes"] < 41


@pytest.mark.slow
def test_a_linen_train_state_is_held_by_the_recipe_of_the_error():
    model = linen.Sequential([linen.Dense(8), linen.relu, linen.Dense(1)])
    params = model.init(jax.random.key(0), X)["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=TX)

    def loss_fn(params, batch):
        return jnp.mean((model.apply({"params": params}, batch) - batch[:, :1]) ** 2)

    @jax.jit
    def step(state, batch):
        loss, grads = jax.value_and_grad(loss_fn)(state.params, batch)
        updates, opt_state = state.tx.update(
            grads,
            state.opt_state,
            state.params,
            value=loss,
            value_fn=lambda p: loss_fn(p, batch),
        )
        params = optax.apply_updates(state.params, updates)
        return state.replace(params=params, opt_state=opt_state), loss

    losses = []
    for _ in range(60):
        state, loss = step(state, X)
        losses.append(float(loss))
    assert losses[-1] < 0.1 * losses[0]
    assert sg.metrics(state)["trust_scale"] < 0.2
