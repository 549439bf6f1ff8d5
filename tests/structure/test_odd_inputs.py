"""Structure in odd but legitimate uses: narrow dtypes, NumPy's integers, boxes."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import stablegrad as sg
from stablegrad import structure
from stablegrad.structure import linen as linen_layers, nnx as nnx_layers

KEY = jax.random.key(0)
HE = jax.nn.initializers.he_normal()


def deviation(outputs):
    return float(outputs["w"].astype(jnp.float32).std())


@pytest.mark.slow
def test_lsuv_keeps_the_nearest_kernel_where_bfloat16_cannot_reach_the_tolerance():
    x = jax.random.normal(KEY, (256, 16)).astype(jnp.bfloat16)
    outputs = lambda params: {"w": x @ params["w"]}
    params = {"w": (9 * jnp.eye(16)).astype(jnp.bfloat16)}
    found = structure.lsuv(outputs, params, tolerance=1e-4)
    assert abs(deviation(outputs(found)) - 1) < 0.01


@pytest.mark.parametrize(("spread", "expected"), [(0.98, 1.0), (1.02, 9.14)])
def test_lsuv_gives_up_a_kernel_only_if_its_bias_alone_spreads_by_more(
    spread, expected
):
    x = jax.random.normal(KEY, (256, 16))
    bias = jax.random.normal(jax.random.key(1), (16,))
    bias = spread * bias / bias.std()
    outputs = lambda params: {"w": x @ params["w"] + bias[None]}
    params = {"w": 9 * jnp.eye(16)}
    found = structure.lsuv(outputs, params, tolerance=0.02, max_iterations=50)
    assert deviation(outputs(found)) == pytest.approx(expected, rel=0.03)


def test_lsuv_leaves_a_kernel_before_a_norm_as_it_is():
    x = jax.random.normal(KEY, (256, 16))

    def outputs(params):
        out = x @ params["w"]
        return {"w": 3 * out / out.std()}

    params = {"w": 9 * jnp.eye(16)}
    chex.assert_trees_all_equal(structure.lsuv(outputs, params), params)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_scheduled_decay_keeps_the_dtype_of_updates(dtype):
    rate = optax.linear_schedule(1e-2, 0.0, 10)
    decay = structure.decay_with_schedule(0.5, rate, peak=1e-2)
    params = {"w": jnp.full(3, 2.0, dtype)}
    tx = optax.chain(decay, optax.trace(0.9), optax.scale(-0.1))

    def step(state, _):
        updates, state = tx.update(params, state, params)
        return state, updates

    with jax.numpy_dtype_promotion("strict"):
        updates, _ = decay.update(params, decay.init(params), params)
    _, taken = jax.lax.scan(step, tx.init(params), None, length=2)
    chex.assert_trees_all_equal_dtypes(updates, params)
    np.testing.assert_array_equal(updates["w"], 3.0)  # 2 + 0.5 * 2.
    # The second decay is 0.9 of the first, and its step adds 0.9 of that before.
    expected = [-0.3, -0.1 * (2.9 + 0.9 * 3.0)]
    np.testing.assert_allclose(taken["w"][:, 0].astype(float), expected, rtol=1e-2)


def test_counts_of_numpy_leave_the_dtype_of_kernels_alone():
    for init in (
        structure.depth_scaled_init(HE, np.int64(24)),
        structure.fixup_init(HE, np.int32(24), np.int64(2)),
    ):
        assert init(KEY, (4, 4), jnp.bfloat16).dtype == jnp.bfloat16
    assert structure.deepnorm(np.int8(16)) == structure.deepnorm(16)
    block = nnx_layers.DeepNormBlock(lambda x: x, lambda x: x, layers=np.int64(12))
    assert block(jnp.ones((2, 4), jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("with_partitioning", [nnx, linen])
def test_a_partitioned_initialiser_within_a_scaled_one_is_an_error(with_partitioning):
    inner = with_partitioning.with_partitioning(HE, (None, "x"))
    with pytest.raises(TypeError, match="around the scaled initialiser"):
        structure.depth_scaled_init(inner, 4)(KEY, (4, 4), jnp.float32)


@pytest.mark.slow
def test_residuals_and_orthogonal_kernels_need_no_implicit_promotion():
    x = jnp.ones((2, 4), jnp.bfloat16)
    orthogonal = structure.activation_init(jax.nn.relu, distribution="orthogonal")
    branch = linen_layers.ScaledResidual(lambda x: x, 0.5)
    with jax.numpy_dtype_promotion("strict"):
        doubled = nnx_layers.ScaledResidual(lambda x: x, scale_init=0.5)(x)
        variables = branch.init(KEY, x)
        chex.assert_trees_all_equal(branch.apply(variables, x), doubled)
        assert orthogonal(KEY, (4, 4), jnp.bfloat16).dtype == jnp.bfloat16
    np.testing.assert_array_equal(doubled.astype(float), 1.5)


@pytest.mark.usefixtures("x64")
def test_a_factor_of_a_residual_is_float32_whatever_the_default_dtype():
    branch = linen_layers.ScaledResidual(lambda x: x)
    scale = branch.init(KEY, jnp.ones((2, 4)))["params"]["scale"]
    assert scale.dtype == jnp.float32


def test_the_forward_gain_needs_no_slope():
    limited = lambda x: sg.limit_gradient(jnp.tanh(x), 1.0, per="whole")
    assert structure.gain(limited) == pytest.approx(structure.gain(jnp.tanh))
    # E[relu] is 1 / sqrt(2 pi), and its root has an infinite slope at 0.
    root = structure.gain(lambda x: jnp.sqrt(jax.nn.relu(x)))
    assert root == pytest.approx((2 * np.pi) ** 0.25, rel=1e-5)
    assert structure.gain(lambda x: x > 0) == pytest.approx(2**0.5, rel=1e-5)
    assert structure.gain(lambda x: jnp.exp(1j * x)) == pytest.approx(1, rel=1e-5)


def test_the_backward_gain_of_a_custom_vjp_is_that_of_its_rule():
    @jax.custom_vjp
    def sign(x):
        return jnp.sign(x)

    sign.defvjp(lambda x: (jnp.sign(x), x), lambda x, g: (g * jax.nn.sigmoid(x),))
    expected = structure.gain(jax.nn.softplus, backward=True)
    assert structure.gain(sign, backward=True) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="0 or constant"):
        structure.gain(lambda x: x > 0, backward=True)


@pytest.mark.parametrize(("activation", "variance"), [(jnp.exp, 1.0), (jnp.sinh, 2.0)])
def test_signals_that_overflow_on_the_way_grow_without_bound(activation, variance):
    assert structure.fixed_point(activation, variance).variance == float("inf")


@pytest.mark.parametrize("q", ["a", None])
def test_a_variance_that_is_no_number_is_named(q):
    with pytest.raises(ValueError, match="`q` must be > 0"):
        structure.critical_point(jnp.tanh, q)


def test_queries_whose_squares_overflow_are_normalised_like_others():
    large = jnp.array([3e30, -4e30, 0.0, 0.0])
    query, key = structure.normalize_qk(large, large.astype(jnp.bfloat16))
    expected = np.array([3.0, -4.0, 0, 0]) / 2.5
    np.testing.assert_allclose(query, expected, rtol=1e-6)
    np.testing.assert_allclose(key.astype(float), expected, rtol=1e-2)
    small, _ = structure.normalize_qk(1e-2 * jnp.ones(4), jnp.ones(4))
    np.testing.assert_allclose(small, 1e-2 / (1e-4 + 1e-6) ** 0.5, rtol=1e-6)

    def normed(x):
        return jnp.sum(structure.normalize_qk(x, x, eps=5.0)[0] * jnp.arange(4.0))

    x, weights = np.array([3.0, -4.0, 1.0, 2.0]), np.arange(4.0)
    root = np.sqrt(np.mean(x**2) + 5.0)
    expected = weights / root - x * (weights @ x) / (4 * root**3)
    found = jax.grad(normed)(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    poisoned, _ = structure.normalize_qk(jnp.array([1.0, jnp.nan]), jnp.ones(2))
    assert np.isnan(poisoned).all()


@pytest.mark.parametrize(
    "function",
    [
        lambda x: structure.soft_cap(x, 5.0),
        structure.z_loss,
        lambda x: structure.normalize_qk(x, x),
    ],
)
def test_integer_logits_are_an_error(function):
    with pytest.raises(TypeError, match="must be floating-point, got int32"):
        function(jnp.arange(4))


def test_keys_and_values_have_one_head_or_as_many_as_queries():
    query, keys = jax.random.normal(KEY, (2, 2, 5, 4, 8))
    shared = keys[..., :1, :]
    repeated = jnp.repeat(shared, 4, axis=-2)
    found = structure.attend(query, shared, shared)
    expected = structure.attend(query, repeated, repeated)
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"got 2 and 4.*jnp.repeat"):
        structure.attend(query, keys[..., :2, :], keys)


def attention(heads=4, **settings):
    return nnx.MultiHeadAttention(
        4, 16, decode=False, rngs=nnx.Rngs(0), **settings
    ), jax.random.normal(KEY, (2, 5, 16))


@pytest.mark.slow
def test_wrong_settings_of_layers_are_errors_where_they_are_made():
    with pytest.raises(ValueError, match="`max_norm`"):
        nnx_layers.LimitGradient(-1.0)
    with pytest.raises(ValueError, match="`heads`"):
        nnx_layers.Attention(0)
    with pytest.raises(ValueError, match="`cap`"):
        nnx_layers.Attention(4, cap=-1.0)
    layer, x = attention(attention_fn=nnx_layers.Attention(2))
    with pytest.raises(ValueError, match="made for 2 heads, got 4"):
        layer(x)
    layer, x = attention(attention_fn=nnx_layers.Attention(4))
    with pytest.raises(ValueError, match="sow_weights"):
        layer(x, sow_weights=True)


def test_two_layers_that_share_one_attention_are_an_error():
    shared = nnx_layers.Attention(4)
    layers = nnx.List([attention(attention_fn=shared)[0] for _ in range(2)])
    with pytest.raises(ValueError, match=r"'layers.0' and 'layers.1' share one"):
        nnx_layers.largest_logits({"layers": layers})


def test_a_layer_in_two_places_has_one_attention_and_is_none_of_them():
    layer, x = attention(attention_fn=nnx_layers.Attention(4))
    layer(x)
    assert list(nnx_layers.largest_logits({"a": layer, "b": layer})) == ["a"]


@pytest.mark.slow
def test_logits_behind_a_norm_shrink_by_its_gains_and_not_by_kernels():
    layer, x = attention(attention_fn=nnx_layers.Attention(4), normalize_qk=True)
    layer.query_ln.scale[...] *= 30
    model = nnx.Dict(attention=layer)

    def steps(clip, count):
        optimizer = nnx.Optimizer(
            model, optax.chain(optax.sgd(0.0), clip), wrt=nnx.Param
        )
        grads = jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param))
        for _ in range(count):
            layer(x)
            largest = nnx_layers.largest_logits(model)
            largest = jax.tree.map(jnp.max, largest)
            optimizer.update(model, grads, largest_logits=largest)
        layer(x)
        return float(nnx_layers.largest_logits(model)["attention"].max())

    with pytest.raises(ValueError, match="Shrink the gains instead"):
        steps(structure.clip_logits(20.0), 1)
    gains = {"query_ln": 0.5, "key_ln": 0.5}
    kernel = layer.query.kernel[...]
    assert steps(structure.clip_logits(20.0, powers=gains), 1) < 20.1
    np.testing.assert_array_equal(layer.query.kernel[...], kernel)


@pytest.mark.parametrize(
    "powers", [["query"], {"query": float("inf")}, {"query": "half"}]
)
def test_wrong_powers_are_named(powers):
    with pytest.raises(ValueError, match="`powers"):
        structure.clip_logits(powers=powers)


def test_largest_logits_that_are_no_dict_are_an_error_with_a_cure():
    tx = structure.clip_logits()
    params = {"query": jnp.ones((2, 3, 4))}
    with pytest.raises(ValueError, match="largest_logits={name: logits}"):
        tx.update(params, tx.init(params), params, largest_logits=jnp.ones(3))
