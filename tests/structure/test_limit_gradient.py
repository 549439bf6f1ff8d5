"""Tests for `stablegrad.limit_gradient` and its Flax layers."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import stablegrad as sg
from stablegrad.structure.linen import LimitGradient as LinenLayer
from stablegrad.structure.nnx import LimitGradient as NnxLayer

SHAPE = (5, 4, 3)
AXES = {"whole": (0, 1, 2), "example": (1, 2), "token": (2,)}


@jax.jit
def returned(gradient, max_norm):
    """What flows back for each `per` when `gradient` arrives."""
    pull = lambda per: jax.vjp(
        lambda x: sg.limit_gradient(x, max_norm, per=per), jnp.zeros_like(gradient)
    )[1](gradient)[0]
    return {per: pull(per) for per in AXES}


def oracle(gradient, max_norm, axes):
    gradient = np.asarray(gradient, np.float64)
    norms = np.sqrt((gradient**2).sum(axis=axes, keepdims=True))
    return gradient * np.where(
        norms > max_norm, max_norm / np.maximum(norms, 1e-300), 1
    )


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e20, 1e36])
def test_every_part_is_limited_to_the_norm_whatever_its_size(size):
    rng = np.random.default_rng(0)
    gradient = rng.normal(size=SHAPE) * 10 ** rng.uniform(-3, 1, (*SHAPE[:2], 1)) * size
    gradient = jnp.asarray(gradient, jnp.float32)
    every = returned(gradient, 2.0 * size)
    for per, found in every.items():
        expected = oracle(gradient, 2.0 * size, AXES[per])
        np.testing.assert_allclose(found / size, expected / size, rtol=1e-5)
        assert (found != gradient).any()
    assert (every["token"] == gradient).any()  # Some tokens are small enough.


def test_the_forward_pass_is_exact_and_small_gradients_are_bitwise_the_same():
    x = jax.random.normal(jax.random.key(0), SHAPE)
    chex.assert_trees_all_equal(sg.limit_gradient(x, 0.1), x)
    for found in returned(x, 1e3).values():
        chex.assert_trees_all_equal(found, x)
    for found in returned(x, jnp.inf).values():
        chex.assert_trees_all_equal(found, x)


def test_a_limit_of_zero_stops_the_gradient():
    for found in returned(jnp.ones(SHAPE), 0.0).values():
        chex.assert_trees_all_equal(found, jnp.zeros(SHAPE))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("size", [2.0**126, 1e38, 3e38])
def test_gradients_near_the_largest_float_are_limited_jitted_or_not(size, dtype):
    gradient = jnp.full((2, 3), 1.0, dtype).at[0, 0].set(size)
    pull = lambda g: jax.vjp(lambda x: sg.limit_gradient(x, 5.0), g)[1](g)[0]
    for found in pull(gradient), jax.jit(pull)(gradient):
        assert float(found[0, 0]) == pytest.approx(5.0, rel=1e-2)
        np.testing.assert_allclose(found[1].astype(jnp.float32), 1.0, rtol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_nonfinite_part_passes_as_it_is_and_touches_no_other(bad):
    gradient = jnp.full(SHAPE, 10.0).at[2, 1, 0].set(bad)
    found = returned(gradient, 2.0)
    np.testing.assert_array_equal(found["whole"], gradient)
    np.testing.assert_array_equal(found["example"][2], gradient[2])
    np.testing.assert_array_equal(found["token"][2, 1], gradient[2, 1])
    clean = returned(gradient.at[2, 1, 0].set(10.0), 2.0)
    rest = jnp.array([0, 1, 3, 4])
    chex.assert_trees_all_equal(found["example"][rest], clean["example"][rest])
    assert jnp.isfinite(jnp.delete(found["token"].reshape(-1, 3), 9, axis=0)).all()


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_keeps_its_dtype_and_does_not_overflow(dtype):
    gradient = jnp.full(SHAPE, 300.0, dtype)
    for per, found in returned(gradient, 1.0).items():
        assert found.dtype == dtype
        norms = np.linalg.norm(
            np.asarray(found, np.float64).reshape(
                {"whole": (1, -1), "example": (5, -1), "token": (20, -1)}[per]
            ),
            axis=1,
        )
        np.testing.assert_allclose(norms, 1.0, rtol=0.01)


def test_one_example_that_explodes_leaves_the_others_their_gradients():
    inputs = jnp.ones((3, 1))
    weights = jnp.array([1.0, 1e6, 1.0])

    @jax.jit
    def gradient(kernel, limit):
        def loss(kernel):
            hidden = sg.limit_gradient(inputs * kernel[None], limit)
            return jnp.sum(weights[:, None] * hidden)

        return jax.grad(loss)(kernel)

    np.testing.assert_allclose(gradient(jnp.ones(2), jnp.inf), 1e6 + 2, rtol=1e-6)
    np.testing.assert_allclose(gradient(jnp.ones(2), 2.0), 2 + 2 / 2**0.5, rtol=1e-6)


def test_it_works_under_vmap_scan_and_checkpoint_with_one_trace():
    @jax.jit
    @chex.assert_max_traces(n=1)
    def gradient(x):
        def loss(x):
            body = jax.checkpoint(lambda c, _: (2 * sg.limit_gradient(c, 3.0), None))
            return jnp.sum(jax.lax.scan(body, x, None, length=4)[0])

        return jax.vmap(jax.grad(loss))(x)

    for scale in (1.0, 2.0):
        found = gradient(scale * jnp.ones((2, 3, 1)))
        np.testing.assert_allclose(found, 3.0, rtol=1e-6)


def nnx_model():
    rngs = nnx.Rngs(0)
    return nnx.Sequential(
        nnx.Linear(3, 4, rngs=rngs), NnxLayer(0.01), nnx.Linear(4, 1, rngs=rngs)
    )


@pytest.mark.slow
def test_the_nnx_layer_limits_what_lies_before_it_only():
    model, x = nnx_model(), jnp.ones((2, 3))
    grads = jax.jit(
        lambda model: nnx.grad(lambda model: 1e4 * jnp.sum(model(x)))(model)
    )(model)
    # Two examples of at most 0.01 each, and inputs of ones.
    assert 0 < jnp.linalg.norm(grads["layers"][0]["bias"][...]) <= 0.02 * 1.00001
    np.testing.assert_allclose(grads["layers"][2]["bias"][...], 2e4, rtol=1e-6)
    optimizer = nnx.Optimizer(model, sg.guard(optax.sgd(0.1)), wrt=nnx.Param)
    optimizer.update(model, grads)
    chex.assert_tree_all_finite(nnx.state(model, nnx.Param))


def test_the_linen_layer_limits_what_lies_before_it_only():
    model = linen.Sequential([linen.Dense(4), LinenLayer(0.01), linen.Dense(1)])
    x = jnp.ones((2, 3))
    params = model.init(jax.random.key(0), x)
    loss = lambda params: 1e4 * jnp.sum(model.apply(params, x))
    grads = jax.jit(jax.grad(loss))(params)["params"]
    assert 0 < jnp.linalg.norm(grads["layers_0"]["bias"]) <= 0.02 * 1.00001
    np.testing.assert_allclose(grads["layers_2"]["bias"], 2e4, rtol=1e-6)


@pytest.mark.parametrize(
    "x, options, error, message",
    [
        (jnp.arange(3), {"max_norm": 1.0}, TypeError, "floating-point, got int32"),
        (jnp.ones(3), {"max_norm": -1.0}, ValueError, "`max_norm` must be >= 0"),
        (jnp.ones(3), {"max_norm": jnp.nan}, ValueError, "`max_norm` must be >= 0"),
        (jnp.ones(3), {"max_norm": 1.0, "per": "row"}, ValueError, "`per` must be one"),
        (jnp.ones(()), {"max_norm": 1.0}, ValueError, "must have an axis"),
    ],
)
def test_a_bad_argument_is_told_with_what_was_expected(x, options, error, message):
    with pytest.raises(error, match=message):
        sg.limit_gradient(x, **options)


@pytest.mark.slow
def test_a_bound_of_several_numbers_is_an_error_when_traced_too():
    limited = jax.jit(lambda x, most: sg.limit_gradient(x, most, per="token"))
    with pytest.raises(ValueError, match=r"`max_norm` must be one number, .* \(4,\)"):
        limited(jnp.ones((2, 4)), jnp.ones(4))
