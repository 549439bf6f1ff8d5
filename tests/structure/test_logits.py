"""Tests for bounded logits: soft cap, z-loss, QK-norm, attention, QK-clip."""

import chex
import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import stablegrad as sg
from stablegrad.structure import (
    attend,
    clip_logits,
    linen as linen_layers,
    nnx as nnx_layers,
    normalize_qk,
    soft_cap,
    z_loss,
)

HEADS, DEPTH = 4, 8


def test_a_soft_cap_is_a_scaled_tanh_that_keeps_small_logits():
    logits = jnp.array([0.0, 0.5, 50.0, -1e6])
    found = soft_cap(logits, 50.0)
    expected = [0.0, 0.5, 50 * np.tanh(1), -50.0]
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert jax.grad(soft_cap)(0.0, 50.0) == 1.0
    assert soft_cap(logits.astype(jnp.bfloat16), 50.0).dtype == jnp.bfloat16


@pytest.mark.slow
def test_z_loss_has_its_value_at_uniform_logits_and_its_gradient():
    assert float(z_loss(jnp.zeros(32768))) == pytest.approx(1.081e-2, rel=1e-3)
    logits = jax.random.normal(jax.random.key(0), (7,))
    found = jax.grad(lambda z: z_loss(z, 0.1))(logits)
    z = np.asarray(logits, np.float64)
    total = np.exp(z).sum()
    np.testing.assert_allclose(found, 0.2 * np.log(total) * np.exp(z) / total, 1e-5)


@pytest.mark.slow
def test_normalized_queries_and_keys_bound_the_logits_whatever_their_size():
    query, key = jax.random.normal(jax.random.key(0), (2, 100, DEPTH)) * 1e4
    query, key = normalize_qk(query, key)
    largest = jnp.abs(query @ key.T).max() / DEPTH**0.5
    assert float(largest) <= DEPTH**0.5 * (1 + 1e-6)
    same = query[0] @ query[0] / DEPTH**0.5
    assert float(same) == pytest.approx(DEPTH**0.5, rel=1e-5)


def vectors(size=1.0):
    return size * jax.random.normal(jax.random.key(0), (3, 2, 5, HEADS, DEPTH))


@pytest.mark.slow
def test_attention_is_that_of_flax_and_tells_the_largest_logit_of_every_head():
    query, key, value = vectors(3.0)
    mask = nnx.make_causal_mask(jnp.ones((2, 5)))
    output, largest = attend(query, key, value, mask)
    expected = nnx.dot_product_attention(query, key, value, mask=mask.astype(bool))
    np.testing.assert_allclose(output, expected, atol=1e-5)
    logits = np.einsum("bqhd,bkhd->bhqk", query, key) / np.sqrt(DEPTH)
    logits = np.where(np.asarray(mask, bool), logits, -np.inf)
    np.testing.assert_allclose(largest, logits.max(axis=(0, 2, 3)), rtol=1e-5)


@pytest.mark.slow
def test_the_cap_of_an_attention_bounds_what_softmax_sees():
    query, key, value = vectors(100.0)
    output, largest = attend(query, key, value, cap=1.0)
    assert float(largest.max()) > 1e4  # Before the cap.
    logits = np.tanh(np.einsum("bqhd,bkhd->bhqk", query, key) / np.sqrt(DEPTH))
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = np.einsum("bhqk,bkhd->bqhd", weights, value)
    np.testing.assert_allclose(output, expected, rtol=1e-3, atol=1e-2)


@pytest.mark.slow
def test_a_query_that_sees_nothing_is_finite():
    query, key, value = vectors()
    nothing = jnp.zeros((2, HEADS, 5, 5), bool)
    loss = lambda q: attend(q, key, value, nothing).output.sum()
    chex.assert_tree_all_finite(jax.grad(loss)(query))


class Network(nnx.Module):
    def __init__(self):
        attention = nnx_layers.Attention(HEADS)
        self.layer = nnx.MultiHeadAttention(
            HEADS, 16, decode=False, attention_fn=attention, rngs=nnx.Rngs(0)
        )


@pytest.mark.slow
def test_after_clip_logits_no_head_of_an_nnx_attention_exceeds_the_limit():
    model, x = Network(), jax.random.normal(jax.random.key(1), (2, 6, 16))
    # Two heads with large logits; biases count as kernels do.
    grown = jnp.array([1.0, 1.0, 40.0, 4.0])[:, None]
    for layer in (model.layer.query, model.layer.key):
        layer.kernel[...] = layer.kernel[...] * grown[None]
        layer.bias[...] = layer.bias[...] + grown
    params = nnx.state(model, nnx.Param)
    model.layer(x)
    before = nnx_layers.largest_logits(model)
    tx, zeros = clip_logits(10.0), jax.tree.map(jnp.zeros_like, params)
    updates, state = jax.jit(tx.update)(
        zeros, tx.init(params), params, largest_logits=before
    )
    nnx.update(model, optax.apply_updates(params, updates))
    model.layer(x)
    after = nnx_layers.largest_logits(model)["layer"]
    expected = np.minimum(before["layer"], 10.0)
    assert (expected == 10.0).sum() == 2
    np.testing.assert_allclose(after, expected, rtol=1e-5)
    for name in ("value", "out"):
        chex.assert_trees_all_equal(updates["layer"][name], zeros["layer"][name])
    now = sg.metrics(state)
    assert now["clip_logits_clipped_steps"] == 1
    assert now["clip_logits_raw_norm"] == before["layer"].max()
    assert now["clip_logits_scale"] == pytest.approx(10 / before["layer"].max())


