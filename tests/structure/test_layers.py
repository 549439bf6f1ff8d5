"""Tests for the residual blocks in NNX and Linen, and for scheduled decay."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from stablegrad.structure import (
    decay_with_schedule,
    deepnorm,
    linen as linen_layers,
    nnx as nnx_layers,
)

WIDTH = 8
X = jax.random.normal(jax.random.key(0), (4, WIDTH))


def applied(kind, name, x=X, **settings):
    """Outputs of a block around a dense layer, and those of the layer and its norm."""
    if kind == "nnx":
        rngs = nnx.Rngs(0)
        branch, norm = nnx.Linear(WIDTH, WIDTH, rngs=rngs), nnx.LayerNorm(8, rngs=rngs)
        parts = (branch,) if name == "ScaledResidual" else (branch, norm)
        return getattr(nnx_layers, name)(*parts, **settings)(x), branch, norm
    branch, norm = linen.Dense(WIDTH), linen.LayerNorm()
    parts = (branch,) if name == "ScaledResidual" else (branch, norm)
    block = getattr(linen_layers, name)(*parts, **settings)
    y, variables = block.init_with_output(jax.random.key(0), x)
    params = variables["params"]
    alone = lambda x: branch.apply({"params": params["branch"]}, x)
    normed = lambda x: norm.apply({"params": params["norm"]}, x)
    return y, alone, normed


@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_blocks_are_their_formulas(kind):
    y, _, _ = applied(kind, "ScaledResidual")
    np.testing.assert_array_equal(y, X)  # SkipInit starts as the identity.
    y, branch, _ = applied(kind, "ScaledResidual", scale_init=0.5)
    np.testing.assert_allclose(y, X + 0.5 * branch(X), rtol=1e-5)
    half, _, _ = applied(kind, "ScaledResidual", X.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    y, branch, norm = applied(kind, "PreNormBlock")
    np.testing.assert_allclose(y, X + branch(norm(X)), rtol=1e-5)
    y, branch, norm = applied(kind, "DeepNormBlock", layers=12)
    alpha, _ = deepnorm(12)
    np.testing.assert_allclose(y, norm(alpha * X + branch(X)), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_gradients_pass_fifty_skip_initialised_layers_unchanged():
    rngs = nnx.Rngs(0)
    dense = lambda: nnx.Linear(WIDTH, WIDTH, rngs=rngs)
    model = nnx.Sequential(*[nnx_layers.ScaledResidual(dense()) for _ in range(50)])
    grads = nnx.grad(lambda x, model: model(x).sum())(X, model)
    np.testing.assert_array_equal(grads, 1.0)
    grads = nnx.grad(lambda model: (model(X) ** 2).sum())(model)
    assert all(
        float(jnp.abs(layer["scale"][...])) > 0 for layer in grads["layers"].values()
    )  # The factor learns from the first step on.


STEPS = 3000


def balance_of(decay):
    """Gradient over parameter norm at the end, behind a normalisation.

    Its gradients are orthogonal to the parameters and inversely proportional to them.
    """
    rate = optax.linear_schedule(0.1, 0.005, STEPS)
    tx = optax.chain(decay(rate), optax.scale_by_learning_rate(rate))

    def step(carry, key):
        x, state = carry
        noise = jax.random.normal(key, x.shape)
        noise -= x * jnp.vdot(x, noise) / jnp.vdot(x, x)
        grad = noise / jnp.linalg.norm(noise) / jnp.linalg.norm(x)
        updates, state = tx.update(grad, state, x)
        ratio = jnp.linalg.norm(grad) / jnp.linalg.norm(x)
        return (x + updates, state), ratio

    x = jnp.ones(64) * 0.2
    keys = jax.random.split(jax.random.key(0), STEPS)
    ratios = jax.jit(lambda: jax.lax.scan(step, (x, tx.init(x)), keys)[1])()
    return np.asarray(ratios)


@pytest.mark.slow
def test_the_ratio_of_gradient_to_parameter_stays_where_the_peak_rate_puts_it():
    corrected = balance_of(lambda rate: decay_with_schedule(0.5, rate, peak=0.1))
    plain = balance_of(lambda rate: optax.add_decayed_weights(0.5))
    published = np.sqrt(2 * 0.5 / 0.1)
    for at in (STEPS // 10, STEPS // 2):
        assert corrected[at] == pytest.approx(published, rel=0.06)
    assert plain[STEPS // 10] == pytest.approx(published, rel=0.1)
    assert plain[-1] > 2 * corrected[-1]


def test_masked_leaves_do_not_decay_and_wrong_numbers_are_told():
    rate = optax.constant_schedule(0.05)
    tx = decay_with_schedule(0.5, rate, peak=0.1, mask={"w": True, "b": False})
    params = {"w": jnp.ones(2), "b": jnp.ones(2)}
    updates, _ = tx.update(
        jax.tree.map(jnp.zeros_like, params), tx.init(params), params
    )
    np.testing.assert_allclose(updates["w"], 0.25)
    np.testing.assert_array_equal(updates["b"], 0.0)
    with pytest.raises(ValueError, match="`peak` must be > 0"):
        decay_with_schedule(0.5, rate, peak=0.0)
    for wrong in (-0.5, float("inf")):
        with pytest.raises(ValueError, match="`weight_decay` must be finite and >= 0"):
            decay_with_schedule(wrong, rate, peak=1.0)
    with pytest.raises(ValueError, match="`schedule` must be a function of the step"):
        decay_with_schedule(0.5, 0.05, peak=0.1)
