"""From a bare optimizer's state to a guarded one, and back."""

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen, nnx
from flax.training.train_state import TrainState
from helpers.marking import core

import stablegrad as sg

X = jax.random.normal(jax.random.key(0), (8, 3))
OPTIMIZERS = {
    "adamw": lambda: optax.adamw(optax.linear_schedule(0.1, 0.0, 50)),
    "injected": lambda: optax.inject_hyperparams(optax.adamw)(0.1),
    "labels": lambda: optax.partition(
        {"a": optax.adam(0.1), "b": optax.sgd(0.1, 0.9)}, {"w": "a", "b": "b"}
    ),
}


def loss_fn(params, x=X):
    return jnp.mean((x @ params["w"] + params["b"][None] - 1) ** 2)


def trained(tx, steps=5):
    """Parameters and state of a bare run after some steps."""
    params = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}
    state, step = tx.init(params), stepper(tx)
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def stepper(tx):
    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(loss_fn)(params)
        return sg.apply(tx, grads, state, params, value=loss)

    return step


@pytest.mark.slow
@pytest.mark.parametrize("name", core(OPTIMIZERS, "adamw"))
def test_an_adopted_run_goes_on_bit_for_bit(name):
    bare = OPTIMIZERS[name]()
    params, inner = trained(bare)
    tx = sg.guard(OPTIMIZERS[name](), sg.skip(), sg.roll_back())
    state = sg.adopt(tx, params, inner, step=5)
    chex.assert_trees_all_equal(sg.unwrap(state), inner)
    step, guarded_step, found = stepper(bare), stepper(tx), params
    for _ in range(10):
        params, inner = step(params, inner)
        found, state = guarded_step(found, state)
        chex.assert_trees_all_equal((found, sg.unwrap(state)), (params, inner))
    assert sg.metrics(state)["guarded_steps"] == 15


@pytest.mark.slow
def test_the_adopted_state_is_one_from_init_but_for_its_arrays():
    params, inner = trained(optax.adamw(0.1))
    tx = sg.stabilize(optax.adamw(0.1), sg.roll_back())
    state = sg.adopt(tx, params, inner)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(params))
    newest = state.snapshots[0]
    chex.assert_trees_all_equal(*map(jax.tree.leaves, (newest.guarded_inner, inner)))
    chex.assert_trees_all_equal(newest.params, params)
    jax.jit(lambda s: s, donate_argnums=0)(state.snapshots)  # With their own buffers:
    chex.assert_tree_all_finite((params, inner))
    [leaf.block_until_ready() for leaf in jax.tree.leaves((params, inner))]


def test_before_its_first_step_an_adopted_state_tells_nothing_of_one():
    params, inner = trained(optax.sgd(0.1))
    tx = sg.guard(optax.sgd(0.1), sg.clip(sg.rarity()), record_norms=4)
    state = sg.adopt(tx, params, inner, step=1000)
    told = sg.metrics(state)
    assert np.isnan(told["loss_value"]) and told["guarded_steps"] == 1000
    assert np.isposinf(told["clip_rarity_grad_norm_limit"])
    assert sg.history(state).steps.tolist() == []
    for loss in (3.0, 2.0):
        _, state = tx.update(params, state, params, value=loss)
    assert sg.history(state).steps.tolist() == [1000, 1001]
    assert sg.history(state).loss_value.tolist() == [3.0, 2.0]


@pytest.mark.slow
def test_events_count_on_from_the_step():
    params, inner = trained(optax.sgd(0.1))
    tx = sg.guard(optax.sgd(0.1), sg.skip())
    state = sg.adopt(tx, params, inner, step=1000)
    bad = jax.tree.map(lambda p: p * jnp.nan, params)
    _, state = tx.update(bad, state, params)
    assert [event.step for event in sg.events(state)] == [1000]


@pytest.mark.parametrize(
    "given, said",
    [
        (lambda p: optax.sgd(0.1, 0.9).init(p), "missing: 0.count, .*unexpected"),
        (lambda p: optax.adamw(0.1).init({"w": p["w"]}), "missing: 0.mu.b, 0.nu.b"),
        (lambda p: optax.adamw(0.1).init({**p, "b": jnp.ones(3)}), "0.mu.b as float32"),
    ],
)
def test_a_foreign_state_is_an_error_that_names_the_leaves(given, said):
    params, _ = trained(optax.sgd(0.1), steps=0)
    with pytest.raises(ValueError, match=said):
        sg.adopt(sg.stabilize(optax.adamw(0.1)), params, given(params))


def test_names_that_join_to_the_same_text_are_told_apart():
    params = {"a.b": jnp.ones(2), "a": {"b": jnp.ones(3)}}
    inner = optax.adam(0.1).init(params)
    adopted = sg.adopt(sg.stabilize(optax.adam(0.1)), params, inner)
    chex.assert_trees_all_equal(sg.unwrap(adopted), inner)


def test_widened_moments_are_an_error_that_names_the_cure():
    params = {"w": jnp.ones(2, jnp.bfloat16)}
    wide = optax.adam(0.1, mu_dtype=jnp.float32)
    with pytest.raises(ValueError, match="mu_dtype="):
        sg.adopt(sg.stabilize(optax.adam(0.1)), params, wide.init(params))
    sg.adopt(sg.stabilize(wide), params, wide.init(params))


def test_poisoned_parameters_are_not_adopted():
    params, inner = trained(optax.sgd(0.1))
    params["b"] = params["b"].at[1].set(jnp.nan)
    with pytest.raises(ValueError, match="not finite: leaf b"):
        sg.adopt(sg.stabilize(optax.sgd(0.1)), params, inner)


