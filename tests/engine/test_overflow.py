"""Steps that overflow in the optimizer, in parameters of a size as in practice."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.marking import core
from helpers.training import scan

import stablegrad as sg

STEPS = 20
BAD_STEP = 7
SHAPES = {"b": (8,), "w": (8256, 8)}  # More than 2**16 elements.
LARGEST = float(np.finfo(np.float32).max)


def params_of(seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.standard_normal(shape), dtype)
        for name, shape in SHAPES.items()
    }


def gradients(value=None, dtype=jnp.float32):
    """Healthy gradients of slowly varying size, one element of one of them replaced."""
    rng = np.random.default_rng(0)
    size = 1 + np.sin(np.arange(STEPS)) ** 2
    grads = {
        name: rng.standard_normal((STEPS, *shape)) * size.reshape(-1, *[1] * len(shape))
        for name, shape in SHAPES.items()
    }
    if value is not None:
        grads["w"][BAD_STEP, 3, 4] = value
    return {name: jnp.asarray(leaf, dtype) for name, leaf in grads.items()}


OPTIMIZERS = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": optax.adam(1e-3),
    "adamw": optax.adamw(optax.cosine_decay_schedule(1e-3, 100)),
    "adamw with bfloat16 moments": optax.adamw(1e-3, mu_dtype=jnp.bfloat16),
    "amsgrad": optax.amsgrad(1e-3),
    "nadamw": optax.nadamw(1e-3),
    "lion": optax.lion(1e-3),
    "rmsprop": optax.rmsprop(1e-3),
    "adagrad": optax.adagrad(0.1),
    "injected": optax.inject_hyperparams(optax.adamw)(1e-3),
    "masked": optax.masked(optax.adam(1e-3), {"b": False, "w": True}),
    "accumulating": optax.MultiSteps(optax.adam(1e-3), 4),
    "muon": optax.contrib.muon(1e-3),
    "noise": optax.add_noise(0.1, 0.5, jax.random.key(0)),
}


def stepper(tx):
    """Guarded steps from one state, a gradient at a time: what each of them leaves."""

    @jax.jit
    def run(params, state, sizes):
        def step(carry, size):
            params, state = carry
            grads = jax.tree.map(lambda x: size * jnp.cos(x), params)
            params, state = sg.apply(tx, grads, state, params)
            return (params, state), sg.metrics(state)["skipped"]

        return jax.lax.scan(step, (params, state), sizes)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_healthy_steps_of_every_size_are_taken(name):
    tx, params = sg.guard(OPTIMIZERS[name], sg.skip()), params_of()
    sizes = 10.0 ** (jnp.arange(12) % 5 - 2)
    (after, _), skipped = stepper(tx)(params, tx.init(params), sizes)
    assert not skipped.any()
    chex.assert_tree_all_finite(after)
    assert (after["w"] != params["w"]).mean() > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("name", core(["sgd", "adam", "rmsprop", "adagrad"], "adam"))
def test_a_gradient_is_rejected_from_a_norm_of_1e18_and_no_step_breaks_anything(name):
    inner = OPTIMIZERS[name]
    tx, params = sg.guard(inner, sg.skip()), params_of()
    direction = jax.tree.map(lambda x: jnp.clip(x, -1, 1), params_of(1))
    direction = optax.tree.scale(1 / optax.tree.norm(direction), direction)
    finite = lambda tree: jnp.all(
        jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)])
    )

    def taken(size):
        grads = jax.tree.map(lambda x: size * x, direction)
        new, state = sg.apply(tx, grads, tx.init(params), params)
        seen = sg.metrics(state)
        same = [jnp.all(new[name] == params[name]) for name in params]
        whole = finite((new, state.guarded_inner))
        return seen["skip_reason"], seen["kept_out_elements"], all_of(same), whole

    all_of = lambda flags: jnp.all(jnp.stack(flags))
    sizes = jnp.array([1e5, 1e15, 0.9e18, 1.1e18, 1e20, 1e30, 3e38])
    reasons, kept_out, same, whole = jax.jit(lambda x: jax.lax.map(taken, x))(sizes)
    assert whole.all() and not kept_out.any()
    rejected = sizes > 1e18
    np.testing.assert_array_equal(reasons, rejected * sg.Reason.GRADIENT_OVERFLOW)
    np.testing.assert_array_equal(same, rejected)


ADAMW = sg.guard(optax.adamw(0.05), sg.skip())


def run(tx, value, *, dtype=jnp.float32, start=None):
    """The parameters, state and metrics of a run with one element replaced."""
    params = start or params_of(dtype=dtype)
    params, state, (_, seen, _) = scan(tx, gradients(value, dtype), params, apply=True)
    chex.assert_tree_all_finite((params, state.guarded_inner))
    return params, state, seen


def assert_one_rejected(params, state, seen, reason):
    expected = [step == BAD_STEP for step in range(STEPS)]
    assert seen["skipped"].tolist() == expected
    (event,) = sg.events(state, params)
    assert (event.step, event.reason) == (BAD_STEP, reason)
    return event


@pytest.mark.slow
@pytest.mark.parametrize("value", [1e15, 1e17, 0.9e18])
def test_a_huge_gradient_that_the_optimizer_bears_is_taken(value):
    assert run(ADAMW, value)[2]["skipped_steps"][-1] == 0


@pytest.mark.parametrize("value", [1.1e18, 1e20, 1e30, 3e38])
def test_a_gradient_that_overflows_is_rejected_and_the_next_step_taken(value):
    event = assert_one_rejected(*run(ADAMW, value), "gradient_overflow")
    assert event.leaf == "w" and event.grad_norm >= 1e18


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_rejected_step_leaves_parameters_and_state_bit_for_bit(bad):
    params = params_of()
    _, state, (every, _, inner) = scan(ADAMW, gradients(bad), params, apply=True)
    at = lambda step: jax.tree.map(lambda x: x[step], (every, inner))
    chex.assert_trees_all_equal(at(BAD_STEP), at(BAD_STEP - 1))
    (event,) = sg.events(state, params)
    reason = "nonfinite_gradient" if np.isnan(bad) else "gradient_overflow"
    assert (event.reason, event.leaf) == (reason, "w")
    np.testing.assert_equal(event.grad_norm, abs(bad))


def assert_one_kept_out(params, state, seen):
    expected = [int(step == BAD_STEP) for step in range(STEPS)]
    assert seen["kept_out_elements"].tolist() == expected
    assert seen["kept_out_steps"][-1] == 1 and not seen["skipped"].any()
    (event,) = sg.events(state, params)
    assert (event.step, event.until, event.kind) == (BAD_STEP, BAD_STEP, "keep_out")
    assert (event.reason, event.leaf) == ("", "w")


@pytest.mark.slow
def test_an_element_of_an_update_that_overflows_is_kept_out():
    tx = sg.guard(optax.sgd(1e25), sg.skip())
    assert_one_kept_out(*run(tx, 1e17))


@pytest.mark.slow
def test_an_element_of_the_parameters_that_would_overflow_is_kept():
    tx = sg.guard(optax.sgd(5e20), sg.skip())
    start = {name: jnp.full(shape, -3e38) for name, shape in SHAPES.items()}
    assert_one_kept_out(*run(tx, 1e17, start=start))


@pytest.mark.slow
@pytest.mark.parametrize("dtype, count", [("bfloat16", 0), ("float16", 1)])
def test_what_overflows_depends_on_the_dtype(dtype, count):
    tx = sg.guard(optax.sgd(1.9), sg.skip())
    seen = run(tx, 6e4, dtype=dtype)[2]
    assert seen["kept_out_elements"].sum() == count
    assert seen["skipped_steps"][-1] == 0


@pytest.mark.slow
def test_a_state_that_keeps_an_inf_on_purpose_stops_no_step():
    def update(updates, state, params=None):
        return updates, jax.tree.map(lambda x: x * 0.5, state)

    inner = optax.GradientTransformation(
        lambda params: jax.tree.map(lambda x: x.at[0].set(jnp.inf), params), update
    )
    params, grads = params_of(), gradients()
    tx = sg.guard(inner, sg.skip())
    _, state, (_, seen, _) = scan(tx, grads, params, apply=True)
    assert seen["skipped_steps"][-1] == 0
    assert jnp.isinf(state.guarded_inner["w"][0]).all()
    assert jnp.isfinite(state.guarded_inner["w"][1:]).all()
