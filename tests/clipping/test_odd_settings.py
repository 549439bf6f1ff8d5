"""Settings at the edge of their range, published rules, groups of none."""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import stablegrad as sg
from stablegrad.granularity._units import unit_axes

W = {"w": jnp.array([1.0, 2.0])}


@pytest.mark.slow
@pytest.mark.parametrize("clip", [sg.clip_by_zscore, sg.clip_by_ema])
def test_a_warm_up_may_be_longer_than_the_patience(clip):
    tx = clip(warmup_steps=100)
    updates, _ = tx.update(W, tx.init(W))
    np.testing.assert_array_equal(updates["w"], W["w"])
    with pytest.raises(ValueError, match="`warmup_steps`"):
        clip(warmup_steps="long")


def test_a_published_setting_as_an_array_is_an_error_too():
    with pytest.raises(ValueError, match="`max_norm` belongs to the published rule"):
        sg.clip_by_zscore(2.5, max_norm=jnp.asarray(0.1))
    inject = optax.inject_hyperparams(sg.clip_by_zscore, static_args="warmup_steps")
    injected = inject(z=2.5)
    injected.update(W, injected.init(W))


@pytest.mark.parametrize("shape", [(5, 3), (3, 4, 5), (3, 3, 2, 4), (1, 1, 6)])
def test_published_agc_has_the_units_of_the_paper(shape):
    rng = np.random.default_rng(0)
    params = {"embedding": jnp.asarray(rng.normal(size=shape), jnp.float32)}
    grads = {"embedding": jnp.asarray(100 * rng.normal(size=shape), jnp.float32)}
    ours = sg.clip_by_param_norm(0.01, published=True)
    found, _ = ours.update(grads, ours.init(params), params)
    leaf, grad = np.float64(params["embedding"]), np.float64(grads["embedding"])
    axes = None if len(shape) == 3 and shape[0] == 1 else (0,)
    axes = (0, 1, 2) if len(shape) == 4 else axes
    norm = lambda x: np.sqrt(np.sum(x * x, axis=axes, keepdims=True))
    most = 0.01 * np.maximum(norm(leaf), 1e-3)
    expected = grad * np.minimum(1, most / norm(grad))
    np.testing.assert_allclose(found["embedding"], expected, rtol=1e-5)


@pytest.mark.slow
def test_a_published_rule_of_accepted_steps_does_not_learn_an_overflow():
    tx = sg.skip_bad_steps(optax.sgd(1.0), "axlearn_mean", published=True)
    params = {"w": jnp.zeros(2)}
    state, step = tx.init(params), jax.jit(tx.update)
    for _ in range(50):
        _, state = step({"w": jnp.ones(2)}, state, params)
    _, state = step({"w": jnp.full(2, 3e18)}, state, params)
    updates, state = step({"w": jnp.full(2, 1e6)}, state, params)
    np.testing.assert_array_equal(updates["w"], 0.0)
    assert sg.metrics(state)["skipped_steps"] == 2


@pytest.mark.parametrize("per", ["leaf", lambda path, leaf: None])
@pytest.mark.parametrize("rule", [sg.skip, sg.back_off])
def test_a_threshold_of_no_group_judges_nothing(rule, per):
    params = {"n": jnp.zeros(3, jnp.int32)} if per == "leaf" else W
    tx = sg.guard(optax.sgd(0.1), rule(sg.rarity(per=per)))
    _, state = tx.update(params, tx.init(params), params)
    assert sg.metrics(state)["skipped_steps"] == 0


def test_an_event_names_the_group_that_is_furthest_above_its_limit():
    tx = sg.guard(optax.sgd(0.1), sg.skip(sg.fixed(1.0, per="leaf")))
    grads = {"a": jnp.array([1.1]), "b": jnp.array([900.0]), "c": jnp.array([2.0])}
    _, state = tx.update(grads, tx.init(grads), grads)
    (event,) = sg.events(state)
    assert event.value == 900.0 and event.limit == 1.0


