"""What a model updates by itself in the forward pass, which no optimizer can undo."""

import contextlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.training import train_state

import stablegrad as sg
from stablegrad.integrations.linen import apply_gradients

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


def trained(keep):
    """A model after some steps, one of them on a nan batch."""
    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(
        model, sg.guard(optax.adam(0.1), sg.skip()), wrt=nnx.Param
    )

    @nnx.jit
    def step(model, optimizer, x):
        before = nnx.state(model, nnx.BatchStat)
        if keep != "an alias":
            before = jax.tree.map(lambda leaf: leaf, before)
        optimizer.update(model, nnx.grad(loss_fn)(model, x))
        if keep != "nothing":
            after = nnx.state(model, nnx.BatchStat)
            kept = sg.keep_if_skipped(optimizer.opt_state, before, after)
            nnx.update(model, kept)

    aliased = pytest.warns(UserWarning, match="the same arrays")
    with aliased if keep == "an alias" else contextlib.nullcontext():
        for x in X:
            step(model, optimizer, x)
    assert sg.metrics(optimizer)["skipped_steps"] == 1
    return model


@pytest.mark.slow
@pytest.mark.parametrize("keep", ["a copy", "an alias", "nothing"])
def test_batch_statistics_stay_finite_only_if_the_step_keeps_a_copy(keep):
    model = trained(keep)
    chex.assert_tree_all_finite(nnx.state(model, nnx.Param))
    statistics = jax.tree.leaves(nnx.state(model, nnx.BatchStat))
    whole = keep == "a copy"
    assert all(jnp.isfinite(x).all() == whole for x in statistics)
    model.eval()
    loss = loss_fn(model, X[0])
    assert (loss < 0.2) == whole


