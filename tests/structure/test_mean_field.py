"""Tests for the mean-field theory of `stablegrad.structure`."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.marking import core

from stablegrad.structure import activation_init, chi, critical_point, fixed_point, gain

WIDTH, DEPTH, BATCH = 512, 20, 16
exact_gelu = functools.partial(jax.nn.gelu, approximate=False)


def normal_tail(x):
    return math.erfc(x / math.sqrt(2)) / 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("activation", "forward", "backward"),
    [
        (lambda x: x, 1.0, 1.0),
        (jax.nn.relu, math.sqrt(2), math.sqrt(2)),
        (
            functools.partial(jax.nn.leaky_relu, negative_slope=0.5),
            math.sqrt(2 / 1.25),
            math.sqrt(2 / 1.25),
        ),
        (jax.nn.selu, 1.0, 0.96603),
        # E = 1/2 + e^2 Phi(-2) for the slope of ELU.
        (jax.nn.elu, 1.2452, (0.5 + math.exp(2) * normal_tail(2)) ** -0.5),
        (jax.nn.hard_tanh, 1.39204, (1 - 2 * normal_tail(1)) ** -0.5),
        (jnp.tanh, 1.5925, 1.4674),
        (jax.nn.sigmoid, 1.8462, 4.7227),
        (exact_gelu, 1.5335, 1.4811),
        (jax.nn.silu, 1.6765, 1.6233),
    ],
)
def test_gains_are_those_of_closed_forms_and_of_the_literature(
    activation, forward, backward
):
    assert gain(activation) == pytest.approx(forward, abs=1e-4)
    assert gain(activation, backward=True) == pytest.approx(backward, abs=1e-4)


def test_a_gain_at_another_variance_keeps_that_variance():
    moment = np.mean(np.tanh(2 * np.random.default_rng(0).normal(size=10**6)) ** 2)
    assert gain(jnp.tanh, q=4.0) == pytest.approx(math.sqrt(4 / moment), rel=3e-3)


@pytest.mark.parametrize(
    ("activation", "q", "weights", "biases"),
    [
        (jnp.tanh, 1e-6, 1.0, 0.0),  # Schoenholz et al. (2017).
        (jnp.tanh, 0.570, 1.761, 0.05),
        (jax.nn.relu, 3.0, 2.0, 0.0),
        # Roberts, Yaida and Hanin (2021), section 5.3.
        (exact_gelu, (3 + math.sqrt(17)) / 2, 1.98305826, 0.17292239),
        (jax.nn.silu, 14.32017362, 1.98800468, 0.55514317),
    ],
)
def test_critical_points_are_the_published_ones(activation, q, weights, biases):
    found = critical_point(activation, q)
    assert found.weight_variance == pytest.approx(weights, rel=3e-4)
    assert found.bias_variance == pytest.approx(biases, abs=2e-4)
    assert chi(activation, found.weight_variance, q) == pytest.approx(1.0, abs=1e-6)


def test_an_activation_without_a_critical_point_is_told():
    with pytest.raises(ValueError, match="no critical point at q = 1"):
        critical_point(jax.nn.sigmoid, 1.0)


@pytest.mark.parametrize(
    ("weights", "biases", "q"), [(1.260, 0.0025, 0.154), (1.761, 0.05, 0.570)]
)
def test_a_fixed_point_at_the_edge_of_chaos_has_no_depth_scale(weights, biases, q):
    found = fixed_point(jnp.tanh, weights, biases)
    assert found.variance == pytest.approx(q, rel=3e-3)
    assert found.chi == pytest.approx(1.0, abs=1e-4)
    assert found.depth_scale > 1e4


@pytest.mark.slow
def test_signals_of_relu_die_out_stay_or_grow_without_bound():
    below, at, above = (fixed_point(jax.nn.relu, sw) for sw in (1.9, 2.0, 2.1))
    assert (below.variance, above.variance) == (0.0, math.inf)
    assert at.variance == pytest.approx(1.0) and at.depth_scale == math.inf
    assert below.chi == pytest.approx(0.95)
    assert below.depth_scale == pytest.approx(-1 / math.log(0.95), rel=1e-4)


@functools.partial(jax.jit, static_argnums=0)
def squared_gradients(activation, weight_variance, key):
    """Mean squares of pre-activations and of gradients at them, (DEPTH, BATCH)."""
    keys = jax.random.split(key, DEPTH + 2)
    deviation = jnp.sqrt(weight_variance / WIDTH)
    start = jax.random.normal(keys[0], (BATCH, WIDTH))
    arrives = jax.random.normal(keys[1], (BATCH, WIDTH))

    def network(nudges):
        def layer(h, inputs):
            key, nudge = inputs
            kernel = deviation * jax.random.normal(key, (WIDTH, WIDTH))
            return activation(h + nudge) @ kernel, jnp.mean(jnp.square(h), axis=-1)

        last, squares = jax.lax.scan(layer, start, (keys[2:], nudges))
        return jnp.sum(last * arrives), squares

    nudges = jnp.zeros((DEPTH, BATCH, WIDTH))
    grads, squares = jax.grad(network, has_aux=True)(nudges)
    return squares, jnp.mean(jnp.square(grads), axis=-1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "activation", core([jax.nn.relu, jnp.tanh, exact_gelu, jax.nn.silu], jnp.tanh)
)
def test_chi_is_what_a_network_of_width_512_shows_within_three_percent(activation):
    sw = gain(activation) ** 2
    squares, grads = squared_gradients(activation, sw, jax.random.key(0))
    # Every example has a variance of its own: that of GELU and SiLU drifts from 1.
    theory = [[chi(activation, sw, q) for q in layer] for layer in squares[:-1]]
    found = jnp.mean(jnp.log(grads[0] / grads[-1])) / (DEPTH - 1)
    assert float(jnp.exp(found)) == pytest.approx(
        np.exp(np.mean(np.log(theory))), rel=0.03
    )
    assert float(squares[1].mean() / squares[0].mean()) == pytest.approx(1, abs=0.03)


@pytest.mark.slow
def test_a_gain_is_a_number_within_jit_too():
    kernel = jax.jit(lambda key: activation_init(jax.nn.silu)(key, (64, 64)))
    expected = activation_init(jax.nn.silu)(jax.random.key(0), (64, 64))
    np.testing.assert_allclose(kernel(jax.random.key(0)), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: gain("relu"), TypeError, "must be an elementwise function"),
        (lambda: gain(jnp.sum), ValueError, "must be elementwise"),
        (lambda: gain(jax.nn.softmax), ValueError, "must be elementwise"),
        (lambda: gain(jnp.zeros_like), ValueError, "0 or constant"),
        (lambda: gain(jnp.ones_like, backward=True), ValueError, "0 or constant"),
        (lambda: gain(lambda x: x / 0), ValueError, "not finite at q = 1"),
        (lambda: gain(jnp.tanh, q=0.0), ValueError, "`q` must be > 0"),
        (lambda: chi(jnp.tanh, -1.0), ValueError, "`weight_variance` must be >= 0"),
        (lambda: fixed_point(jnp.tanh, 1.0, jnp.nan), ValueError, "`bias_variance`"),
    ],
)
def test_wrong_arguments_are_told(call, error, match):
    with pytest.raises(error, match=match):
        call()


@pytest.mark.slow
@pytest.mark.parametrize("q", [0.5, 5.0, 100.0, 1e6])
def test_a_kink_is_found_at_any_size_of_the_pre_activations(q):
    # Of hard tanh E[phi'^2] is the chance of |h| < 1, h normal of variance q.
    expected = math.erf(1 / math.sqrt(2 * q)) ** -0.5
    assert gain(jax.nn.hard_tanh, q=q, backward=True) == pytest.approx(expected, 0.01)