def test_limits_of_functions_whose_names_begin_alike_are_told_apart():
    def a_limit(updates, params, extra):
        return jnp.float32(0)

    def a(updates, params, extra):
        return jnp.float32(0)

    rule = sg.skip(sg.fixed(1.0, of=a_limit), sg.fixed(1.0, of=a), sg.fixed(2.0, of=a))
    tx = sg.guard(optax.sgd(0.1), rule)
    names = {"skip_fixed_a_limit_limit", "skip_fixed_a_limit", "skip_fixed_a_limit_2"}
    assert names <= sg.metrics(tx.init(W)).keys()


def test_a_published_clip_by_max_reports_what_it_scales():
    tx = sg.clip_by_max(published=True)
    state = tx.init(W)
    _, state = tx.update({"w": jnp.array([jnp.nan, 1.0])}, state, W)
    updates, state = tx.update(W, state, W)
    np.testing.assert_array_equal(updates["w"], W["w"])
    assert sg.metrics(state)["clip_by_max_scale"] == 1


def test_a_nan_leaves_the_other_elements_of_a_published_rms_clip():
    tx = sg.clip_update_rms(inner=optax.sgd(1.0), published=True)
    updates, _ = tx.update({"w": jnp.array([jnp.nan, 1.0])}, tx.init(W), W)
    np.testing.assert_array_equal(updates["w"], [np.nan, -1.0])


def test_a_published_second_moment_of_complex_leaves_is_real():
    params = {"w": jnp.ones(2) * (1 + 1j)}
    tx = sg.clip_by_second_moment(published=True, inner=optax.adam(1e-3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        updates, _ = tx.update(params, tx.init(params), params)
    assert np.isfinite(updates["w"]).all()


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["olmo", "axlearn_mean", "axlearn_deviation"])
def test_published_skip_rules_pass_strict_promotion(rule, strict, x64):
    params = {"w": jnp.ones(2, jnp.float32)}
    tx = sg.skip_bad_steps(optax.sgd(0.1), rule, published=True)
    tx.update(params, tx.init(params), params, value=jnp.float32(1))


@pytest.mark.slow
@pytest.mark.parametrize("published", [False, True])
def test_percentiles_pass_strict_promotion_with_wide_defaults(published, strict, x64):
    params = {"w": jnp.ones(2, jnp.float32)}
    tx = sg.clip_by_percentile(published=published)
    tx.update(params, tx.init(params), params)


@pytest.mark.slow
@pytest.mark.parametrize(
    "threshold", [sg.zscore, lambda x: sg.rarity(margin=x), sg.fixed]
)
def test_settings_beyond_float32_are_no_warning(threshold):
    tx = sg.guard(optax.sgd(0.1), sg.skip(threshold(1e300)))
    _, state = tx.update(W, tx.init(W), W)
    assert sg.metrics(state)["skipped_steps"] == 0


def test_a_label_that_holds_a_list_is_an_error():
    tx = sg.guard(optax.sgd(0.1), sg.skip(sg.fixed(1.0, per=lambda path, leaf: ([1],))))
    with pytest.raises(ValueError, match="a label that can be hashed"):
        tx.init(W)


def test_four_axes_are_a_convolution_and_embeddings_are_judged_by_row():
    assert unit_axes({"conv": {"kernel": jnp.zeros((3, 3, 4, 4))}}) == ((0, 1, 2),)
    assert unit_axes({"embed": {"embeddings": jnp.zeros((5, 3))}}) == ((1,),)


@pytest.mark.slow
def test_a_bias_tells_the_layers_of_stacked_convolutions():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.relu(nn.Conv(4, (3, 3))(x)), None

    scanned = nn.scan(
        Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=5
    )
    x = jnp.zeros((1, 8, 8, 4))
    params = jax.eval_shape(
        lambda: scanned().init(jax.random.key(0), x, None)["params"]
    )
    assert unit_axes(params) == ((1,), (1, 2, 3))
