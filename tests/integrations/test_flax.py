"""Guards in Flax NNX and Linen training, as their users write it."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx, serialization
from flax.training.train_state import TrainState

import stablegrad as sg
from stablegrad.integrations.nnx import update as nnx_update


class Model(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List(
            [nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 1, rngs=rngs)]
        )

    def __call__(self, x):
        return self.layers[1](nnx.relu(self.layers[0](x)))


def loss_of(model, x):
    return jnp.mean((model(x) - 1.0) ** 2)


@pytest.mark.slow
def test_nnx_trains_through_bad_batches_in_one_program_and_says_so():
    model = Model(nnx.Rngs(0))
    tx = optax.chain(sg.stabilize(optax.adam(0.05)), optax.identity())
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    @chex.assert_max_traces(n=1)
    def train_step(model, optimizer, x):
        loss, grads = nnx.value_and_grad(loss_of)(model, x)
        optimizer.update(model, grads, value=loss)
        return loss, sg.metrics(optimizer.opt_state)

    x = jax.random.normal(jax.random.key(0), (16, 3))
    bad = {21: x.at[0, 0].set(jnp.nan), 31: 1e20 * x}
    losses = []
    for step in range(42):
        loss, inside = train_step(model, optimizer, bad.get(step, x))
        losses.append(loss)
    assert losses[-1] < 0.2 * losses[0]
    for seen in (inside, sg.metrics(optimizer.opt_state), sg.metrics(optimizer)):
        assert seen["skipped_steps"] == 2 and seen["guarded_steps"] == 42
        chex.assert_rank(list(seen.values()), 0)
    event, other = sg.events(optimizer.opt_state)
    assert (event.step, event.leaf) == (21, "layers.0.kernel")
    assert other.step == 31
    assert sg.is_healthy(optimizer.opt_state, nnx.state(model))
    sg.raise_if_halted(optimizer.opt_state)


def test_a_missing_value_in_nnx_shows_the_nnx_way():
    model = Model(nnx.Rngs(0))
    tx = sg.guard(optax.sgd(0.1), sg.skip(sg.fixed(1.0, of="value")))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    grads = nnx.state(model, nnx.Param)
    with pytest.raises(
        ValueError, match=r"optimizer.update\(model, grads, value=loss\)"
    ):
        optimizer.update(model, grads)


def linen_training(tx):
    model = linen.Dense(1)
    params = model.init(jax.random.key(0), jnp.ones((1, 3)))["params"]
    return TrainState.create(apply_fn=model.apply, params=params, tx=tx)


def test_linen_train_state_steps_with_a_value():
    train_state = linen_training(sg.guard(optax.adam(0.1), sg.skip()))

    @jax.jit
    def step(train_state, x):
        def loss_fn(params):
            return jnp.mean((train_state.apply_fn({"params": params}, x) - 1.0) ** 2)

        loss, grads = jax.value_and_grad(loss_fn)(train_state.params)
        params, opt_state = sg.apply(
            train_state.tx, grads, train_state.opt_state, train_state.params, value=loss
        )
        return train_state.replace(
            step=train_state.step + 1, params=params, opt_state=opt_state
        )

    x = jax.random.normal(jax.random.key(1), (8, 3))
    for bad in (1.0, jnp.nan, 1.0):
        train_state = step(train_state, x * bad)
    seen = sg.metrics(train_state)
    assert seen["skipped_steps"] == 1 and seen["guarded_steps"] == 3
    assert sg.events(train_state)[0].leaf == "bias"


@pytest.mark.slow
def test_linens_own_apply_gradients_works_and_is_warned_of():
    train_state = linen_training(sg.stabilize(optax.adam(0.1)))
    with pytest.warns(UserWarning, match="`TrainState.apply_gradients` does not"):
        after = train_state.apply_gradients(grads=train_state.params)
    assert sg.metrics(after.opt_state)["guarded_steps"] == 1


@pytest.mark.slow
def test_flax_serialization_restores_a_guard():
    tx = sg.guard(optax.adam(0.1), sg.skip())
    params = {"w": jnp.array([1.0, 2.0])}
    _, state = tx.update(params, tx.init(params), params, value=3.0)
    data = serialization.to_bytes(state)
    restored = serialization.from_bytes(tx.init(params), data)
    chex.assert_trees_all_equal(restored, state)
    np.testing.assert_array_equal(sg.metrics(restored)["loss_value"], 3.0)


class Attending(nnx.Module):
    """Embedding, attention, convolution and a head: every layout of a unit."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.conv = nnx.Conv(8, 4, (3,), rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, tokens):
        x = self.attention(self.embed(tokens))
        return self.head(self.conv(x).mean(axis=1))


