"""What the clips of a chain survive: wide dtypes, swept settings, masks, resets."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.clipping import PARAMS, run
from helpers.marking import core

import stablegrad as sg


def ones(steps):
    return np.full((steps, 11), 11**-0.5, np.float32)


INJECTED = [
    (sg.clip_by_norm, {"max_norm": 0.5}),
    (sg.clip_by_zscore, {"z": 2.0}),
    (sg.clip_by_percentile, {"q": 90.0}),
    (sg.clip_by_ema, {"ratio": 2.0}),
    (sg.clip_by_param_norm, {"ratio": 0.1}),
    (sg.clip_by_second_moment, {"threshold": 25.0}),
    (sg.clip_update_rms, {"max_rms": 2.0}),
    (sg.clip_by_max, {"ratio": 2.0}),
    (sg.limit_direction, {"min_cosine": -0.5}),
]


def test_settings_of_the_published_method_alone_need_no_static_arguments():
    tx = optax.inject_hyperparams(sg.clip_by_max)(ratio=2.0)
    assert tx.init(PARAMS).hyperparams.keys() == {"ratio"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "make, settings",
    core(INJECTED, INJECTED[1], INJECTED[-1]),
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_settings_may_be_injected(make, settings):
    static = ("warmup_steps", "window", "reset_every", "published", "per", "mode")
    static += ("option", "skip_update_on_spike", "rewarmup_steps", "reset_on_spike")
    known = make.__kwdefaults__ | settings
    tx = optax.inject_hyperparams(
        make, static_args=[name for name in static if name in known]
    )(**settings)
    state = tx.init(PARAMS)
    name = next(iter(settings))
    state.hyperparams[name] = jnp.asarray(settings[name] * 0.9)
    updates, after = jax.jit(tx.update)(PARAMS, state, PARAMS)
    chex.assert_tree_all_finite((updates, after))
    chex.assert_trees_all_equal_shapes_and_dtypes(state, after)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip_by_second_moment", "clip_by_max"])
def test_a_large_float64_is_clamped_to_size_and_one_beyond_1e18_dropped(name, x64):
    tx, params = getattr(sg, name)(), {"w": jnp.ones(3, jnp.float64)}
    state, step = tx.init(params), jax.jit(tx.update)
    for _ in range(30):
        _, state = step(params, state, params)
    updates, state = step({"w": params["w"].at[1].set(1e17)}, state, params)
    chex.assert_tree_all_finite((updates, state))
    assert 1.5 < updates["w"][1] < 100
    updates, state = step({"w": params["w"].at[1].set(1e40)}, state, params)
    chex.assert_tree_all_finite(state)
    np.testing.assert_array_equal(updates["w"], 0.0)
    assert sg.metrics(state)[f"{name}_dropped_steps"] == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        lambda: sg.clip_by_second_moment(published=True),
        lambda: sg.clip_update_rms(
            inner=optax.adam(0.1), decay=np.float64(0.9), published=True
        ),
        lambda: sg.clip_by_max(decay=np.float64(0.9), published=True),
        lambda: sg.limit_direction(decay=np.float64(0.9)),
    ],
)
def test_wide_settings_and_parameters_do_not_widen_the_state(make, x64):
    tx, params = make(), {"w": jnp.ones(3, jnp.float64)}
    state = tx.init(params)
    _, after = jax.jit(tx.update)(params, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, after)


@pytest.mark.slow
def test_a_second_spike_after_a_reset_is_still_seen():
    flat = ones(60)
    flat[30:32] *= 1e17
    for inner in (None, optax.adam(1.0)):
        tx = sg.clip_by_second_moment(inner=inner, reset_on_spike=True)
        out, state = run(tx, flat)
        chex.assert_tree_all_finite(state)
        assert np.abs(out[31]).max() < 100
        if inner is not None:
            assert (np.abs(out[-5:]) > 0.01).all()  # Adam is not frozen.


# Below the overflow, and above it.
@pytest.mark.parametrize("size", core([9e17, 1e20], 1e20))
def test_a_huge_first_step_leaves_adam_finite(size):
    flat = ones(40)
    flat[0] *= size
    _, state = run(sg.clip_by_second_moment(inner=optax.adam(1.0)), flat)
    chex.assert_tree_all_finite(state)


@pytest.mark.slow
def test_directions_that_cancel_have_no_limit():
    flat = ones(200)
    flat[1::2] *= -1 / 3
    out, _ = run(sg.limit_direction(), flat)
    np.testing.assert_array_equal(out, flat)


@pytest.mark.slow
def test_the_largest_gradients_are_turned_without_overflow():
    flat = ones(60)
    flat[50] *= -9e17
    out, state = run(sg.limit_direction(), flat)
    assert np.isfinite(out).all()
    chex.assert_tree_all_finite(state)
    assert np.linalg.norm(out[50] / 9e17) < 0.1  # Nothing lies across the mean.
    seen = sg.metrics(state)
    assert seen["limit_direction_clipped_steps"] == 1
    assert seen["limit_direction_dropped_steps"] == 0


def test_parameters_that_are_not_finite_have_no_limit():
    params = {"kernel": jnp.full((3, 2), jnp.nan)}
    grads = {"kernel": jnp.ones((3, 2))}
    tx = sg.clip_by_param_norm()
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    chex.assert_trees_all_equal(updates, grads)


def test_an_optimizer_of_some_parameters_only_is_an_error():
    inner = optax.masked(optax.adam(0.1), {"a": True, "b": False, "c": True})
    with pytest.raises(ValueError, match="of all parameters"):
        sg.clip_by_second_moment(inner=inner).init(PARAMS)


def test_metrics_number_clips_of_one_name_however_many_and_however_deep():
    inner = optax.chain(sg.clip_update_rms(3.0), optax.sgd(0.1))
    clips = [sg.clip_by_norm(1.0) for _ in range(6)]
    tx = optax.chain(*clips, sg.clip_update_rms(inner=inner))
    seen = sg.metrics(tx.init(PARAMS))
    names = {key.removesuffix("_scale") for key in seen if key.endswith("_scale")}
    numbered = {"clip_by_norm", *[f"clip_by_norm_{i}" for i in range(2, 7)]}
    assert names == {*numbered, "clip_update_rms", "clip_update_rms_2"}


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: sg.clip_by_second_moment(1.0), "`threshold` must be > 1"),
        (lambda: sg.clip_by_ema(max_norm=2.0), "belongs to the published rule"),
        (lambda: sg.clip_by_max(reset_every=3), "belongs to the published rule"),
        (
            lambda: sg.clip_by_zscore(published=True, clip_factor=-1.0),
            "`clip_factor` must be > 0",
        ),
        (
            lambda: sg.clip_by_second_moment(published=True, reset_on_spike=True),
            "`reset_on_spike` must be False",
        ),
    ],
)
def test_rejects_arguments_that_do_not_fit(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "name",
    core(
        [
            "clip_by_norm",
            "clip_by_zscore",
            "clip_by_percentile",
            "clip_by_ema",
            "clip_by_param_norm",
            "clip_by_second_moment",
            "clip_by_max",
            "limit_direction",
        ],
        "clip_by_norm",
    ),
)
def test_a_norm_of_1e18_is_dropped_though_its_square_is_finite(name):
    tx = sg.clip_by_norm(1.0) if name == "clip_by_norm" else getattr(sg, name)()
    params, step = {"w": jnp.ones(3)}, jax.jit(tx.update)
    state = tx.init(params)
    for size, dropped in ((0.9e18, 0), (1.1e18, 1)):
        updates, state = step({"w": params["w"] * size / 3**0.5}, state, params)
        assert sg.metrics(state)[f"{name}_dropped_steps"] == dropped
    np.testing.assert_array_equal(updates["w"], 0.0)


@pytest.mark.slow
def test_the_second_moment_of_complex_parameters_is_read_as_real():
    tx = sg.clip_by_second_moment(inner=optax.adam(0.1))
    grads = {"w": jnp.array([1 + 1j, 2 - 1j], jnp.complex64)}
    state = tx.init(grads)
    for _ in range(3):
        updates, state = jax.jit(tx.update)(grads, state, grads)
    bare = optax.adam(0.1)
    expected, _ = bare.update(grads, bare.init(grads), grads)
    np.testing.assert_allclose(updates["w"], expected["w"], rtol=1e-4)
    spike = {"w": jnp.array([1 + 1j, 2e6 - 1e6j], jnp.complex64)}
    _, state = jax.jit(tx.update)(spike, state, grads)
    assert sg.metrics(state)["clip_by_second_moment_clipped_norm"] < 200