@pytest.mark.slow
def test_linens_batch_statistics_stay_as_they_were_when_a_step_is_skipped():
    class State(train_state.TrainState):
        batch_stats: dict

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(1)(linen.BatchNorm(use_running_average=False)(x))

    variables = Net().init(jax.random.key(0), X[0])
    tx = sg.stabilize(optax.adam(0.1))
    state = State.create(apply_fn=Net().apply, tx=tx, **variables)

    @jax.jit
    def step(state, x):
        def loss_fn(params):
            given = {"params": params, "batch_stats": state.batch_stats}
            out, new = state.apply_fn(given, x, mutable=["batch_stats"])
            return jnp.mean((out - x[:, :1]) ** 2), new["batch_stats"]

        (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        fields = {"batch_stats": stats}
        return apply_gradients(state, grads=grads, value=loss, fields=fields)

    good = step(state, X[0])
    bad = step(good, X[NAN_STEP])
    assert good.step == 1 and bad.step == 2
    assert sg.metrics(bad.opt_state)["skipped_steps"] == 1
    chex.assert_trees_all_equal(bad.params, good.params)
    chex.assert_trees_all_equal(bad.batch_stats, good.batch_stats)
    moved = lambda old, new: jnp.any(old != new)
    for name in ("params", "batch_stats"):
        changes = jax.tree.map(moved, getattr(state, name), getattr(good, name))
        assert all(jax.tree.leaves(changes))


@pytest.mark.slow
def test_what_a_step_changed_is_kept_if_any_guard_skipped_and_else_is_new():
    guarded = sg.guard(optax.sgd(0.1), sg.skip(sg.fixed(2.0)))
    tx = optax.chain(sg.guard(optax.identity(), sg.skip(sg.fixed(9.0))), guarded)
    params = jnp.zeros(1)
    old, new = {"count": jnp.int32(1)}, {"count": jnp.int32(2)}
    for grad, kept in ((1.0, 2), (5.0, 1), (90.0, 1)):
        _, state = tx.update(jnp.full(1, grad), tx.init(params), params)
        assert sg.keep_if_skipped(state, old, new)["count"] == kept
    for other in ({"n": new["count"]}, {"count": jnp.zeros(2, jnp.int32)}):
        with pytest.raises(ValueError, match="(?s)same pytree.*old: .*count.*new: "):
            sg.keep_if_skipped(state, old, other)
    with pytest.raises(ValueError, match="no guard in this optimizer state"):
        sg.keep_if_skipped(optax.sgd(0.1).init(params), old, new)


@pytest.mark.slow
def test_each_member_of_an_ensemble_keeps_its_own():
    tx, params = sg.guard(optax.sgd(0.1), sg.skip()), jnp.zeros((3, 1))
    grads = jnp.array([[1.0], [jnp.nan], [1.0]])
    state = jax.jit(jax.vmap(tx.init))(params)
    _, state = jax.jit(jax.vmap(tx.update))(grads, state, params)
    old, new = jnp.zeros((3, 2)), jnp.ones((3, 2))
    kept = sg.keep_if_skipped(state, old, new)
    assert kept.tolist() == [[1, 1], [0, 0], [1, 1]]


def test_health_looks_at_every_tree_that_is_given():
    state = sg.guard(optax.sgd(0.1)).init(jnp.zeros(1))
    good, bad = {"mean": jnp.zeros(2)}, {"mean": jnp.array([0.0, jnp.inf])}
    assert sg.is_healthy(state, good, good) and sg.is_healthy(state, params=good)
    assert not sg.is_healthy(state, good, bad)
    assert not sg.is_healthy(state, bad) and not sg.is_healthy(state, params=bad)


def test_variables_by_reference_are_warned_of_since_nothing_of_them_is_kept():
    tx = sg.guard(optax.sgd(0.1), sg.skip())
    params = jnp.ones(2)
    _, state = tx.update(jnp.full(2, jnp.nan), tx.init(params), params)
    layer = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    reference = nnx.state(layer, nnx.BatchStat)
    copied = jax.tree.map(lambda x: x, reference)
    layer(jnp.full((4, 3), jnp.nan))
    with pytest.warns(UserWarning, match="the same arrays"):
        lost = sg.keep_if_skipped(state, reference, nnx.state(layer, nnx.BatchStat))
    assert np.isnan(jax.tree.leaves(lost)[0]).all()
    kept = sg.keep_if_skipped(state, copied, nnx.state(layer, nnx.BatchStat))
    chex.assert_tree_all_finite(jax.tree.leaves(kept))


@pytest.mark.slow
@pytest.mark.parametrize("big", [3e19, 1e25])
def test_one_huge_element_leaves_no_statistic_that_is_not_finite(big):
    model = nnx.Sequential(
        nnx.BatchNorm(3, rngs=nnx.Rngs(0)), nnx.Linear(3, 1, rngs=nnx.Rngs(1))
    )
    optimizer = nnx.Optimizer(model, sg.stabilize(optax.adam(0.1)), wrt=nnx.Param)
    statistics = lambda: nnx.state(model, nnx.BatchStat)

    def step(x):
        old = jax.tree.map(lambda leaf: leaf, statistics())
        loss, grads = nnx.value_and_grad(loss_fn)(model, x)
        optimizer.update(model, grads, value=loss)
        nnx.update(model, sg.keep_if_skipped(optimizer, old, statistics()))

    for x in (X[0], X[1].at[0, 0].set(big)):
        step(x)
    assert sg.is_healthy(optimizer, nnx.state(model))


def test_an_element_that_breaks_is_kept_and_the_others_are_new():
    tx, params = sg.guard(optax.sgd(0.1)), jnp.ones(1)
    state = tx.init(params)
    old = {
        "a": jnp.array([1.0, 2.0, jnp.inf]),
        "n": jnp.int32(1),
        "k": jax.random.key(1),
    }
    new = {
        "a": jnp.array([9.0, jnp.nan, jnp.nan]),
        "n": jnp.int32(2),
        "k": jax.random.key(2),
    }
    for keep in (sg.keep_if_skipped, jax.jit(sg.keep_if_skipped)):
        kept = keep(state, old, new)
        np.testing.assert_array_equal(kept["a"], [9.0, 2.0, np.nan])
        assert kept["n"] == 2 and kept["k"] == new["k"]


class Fields(train_state.TrainState):
    """A train state with a field that no optimizer has."""

    batch_stats: dict


@pytest.mark.slow
def test_fields_given_by_name_are_kept_and_the_rest_reaches_the_optimizer():
    seen = []

    def update(updates, state, params=None, *, temperature, **extra):
        seen.append((temperature, extra))
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda params: (), update)
    state = Fields.create(
        apply_fn=None,
        params=jnp.ones(2),
        tx=sg.stabilize(inner),
        batch_stats={"mean": jnp.zeros(2)},
    )

    def step(state, grads):
        return apply_gradients(
            state,
            grads=grads,
            value=jnp.sum(grads),
            temperature=3.0,
            batch_stats={"mean": grads},
        )

    with jax.disable_jit():
        state = step(state, jnp.ones(2))
        assert state.batch_stats["mean"].tolist() == [1, 1]
        state = step(state, jnp.full(2, jnp.nan))
    assert state.batch_stats["mean"].tolist() == [1, 1]
    assert {temperature for temperature, _ in seen} == {3.0}
    assert all(extra.keys() == {"value"} for _, extra in seen)


@pytest.mark.slow
def test_scales_of_float8_are_overwritten_unless_the_step_is_skipped():
    model = linen.Dense(4, dot_general_cls=linen.fp8_ops.Fp8DirectDotGeneralOp)
    variables = model.init(jax.random.key(0), jnp.ones((8, 4)))
    tx = sg.guard(optax.sgd(0.01))
    state = train_state.TrainState.create(apply_fn=model.apply, params=variables, tx=tx)

    @jax.jit
    def step(state, x):
        loss_fn = lambda params: jnp.mean((model.apply(params, x) - 1) ** 2)
        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        theirs = state.apply_gradients(grads=grads)
        return apply_gradients(state, grads=grads, value=loss), theirs

    x = jax.random.normal(jax.random.key(1), (8, 4))
    good, theirs = step(state, x)
    chex.assert_trees_all_close(good.params, theirs.params, rtol=1e-6)
    bad, _ = step(good, x * jnp.nan)
    chex.assert_trees_all_equal(bad.params, good.params)