@pytest.mark.slow
@pytest.mark.parametrize("guarded", [False, True])
def test_units_of_a_whole_nnx_model_are_clipped_one_by_one(guarded):
    model = Attending(nnx.Rngs(0))
    if guarded:
        rule = sg.param_ratio(1e-3, per=sg.units(exclude="head"))
        tx = sg.guard(optax.sgd(1.0), sg.clip(rule))
    else:
        clip = sg.clip_by_param_norm(1e-3, exclude="head")
        tx = optax.chain(clip, optax.sgd(1.0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    tokens = jnp.arange(22).reshape(2, 11) % 11

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda m: 10 * jnp.sum(m(tokens) ** 2))(model)
        optimizer.update(model, grads)
        return grads

    before = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    grads = nnx.to_pure_dict(step(model, optimizer))
    after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    moved = jax.tree.map(lambda new, old: new - old, after, before)
    np.testing.assert_allclose(
        moved["head"]["kernel"], -grads["head"]["kernel"], rtol=1e-3, atol=1e-5
    )
    for path, axes in {
        ("embed", "embedding"): (1,),
        ("attention", "query", "kernel"): (0,),
        ("attention", "out", "kernel"): (0, 1),
        ("conv", "kernel"): (0, 1),
    }.items():
        step_taken, weights = moved, before
        for key in path:
            step_taken, weights = step_taken[key], weights[key]
        size = np.sqrt(np.sum(np.square(step_taken), axis=axes))
        limit = 1e-3 * np.maximum(np.sqrt(np.sum(weights**2, axis=axes)), 1.0)
        assert (size <= limit * 1.01).all() and (size > 0.99 * limit).any(), path
    seen = sg.metrics(optimizer.opt_state)
    key = "clip_scale" if guarded else "clip_by_param_norm_scale"
    assert 0 < seen[key] < 0.5


class Held(nnx.Module):
    """A parameter that holds a pytree, and a variable that holds nothing yet."""

    def __init__(self):
        self.w = nnx.Param({"k": jnp.ones((3, 1)), "b": jnp.zeros(1)})
        self.cache = nnx.Variable(None)

    def __call__(self, x):
        return x @ self.w["k"] + self.w["b"][None]


@pytest.mark.slow
def test_variables_of_pytrees_and_of_nothing_train_and_are_named():
    model = Held()
    optimizer = nnx.Optimizer(model, sg.guard(optax.sgd(0.1)), wrt=nnx.Param)
    for x in (jnp.zeros((4, 3)), jnp.full((4, 3), jnp.nan)):
        loss, grads = nnx.value_and_grad(loss_of, argnums=nnx.DiffState(0, nnx.Param))(
            model, x
        )
        optimizer.update(model, grads, value=loss)
    np.testing.assert_allclose(model.w["b"], 0.2)
    assert sg.metrics((model, optimizer))["skipped_steps"] == 1
    sg.raise_if_halted((model, optimizer))
    assert sg.events(optimizer)[0].leaf == "w.b"


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(nnx, "set_graph_mode"), reason="graphs alone")
def test_update_of_a_model_with_shared_layers_follows_the_optimizers_graph():
    model = nnx.Sequential(layer := nnx.Linear(3, 3, rngs=nnx.Rngs(0)), layer)
    tx = sg.guard(optax.sgd(0.1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param, graph=True)
    grads = nnx.grad(loss_of, graph=True)(model, jnp.ones((4, 3)))
    with nnx.set_graph_mode(False):
        nnx_update(optimizer, model, grads)
    assert sg.metrics(optimizer)["guarded_steps"] == 1