def test_a_bare_optimizer_can_adopt_nothing():
    params, inner = trained(optax.sgd(0.1))
    with pytest.raises(ValueError, match="`tx` has no guard in it"):
        sg.adopt(optax.sgd(0.1), params, inner)


class NNX(nnx.Module):
    def __init__(self):
        self.layers = nnx.List([nnx.Linear(3, 2, rngs=nnx.Rngs(0))])

    def __call__(self, x):
        return self.layers[0](x)


def saved(tmp_path, tree, target):
    """What Orbax gives back, with a target or without one."""
    path = tmp_path / "state"
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)
        checkpointer.wait_until_finished()
        if target is None:
            return checkpointer.restore(path)
        return checkpointer.restore(
            path, jax.tree.map(ocp.utils.to_shape_dtype_struct, target)
        )


@pytest.mark.slow
@pytest.mark.parametrize("targeted", [True, False])
def test_a_checkpoint_of_bare_adamw_under_nnx_is_adopted(tmp_path, targeted):
    model, tx = NNX(), sg.stabilize(optax.adamw(0.1))
    bare = nnx.Optimizer(model, optax.adamw(0.1), wrt=nnx.Param)

    def step(optimizer, model, **extra):
        loss_fn = lambda model: jnp.mean((model(X) - 1) ** 2)
        loss, grads = nnx.value_and_grad(loss_fn)(model)
        optimizer.update(model, grads, **(extra and {"value": loss}))

    for _ in range(3):
        step(bare, model)
    tree = nnx.state(bare)
    found = saved(tmp_path, tree, tree if targeted else None)["opt_state"]
    guarded = nnx.Optimizer(model, tx, wrt=nnx.Param)
    state = sg.adopt(tx, nnx.state(model, nnx.Param), found, step=3)
    nnx.update(guarded.opt_state, nnx.state(state))
    twin = nnx.clone(model)
    step(bare, twin)
    step(guarded, model, value=True)
    pairs = zip(
        jax.tree.leaves(nnx.state(model)), jax.tree.leaves(nnx.state(twin)), strict=True
    )
    for one, other in pairs:
        np.testing.assert_allclose(one, other, rtol=1e-6)
    assert sg.metrics(guarded.opt_state)["guarded_steps"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("targeted", [True, False])
def test_a_checkpoint_of_bare_adamw_under_linen_is_adopted(tmp_path, targeted):
    model = linen.Dense(2)
    params = model.init(jax.random.key(0), X)
    bare = TrainState.create(apply_fn=model.apply, params=params, tx=optax.adamw(0.1))
    grad_fn = jax.grad(lambda p: jnp.mean((model.apply(p, X) - 1) ** 2))
    for _ in range(3):
        bare = bare.apply_gradients(grads=grad_fn(bare.params))
    found = saved(tmp_path, bare, bare if targeted else None)
    opt_state = found.opt_state if targeted else found["opt_state"]
    tx = sg.guard(optax.adamw(0.1), sg.skip())
    state = bare.replace(tx=tx, opt_state=sg.adopt(tx, bare.params, opt_state, step=3))
    chex.assert_trees_all_equal(sg.unwrap(state.opt_state), bare.opt_state)
    grads = grad_fn(bare.params)
    one, other = state.apply_gradients(grads=grads), bare.apply_gradients(grads=grads)
    chex.assert_trees_all_close(one.params, other.params, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("targeted", [True, False])
def test_a_checkpoint_of_bare_adamw_under_equinox_is_adopted(tmp_path, targeted):
    model = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    bare = optax.adamw(0.1)
    inner = bare.init(params)

    @eqx.filter_grad
    def grad_fn(params):
        return jnp.mean((jax.vmap(eqx.combine(params, static))(X) - 1) ** 2)

    for _ in range(3):
        updates, inner = bare.update(grad_fn(params), inner, params)
        params = eqx.apply_updates(params, updates)
    found = saved(tmp_path, inner, inner if targeted else None)
    tx = sg.guard(optax.adamw(0.1), sg.skip())
    state = sg.adopt(tx, params, found, step=3)
    chex.assert_trees_all_equal(sg.unwrap(state), inner)
    expected, _ = bare.update(grad_fn(params), inner, params)
    updates, _ = tx.update(grad_fn(params), state, params)
    chex.assert_trees_all_close(updates, expected, rtol=1e-6)


@pytest.mark.slow
def test_a_guarded_checkpoint_goes_back_to_a_bare_optimizer(tmp_path):
    params, inner = trained(sg.stabilize(optax.adamw(0.1)))
    found = saved(tmp_path, sg.unwrap(inner), sg.unwrap(inner))
    bare = optax.adamw(0.1)
    chex.assert_trees_all_equal_structs(found, bare.init(params))
    stepper(bare)(params, found)


class Attention(nnx.Module):
    """Parameters named as what NNX calls the array of a variable."""

    def __init__(self):
        """Two parameters."""
        self.query = nnx.Param(jnp.ones(2))
        self.value = nnx.Param(jnp.ones(2))


def test_a_parameter_may_be_named_value():
    model, adam = Attention(), optax.adam(1e-3)
    params = nnx.state(model, nnx.Param)
    bare = nnx.Optimizer(model, adam, wrt=nnx.Param)
    state = sg.adopt(sg.stabilize(adam), params, bare)
    assert sg.metrics(state)["guarded_steps"] == 0
    rolling = sg.stabilize(adam, sg.roll_back())
    sg.migrate(rolling, params, nnx.Optimizer(model, sg.stabilize(adam), wrt=nnx.Param))


def test_the_state_of_a_guard_is_sent_to_migrate():
    tx, params = sg.stabilize(optax.adam(0.1)), {"w": jnp.ones(2)}
    with pytest.warns(UserWarning, match="`stablegrad.migrate"):
        sg.adopt(tx, params, tx.init(params))
