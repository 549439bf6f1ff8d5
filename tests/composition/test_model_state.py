"""What a model updates by itself in the forward pass, which no optimizer can undo."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import stablegrad as sg

STEPS, NAN_STEP = 30, 10
X = jax.random.normal(jax.random.key(0), (STEPS, 16, 3)).at[NAN_STEP].set(jnp.nan)


class Model(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(3, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, momentum=0.8, rngs=rngs)
        self.last = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.tanh(self.norm(self.first(x))))


def loss_fn(model, x):
    return jnp.mean((model(x) - x[:, :1]) ** 2)


def trained(keep_statistics):
    """A model after some steps, one of them on a nan batch."""
    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(
        model, sg.guard(optax.adam(0.1), sg.skip()), wrt=nnx.Param
    )

    @nnx.jit
    def step(model, optimizer, x):
        before = nnx.state(nnx.clone(model), nnx.BatchStat)
        optimizer.update(model, nnx.grad(loss_fn)(model, x))
        if keep_statistics:
            skipped = sg.metrics(optimizer)["skipped"]
            after = nnx.state(model, nnx.BatchStat)
            nnx.update(model, optax.tree.where(skipped, before, after))

    for x in X:
        step(model, optimizer, x)
    assert sg.metrics(optimizer)["skipped_steps"] == 1
    return model


@pytest.mark.slow
@pytest.mark.parametrize("keep_statistics", [True, False])
def test_batch_statistics_stay_finite_only_if_the_step_keeps_them(keep_statistics):
    model = trained(keep_statistics)
    chex.assert_tree_all_finite(nnx.state(model, nnx.Param))
    statistics = jax.tree.leaves(nnx.state(model, nnx.BatchStat))
    assert all(jnp.isfinite(x).all() == keep_statistics for x in statistics)
    model.eval()
    loss = loss_fn(model, X[0])
    assert (loss < 0.2) == keep_statistics