@pytest.mark.slow
def test_the_logits_of_linen_have_the_names_of_its_parameters():
    attention = linen_layers.Attention(qk_norm=True)
    model = flax.linen.Sequential(
        [
            flax.linen.Dense(16),
            flax.linen.MultiHeadDotProductAttention(HEADS, attention_fn=attention),
        ]
    )
    x = jnp.ones((2, 6, 16))
    variables = model.init(jax.random.key(0), x)
    _, seen = model.apply(variables, x, mutable=["intermediates"])
    logits = linen_layers.largest_logits(seen["intermediates"])
    assert set(logits) == {"layers_1"}
    params = variables["params"]
    tx = clip_logits(1e-3)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params, largest_logits=logits)
    changed = {k for k, v in updates["layers_1"].items() if (v["kernel"] != 0).any()}
    assert changed == {"query", "key"}


def stacked(heads=HEADS):
    kernel = jnp.ones((3, 6, heads, DEPTH), jnp.bfloat16)
    return {"query": {"kernel": kernel}, "key": {"kernel": kernel[:, :, :1]}}


@pytest.mark.slow
def test_stacked_layers_have_a_factor_each_and_shared_keys_are_left_alone():
    params = stacked()
    logits = 100 * jnp.ones((3, HEADS)).at[1, 2].set(4.0)
    tx = clip_logits(100.0, powers={"query": 1.0})
    step = {"query": {"kernel": 3 * params["query"]["kernel"]}, "key": params["key"]}
    updates, _ = tx.update(step, tx.init(params), params, largest_logits={"": logits})
    after = optax.apply_updates(params, updates)["query"]["kernel"]
    expected = np.full((3, 6, HEADS, DEPTH), 4.0)
    expected[1, :, 2] = 1.0
    np.testing.assert_array_equal(after.astype(jnp.float32), expected)
    assert after.dtype == jnp.bfloat16
    chex.assert_trees_all_equal(updates["key"], step["key"])


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_logits_that_are_not_finite_shrink_nothing_and_are_counted(bad):
    params, tx = stacked(), clip_logits()
    logits = {"": jnp.float32(bad)}
    updates, state = tx.update(params, tx.init(params), params, largest_logits=logits)
    chex.assert_trees_all_equal(updates, params)
    now = sg.metrics(state)
    assert (now["clip_logits_dropped_steps"], now["clip_logits_clipped_steps"]) == (
        1,
        0,
    )
    chex.assert_tree_all_finite(state)


@pytest.mark.slow
def test_a_name_within_another_is_that_of_the_nearer_attention():
    params = {"b": {"query": jnp.ones((1, 2)), "att": {"query": jnp.ones((1, 2))}}}
    tx = clip_logits(100.0, powers={"query": 1.0})
    zeros = jax.tree.map(jnp.zeros_like, params)
    logits = {"b": jnp.float32(50.0), "b.att": jnp.float32(400.0)}
    updates, _ = tx.update(zeros, tx.init(params), params, largest_logits=logits)
    chex.assert_trees_all_close(updates["b"]["query"], jnp.zeros((1, 2)))
    chex.assert_trees_all_close(updates["b"]["att"]["query"], jnp.full((1, 2), -0.75))


@pytest.mark.slow
def test_a_guard_hands_the_logits_on_and_a_rejected_step_is_not_counted():
    params = jax.tree.map(lambda x: x.astype(jnp.float32), stacked())
    tx = sg.guard(optax.chain(optax.sgd(0.0), clip_logits()), sg.skip())
    logits = {"": jnp.full((3, 1), 400.0)}
    state = tx.init(params)
    for size in (1.0, jnp.nan):
        grads = jax.tree.map(lambda x, size=size: size * x, params)
        updates, state = tx.update(grads, state, params, largest_logits=logits)
    assert sg.metrics(state)["clip_logits_clipped_steps"] == 1
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, params))


@pytest.mark.parametrize(
    ("logits", "match"),
    [
        (None, "needs the largest logits"),
        ({}, "needs the largest logits"),
        ({"attention": jnp.ones(4)}, r"names \['attention'\], below which no leaf"),
        (
            {"": jnp.ones(3)},
            r"shape \(3,\), which does not fit the leaf key.kernel|query",
        ),
    ],
)
def test_logits_that_are_missing_or_do_not_fit_are_told(logits, match):
    params, tx = stacked(), clip_logits()
    with pytest.raises(ValueError, match=match):
        tx.update(params, tx.init(params), params, largest_logits=logits)
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(params, tx.init(params), largest_logits=logits)


