"""Sharpness against eigenvalues known in closed form or from NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers.marking import core

import stablegrad as sg
from stablegrad.curvature import _loss
from stablegrad.curvature._decays import decays

EXACT = 1e-5  # Relative: float32.


def quadratic(params, batch):
    return 0.5 * jnp.sum(batch * params**2)


def test_both_ends_of_an_indefinite_spectrum_with_their_signs():
    found = sg.sharpness(quadratic, jnp.ones(3), jnp.array([3.0, 1.0, -5.0]))
    assert found.largest == pytest.approx(3.0, rel=EXACT)
    assert found.smallest == pytest.approx(-5.0, rel=EXACT)
    assert found.iterations == 3 and found.residual < 1e-5
    assert found.participation == pytest.approx(1 / 3, rel=1e-3)
    assert math.isnan(found.unfloored)
    assert str(found).startswith("The loss curves by 3 at most and -5 at least (resid")
    with_momentum = sg.sharpness(
        quadratic, jnp.ones(3), jnp.array([3.0, 1.0, -5.0]), momentum=0.9
    )
    assert with_momentum.stable_rate == pytest.approx(3.8 / 3, rel=EXACT)


def test_within_jit_it_says_where_it_can_run():
    measure = lambda params: sg.sharpness(quadratic, params, jnp.ones(3))
    with pytest.raises(TypeError, match="`sharpness` reads numbers on the host"):
        jax.jit(measure)(jnp.ones(3))


@pytest.mark.slow
def test_a_large_residual_asks_for_half_as_many_iterations_more():
    batch = jnp.linspace(-1.0, 1.0, 100)
    found = sg.sharpness(quadratic, jnp.ones(100), batch, iterations=4)
    assert found.iterations == 6 and found.residual > 0.01
    assert abs(found.largest - 1) <= found.residual
    assert "Not converged: pass more `iterations`." in str(found)


def network(params, batch):
    inputs, targets = batch
    hidden = jnp.tanh(inputs @ params["in"] + params["bias"][None])
    return jnp.mean((hidden @ params["out"] - targets) ** 2)


@pytest.mark.slow
def test_lanczos_finds_the_largest_eigenvalue_of_a_network():
    draw = np.random.default_rng(0)
    shapes = {"in": (10, 38), "bias": (38,), "out": (38, 2)}
    params = {k: jnp.asarray(draw.normal(size=s) * 0.5) for k, s in shapes.items()}
    batch = (
        jnp.asarray(draw.normal(size=(32, 10))),
        jnp.asarray(draw.normal(size=(32, 2))),
    )
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    dense = jax.jit(jax.hessian(lambda x: network(unravel(x), batch)))(flat)
    values = np.linalg.eigvalsh(np.asarray(dense, np.float64))
    found = sg.sharpness(network, params, batch)
    assert flat.size == 494
    assert found.largest == pytest.approx(values[-1], rel=1e-3)
    assert found.smallest == pytest.approx(values[0], rel=0.05)
    assert abs(found.largest - values[-1]) <= found.residual + 1e-5 * values[-1]


@pytest.mark.slow
@pytest.mark.parametrize("depth", [2, 4])
def test_a_deep_scalar_linear_net_has_the_known_spectrum(depth):
    found = sg.sharpness(
        lambda w, y: 0.5 * (jnp.prod(w) - y) ** 2, jnp.ones(depth), jnp.float32(1.0)
    )
    assert found.largest == pytest.approx(depth, rel=EXACT)
    assert found.stable_rate == pytest.approx(2 / depth, rel=EXACT)


@pytest.mark.slow
def test_linear_regression_has_the_eigenvalue_of_its_inputs():
    inputs = np.random.default_rng(0).normal(size=(40, 5))
    found = sg.sharpness(
        lambda w, x: 0.5 * jnp.mean((x @ w - 1) ** 2), jnp.zeros(5), jnp.asarray(inputs)
    )
    expected = np.linalg.eigvalsh(inputs.T @ inputs / 40)[-1]
    assert found.largest == pytest.approx(expected, rel=EXACT)


def preconditioned(gradients, curvature, b1=0.9, b2=0.999, eps=1e-8):
    """Largest eigenvalues for a diagonal Hessian: floored, and not; float64."""
    v, t = 0.0, len(gradients)
    for g in np.asarray(gradients, np.float64):
        v = b2 * v + (1 - b2) * g**2
    p = (1 - b1**t) * (np.sqrt(v / (1 - b2**t)) + eps)
    floored = np.maximum(p, 1e-2 * np.sqrt(np.mean(p**2)))
    return np.max(curvature / floored), np.max(curvature / p)


@pytest.mark.slow
@pytest.mark.parametrize(
    "steps_before, b1, b2", core([(0, 0.9, 0.999), (3, 0.8, 0.95)], (0, 0.9, 0.999))
)
def test_adams_view_matches_a_float64_oracle_at_any_step(steps_before, b1, b2):
    size = 200
    curvature = np.linspace(1.0, 2.0, size)
    place = np.ones(size)
    place[7] = 1e-6  # Where the gradient vanishes.
    batch, params = jnp.asarray(curvature), jnp.asarray(place)
    tx = optax.adam(1.0, b1, b2)
    state = tx.init(params)
    for _ in range(steps_before):
        _, state = tx.update(batch * params, state)
    found = sg.sharpness(quadratic, params, batch, tx=tx, state=state)
    gradients = [curvature * place] * (steps_before + 1)
    floored, bare = preconditioned(gradients, curvature, b1, b2)
    assert found.largest == pytest.approx(floored, rel=1e-3)
    assert found.unfloored == pytest.approx(bare, rel=1e-2)
    assert found.unfloored_participation == pytest.approx(1 / size, rel=1e-2)
    limit = (2 + 2 * b1) / (1 - b1)
    assert found.stable_rate == pytest.approx(limit / floored, rel=1e-3)
    assert "an artefact of vanishing gradients: 0.5 % of the coord" in str(found)
    assert "trust `critical_learning_rate`" in str(found)


@pytest.mark.parametrize("momentum, limit", [(None, 2.0), (0.9, 3.8)])
def test_rmsprop_has_its_own_view_and_the_limit_of_its_momentum(momentum, limit):
    curvature = np.array([1.0, 2.0, 4.0])
    tx = optax.rmsprop(1.0, decay=0.95, momentum=momentum)
    found = sg.sharpness(quadratic, jnp.ones(3), jnp.asarray(curvature), tx=tx)
    largest = np.max(curvature / (np.sqrt(0.05) * curvature))
    assert found.largest == pytest.approx(largest, rel=1e-3)
    assert found.stable_rate == pytest.approx(limit / largest, rel=1e-3)


def wrapped(kind):
    adam = optax.adamw(optax.linear_schedule(0.0, 1.0, 9), 0.8, 0.95, weight_decay=0.1)
    return {
        "chain": optax.chain(optax.clip_by_global_norm(1e-2), adam),
        "injected": optax.inject_hyperparams(optax.adam)(1.0, 0.8, 0.95),
        "guard": sg.guard(adam, sg.skip()),
    }[kind]


@pytest.mark.parametrize("kind", ["chain", "injected", "guard"])
def test_decays_are_read_through_whatever_adam_is_wrapped_in(kind):
    point = {"w": jnp.ones((2, 3)), "held": None}
    tx = _loss.optimizer(wrapped(kind), "sharpness")
    found = decays(tx, point, None, None)
    assert found.averaged
    assert found[:2] == pytest.approx((0.8, 0.95), abs=1e-6)


@pytest.mark.parametrize(
    "tx, name",
    [
        (optax.adabelief(1.0), "b2"),
        (optax.adamax(1.0), "b2"),
        (optax.amsgrad(1.0), "b2"),
        (optax.rmsprop(1.0, centered=True), "momentum"),
        (optax.adam(1.0, mu_dtype=jnp.bfloat16), "momentum"),
        (optax.chain(optax.scale_by_adam(), optax.trace(0.9)), "momentum"),
    ],
)
def test_a_decay_that_cannot_be_read_is_an_error_and_no_guess(tx, name):
    with pytest.raises(ValueError, match=f"`{name}` must be given for this `tx`"):
        sg.sharpness(quadratic, jnp.ones(3), jnp.ones(3), tx=tx)


def test_decays_that_are_given_are_taken():
    tx = optax.adabelief(1.0)
    found = decays(_loss.optimizer(tx, "sharpness"), jnp.ones(3), 0.5, 0.9)
    assert found == (0.5, 0.9, True)


HALF = {"kernel": True, "bias": False}
LABELS = {"kernel": "a", "bias": "b"}


@pytest.mark.parametrize(
    "tx, got",
    [
        (optax.masked(optax.adam(1.0), HALF), "got 1 of 4. Leave"),
        (optax.partition({"a": optax.adam(1.0), "b": optax.sgd(1.0)}, LABELS), "1 of"),
        (optax.partition(dict.fromkeys("ab", optax.adam(1.0)), LABELS), "2 of 4 and 2"),
        (optax.contrib.muon(1.0), "got 1 of 2"),
        (optax.lion(1.0), "got 0. Leave `tx` out"),
    ],
)
def test_an_optimizer_without_a_second_moment_for_every_parameter_is_named(tx, got):
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    with pytest.raises(ValueError, match=f"of all 6 parameters, .*{got}"):
        sg.sharpness(lambda p, b: jnp.sum(p["kernel"]), params, 0.0, tx=tx)


@pytest.mark.slow
def test_an_nnx_optimizer_in_use_gives_its_own_view():
    model = nnx.Linear(3, 1, use_bias=False, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(0.0), wrt=nnx.Param)
    inputs = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)

    def loss_fn(model, batch):
        return jnp.mean((model(batch) - 1) ** 2)

    optimizer.update(model, nnx.grad(loss_fn)(model, jnp.asarray(inputs)))
    found = sg.sharpness(
        loss_fn, model, jnp.asarray(inputs), tx=optimizer.tx, state=optimizer.opt_state
    )
    design, kernel = np.float64(inputs), np.float64(model.kernel[...])
    gradient = 2 * np.mean(design * (design @ kernel - 1), axis=0)
    p = (1 - 0.9**2) * np.abs(gradient)  # The second step, with the same gradient.
    hessian = 2 * design.T @ design / 8
    expected = np.linalg.eigvalsh(hessian / np.sqrt(np.outer(p, p)))[-1]
    assert found.largest == pytest.approx(expected, rel=1e-3)


def test_a_loss_that_is_not_finite_is_an_error():
    with pytest.raises(ValueError, match="must give a finite loss and gradient .* nan"):
        sg.sharpness(quadratic, jnp.ones(3), jnp.array([3.0, jnp.nan, 1.0]))


def test_a_second_derivative_that_is_not_finite_gives_nan_and_says_so():
    found = sg.sharpness(lambda x, _: jnp.sum(x**1.5), jnp.zeros(3), None)
    assert math.isnan(found.largest) and "curvature is not finite" in str(found)


def test_a_straight_loss_limits_no_rate():
    found = sg.sharpness(quadratic, jnp.ones(3), jnp.zeros(3))
    assert found.largest == 0 and found.stable_rate == math.inf
    assert "nothing limits the learning rate" in str(found)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(iterations=0), "`iterations` must be an integer >= 1, got 0"),
        (dict(momentum=1.0), r"`momentum` must be in \[0, 1\), got 1.0"),
        (dict(weight_decay=-1.0), "`weight_decay` must be finite and >= 0"),
        (dict(b2=1.0), r"`b2` must be in \(0, 1\), got 1.0"),
        (dict(eps=-1.0), "`eps` must be finite and >= 0"),
        (dict(state=()), "`state` must come with its `tx`"),
        (dict(tx=optax.sgd(1.0)), "`tx` must hold one second moment"),
    ],
)
def test_bad_arguments_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        sg.sharpness(quadratic, jnp.ones(3), jnp.ones(3), **settings)


@pytest.mark.slow
def test_numbers_may_be_arrays():
    loss = lambda params, batch: jnp.sum(batch * params**2)
    arguments = (loss, jnp.ones(2), jnp.array([1.0, 3.0]))
    found, expected = (
        sg.sharpness(*arguments, momentum=b) for b in (jnp.float32(0.5), 0.5)
    )
    assert found.stable_rate == expected.stable_rate
