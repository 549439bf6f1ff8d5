"""Tests for the initialisers of `stablegrad.structure`."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stablegrad import structure

he_normal = jax.nn.initializers.he_normal()
WIDTH = 64


@pytest.mark.slow
@pytest.mark.parametrize("distribution", ["normal", "truncated_normal", "uniform"])
def test_kernels_have_the_deviation_of_the_gain(distribution):
    init = structure.activation_init(jnp.tanh, distribution=distribution)
    kernel = init(jax.random.key(0), (400, 100))
    assert float(kernel.std()) == pytest.approx(1.5925 / 20, rel=0.02)
    init = structure.activation_init(jnp.tanh, distribution=distribution, backward=True)
    kernel = init(jax.random.key(0), (400, 100))
    assert float(kernel.std()) == pytest.approx(1.4674 / 10, rel=0.02)


def test_orthogonal_kernels_scale_every_norm_by_the_gain():
    init = structure.activation_init(jax.nn.relu, distribution="orthogonal")
    kernel = np.asarray(init(jax.random.key(0), (32, 32)), np.float64)
    np.testing.assert_allclose(kernel @ kernel.T, 2 * np.eye(32), atol=1e-5)


def stream_growth(branches, init):
    """Variance after all branches over that before, of one linear layer each."""
    x = jax.random.normal(jax.random.key(1), (32, 256))
    branch = lambda x, key: (x + x @ init(key, (256, 256)), None)
    after, _ = jax.lax.scan(branch, x, jax.random.split(jax.random.key(0), branches))
    return float(jnp.var(after) / jnp.var(x))


@pytest.mark.slow
def test_a_residual_stream_grows_by_e_at_most_behind_depth_scaled_kernels():
    lecun = jax.nn.initializers.lecun_normal()
    scaled = structure.depth_scaled_init(lecun, branches=24)
    assert stream_growth(24, scaled) == pytest.approx((1 + 1 / 24) ** 24, rel=0.1)
    assert stream_growth(24, lecun) > 1e6


@functools.partial(jax.jit, static_argnames=("branches", "init"))
def change_by_one_step(branches, init):
    """How far one step of SGD moves the outputs of a network without norms."""
    keys = jax.random.split(jax.random.key(0), branches + 2)
    x = jax.random.normal(keys[0], (16, WIDTH))
    head = jax.random.normal(keys[1], (WIDTH,)) / WIDTH**0.5
    first = jax.vmap(lambda key: init(key, (WIDTH, WIDTH)))(keys[2:])
    params = (first, jnp.zeros_like(first))

    def network(params):
        branch = lambda x, layer: (x + jax.nn.relu(x @ layer[0]) @ layer[1], None)
        return jax.lax.scan(branch, x, params)[0] @ head

    loss = lambda params: jnp.mean(jnp.square(network(params) - 1)) / 2
    after = jax.tree.map(lambda p, g: p - 0.01 * g, params, jax.grad(loss)(params))
    return jnp.sqrt(jnp.mean(jnp.square(network(after) - network(params))))


@pytest.mark.slow
def test_one_step_changes_the_outputs_of_fixup_as_much_at_any_depth():
    shallow, deep = (
        change_by_one_step(n, structure.fixup_init(he_normal, n, branch_layers=2))
        for n in (4, 64)
    )
    assert 0.5 < deep / shallow < 2
    unscaled = change_by_one_step(64, he_normal) / change_by_one_step(4, he_normal)
    assert unscaled > 8


def test_fixup_of_three_layers_takes_the_fourth_root():
    init = structure.fixup_init(he_normal, branches=16, branch_layers=3)
    key = jax.random.key(0)
    np.testing.assert_allclose(init(key, (8, 8)), he_normal(key, (8, 8)) / 2, rtol=1e-6)


def test_deepnorm_has_the_published_constants_and_its_kernels_their_deviation():
    assert structure.deepnorm(12) == pytest.approx((2.2134, 0.3195), abs=1e-4)
    kernel = structure.deepnorm_init(12)(jax.random.key(0), (200, 600))
    assert float(kernel.std()) == pytest.approx(0.3195 * (2 / 800) ** 0.5, rel=0.02)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (
            lambda: structure.activation_init(jnp.tanh, distribution="cauchy"),
            "`distribution` must be one of",
        ),
        (lambda: structure.depth_scaled_init(he_normal, 0), "`branches` must be"),
        (lambda: structure.fixup_init(he_normal, 4, 1), "`branch_layers` must be"),
        (lambda: structure.deepnorm(0), "`layers` must be"),
    ],
)
def test_wrong_arguments_are_told(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def lsuv_network(params):
    x = jax.random.normal(jax.random.key(5), (128, 8))
    outputs = {}
    for name in ("z", "a", "head"):  # Not in the order of the alphabet.
        outputs[f"{name}.kernel"] = x @ params[name]["kernel"]
        x = jax.nn.sigmoid(outputs[f"{name}.kernel"])
    return outputs


def lsuv_params(size):
    kernel = jax.random.normal(jax.random.key(0), (8, 8))
    return {name: {"kernel": size * kernel} for name in ("z", "a", "head")}


@pytest.mark.slow
def test_lsuv_gives_every_layer_unit_variance_and_nothing_but_a_factor():
    before = lsuv_params(30.0)
    after = structure.lsuv(lsuv_network, before, tolerance=0.001)
    for output in lsuv_network(after).values():
        assert float(output.std()) == pytest.approx(1.0, abs=0.001)
    for name in before:
        ratio = after[name]["kernel"] / before[name]["kernel"]
        np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-5)


@pytest.mark.slow
def test_lsuv_leaves_a_layer_of_zeros_and_one_within_the_tolerance_alone():
    params = lsuv_params(0.0)
    after = structure.lsuv(lsuv_network, params)
    for name in params:
        np.testing.assert_array_equal(after[name]["kernel"], 0.0)
    fine = structure.lsuv(lsuv_network, lsuv_params(3.0), tolerance=1e-3)
    again = structure.lsuv(lsuv_network, fine)
    assert all((again[name]["kernel"] == fine[name]["kernel"]).all() for name in fine)


def test_lsuv_names_what_is_no_leaf():
    outputs = lambda params: {"kernel": params["z"]["kernel"]}
    with pytest.raises(ValueError, match=r"names \['kernel'\], which are not leaves"):
        structure.lsuv(outputs, lsuv_params(1.0))
    with pytest.raises(TypeError, match="cannot run inside jit.*call `lsuv` outside"):
        jax.jit(lambda params: structure.lsuv(outputs, params))(lsuv_params(1.0))


@pytest.mark.slow
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("shape", [(64, 256), (256, 64), (3, 3, 8, 128)])
def test_orthogonal_kernels_have_the_deviation_of_the_gain_in_any_shape(
    shape, backward
):
    settings = {"distribution": "orthogonal", "backward": backward}
    init = structure.activation_init(jax.nn.relu, **settings)
    kernel = init(jax.random.key(0), shape, jnp.float32)
    fan = np.prod(shape[:-2]) * shape[-1] if backward else np.prod(shape[:-1])
    assert float(jnp.std(kernel)) == pytest.approx(np.sqrt(2 / fan), rel=0.02)
    half = init(jax.random.key(0), shape, jnp.bfloat16)
    chex.assert_trees_all_equal(half, kernel.astype(jnp.bfloat16))