def test_dropout_of_weights_and_wrong_numbers_are_told():
    model = nnx.MultiHeadAttention(
        HEADS,
        16,
        decode=False,
        dropout_rate=0.5,
        deterministic=False,
        attention_fn=nnx_layers.Attention(HEADS),
        rngs=nnx.Rngs(0),
    )
    with pytest.raises(ValueError, match="neither a bias nor dropout"):
        model(jnp.ones((2, 6, 16)))
    for call in (
        lambda: soft_cap(jnp.ones(2), 0.0),
        lambda: soft_cap(jnp.ones(2), float("inf")),
        lambda: z_loss(jnp.ones(2), -1.0),
        lambda: normalize_qk(jnp.ones(2), jnp.ones(2), eps=0.0),
        lambda: clip_logits(0.0),
        lambda: clip_logits(powers={"query": -1.0}),
    ):
        with pytest.raises(ValueError, match=r"must be (finite and )?>"):
            call()
    with pytest.raises(TypeError, match="`logits` must be floating-point, got int32"):
        soft_cap(jnp.arange(3), 2.0)


@pytest.mark.slow
def test_float16_logits_are_added_up_without_overflow_and_capped_by_any_cap():
    # q.k = 115,200 is beyond float16, q.k / sqrt(d) = 10,182 is not.
    query = jnp.full((1, 1, 1, 128), 30.0, jnp.float16)
    for cap in (None, 1e5):
        output, largest = attend(query, query, query, cap=cap)
        assert output.dtype == jnp.float16 and (output == 30.0).all()
        np.testing.assert_allclose(largest, 900 * 128**0.5, rtol=1e-5)


@pytest.mark.slow
def test_logits_work_under_strict_promotion_of_dtypes():
    x = jnp.ones((2, 3, HEADS, DEPTH), jnp.bfloat16)
    with jax.numpy_dtype_promotion("strict"):
        output, _ = attend(x, x, x, qk_norm=True, cap=10.0)
        assert z_loss(x).dtype == jnp.float32
        grads = jax.grad(lambda x: sg.limit_gradient(x, 1.0).sum())(x)
    assert output.dtype == grads.dtype == jnp.bfloat16


@pytest.mark.slow
def test_attention_to_nothing_has_no_largest_logit():
    query, none = jnp.ones((2, 3, HEADS, DEPTH)), jnp.ones((2, 0, HEADS, DEPTH))
    output, largest = attend(query, none, none)
    np.testing.assert_array_equal(output, jnp.zeros_like(query))
    np.testing.assert_array_equal(largest, jnp.full(HEADS, -jnp.inf))


class TwoAttentions(flax.linen.Module):
    """Self-attention and cross-attention, built in one compact method."""

    settings: dict

    @flax.linen.compact
    def __call__(self, x):
        """Attend twice, with queries of different size."""
        for name, size in (("own", 3.0), ("cross", 1.0)):
            attention = linen_layers.Attention(**self.settings)
            layer = flax.linen.MultiHeadDotProductAttention(
                HEADS, name=name, attention_fn=attention
            )
            layer(size * x, x)


@pytest.mark.slow
def test_linen_attentions_of_one_name_are_an_error_and_those_without_a_parent_differ():
    x = jax.random.normal(jax.random.key(0), (2, 5, 16))
    named = TwoAttentions({"parent": None})
    variables = named.init(jax.random.key(1), x)
    _, seen = named.apply(variables, x, mutable=["intermediates"])
    found = linen_layers.largest_logits(seen["intermediates"])
    assert found.keys() == {"own", "cross"}
    clip_logits(1e-3).update(
        variables["params"],
        clip_logits(1e-3).init(variables["params"]),
        variables["params"],
        largest_logits=found,
    )
    alike = TwoAttentions({})
    _, seen = alike.apply(variables, x, mutable=["intermediates"])
    with pytest.raises(ValueError, match=r"called ''.*Attention\(parent=None\)"):
        linen_layers.largest_logits(seen["intermediates"])


class Tied(flax.linen.Module):
    """One attention, applied to inputs of two sizes."""

    sizes: tuple[float, ...]

    def setup(self):
        """Build it."""
        attention = linen_layers.Attention()
        self.layer = flax.linen.MultiHeadDotProductAttention(
            HEADS, attention_fn=attention
        )

    def __call__(self, x):
        """Attend as often as there are sizes."""
        for size in self.sizes:
            self.layer(size * x)


@pytest.mark.slow
def test_of_several_calls_of_a_linen_attention_the_largest_logit_counts():
    x = jax.random.normal(jax.random.key(0), (2, 5, 16))
    variables = Tied((1.0,)).init(jax.random.key(1), x)

    def largest(*sizes):
        _, seen = Tied(sizes).apply(variables, x, mutable=["intermediates"])
        return linen_layers.largest_logits(seen["intermediates"])["layer"]

    np.testing.assert_array_equal(largest(9.0, 1.0), largest(9.0))
    assert (largest(9.0) > largest(1.0)).all()
