"""Settings and signals at the edge of what a guard can be given."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import stablegrad as sg
from stablegrad.thresholds._base import Threshold

ONE = jnp.ones(())


def taken(responses, rows, *, norm=False):
    """The metrics of a scanned run whose losses, or gradients, are `rows`."""
    tx = sg.guard(optax.sgd(1.0), *responses)

    def step(state, x):
        grads, value = (x, ONE) if norm else (ONE, x)
        _, state = tx.update(grads, state, jnp.zeros(()), value=value)
        return state, sg.metrics(state)

    rows = jnp.asarray(rows, jnp.float32)
    return jax.jit(lambda: jax.lax.scan(step, tx.init(jnp.zeros(())), rows)[1])()


@pytest.mark.parametrize(
    "piece, length",
    [
        (sg.clip(sg.fixed(1.0, of="update_norm")), 1.0),
        (sg.back_off(sg.fixed(0.0), limit=sg.fixed(1.0, of="update_norm")), 0.5),
    ],
    ids=["clip", "back_off"],
)
def test_an_update_that_overflows_is_clipped_or_refused(piece, length):
    blows_up = optax.stateless(
        lambda g, p: jax.tree.map(lambda x: jnp.where(x > 5, jnp.inf, 1e3 * x), g)
    )
    tx = sg.guard(blows_up, piece)
    params = jnp.zeros(2)
    update = jax.jit(tx.update)
    _, state = update(jnp.ones(2), tx.init(params), params)
    # Of 3e18 squares can be added up, of 1e20 they cannot.
    for factor, refused in ((3e15, False), (1e17, True), (jnp.inf, True)):
        blown = optax.stateless(lambda g, p, f=factor: f * g)
        own = sg.guard(blown, piece)
        grads = jnp.array([1e3, 0.5])
        updates, after = jax.jit(own.update)(grads, state, params)
        expected = [0.0, 0.0] if refused else [length, 0.0]
        np.testing.assert_allclose(updates, expected, atol=1e-3)
        assert bool(sg.metrics(after)["skipped"]) is refused
        if refused:
            assert sg.events(after)[-1].reason == "nonfinite_update"
    updates, after = update(jnp.array([4.0, 9.0]), state, params)
    np.testing.assert_array_equal(updates, [0.0, 0.0])
    assert sg.metrics(after)["skipped"]


@pytest.mark.parametrize(
    "threshold",
    [
        lambda h: sg.ema_ratio(2.0, decay=0.98 + h),
        lambda h: sg.zscore(6.0, decay=0.98 + h),
        lambda h: sg.percentile(0.99 + h),
        lambda h: sg.rarity(0.01 + h),
    ],
    ids=["ema_ratio", "zscore", "percentile", "rarity"],
)
def test_a_traced_setting_that_is_nan_once_does_not_lock_in(threshold):
    params = jnp.zeros(())
    make = lambda h: sg.guard(optax.sgd(1.0), sg.clip(threshold(h)))

    def step(state, setting):
        _, state = make(setting).update(ONE, state, params)
        return state, sg.metrics(state)["skipped"]

    settings = jnp.zeros(90).at[60].set(jnp.nan)
    run = jax.jit(lambda: jax.lax.scan(step, make(0.0).init(params), settings))
    state, skipped = run()
    assert not skipped[62:].any()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_a_threshold_of_ones_own_may_keep_any_floats(dtype):
    own = Threshold(
        "average",
        "grad_norm",
        "global",
        lambda groups: jnp.full((groups,), 0.75, dtype),
        lambda state, scale: 2 * state,
        lambda state, signal, exceeded: 0.5 * state + 0.5 * signal,
    )
    seen = taken([sg.clip(own)], [1.0, 1.0, 1.0], norm=True)
    limits = seen["clip_average_grad_norm_limit"]
    np.testing.assert_allclose(limits, [1.5, 1.75, 1.875], rtol=1e-2)


@pytest.mark.parametrize("value", [3_000_000_000, np.int64(3_000_000_000), 10**11])
def test_a_whole_number_beyond_int32_is_a_loss_as_any_other(value):
    tx = sg.guard(optax.sgd(1.0), sg.skip(sg.fixed(1e9, of="value")))
    _, state = tx.update(ONE, tx.init(ONE), ONE, value=value)
    seen = sg.metrics(state)
    assert seen["skipped"] and float(seen["loss_value"]) == float(np.float32(value))
    plateau = sg.reduce_on_plateau(metric=None).init(ONE)
    plateau = sg.observe_metric(plateau, value=value)
    assert float(sg.metrics(plateau)["plateau_best"]) == float(np.float32(value))


@pytest.mark.parametrize("rule", [sg.zscore, sg.window_zscore])
def test_the_unit_of_a_loss_does_not_matter_however_small(rule):
    losses = np.exp(0.1 * np.random.default_rng(0).normal(size=120))
    losses[100] *= 10
    refused = lambda unit: taken([sg.skip(rule(6.0, of="value"))], unit * losses)
    expected = refused(1.0)["skipped"]
    assert expected[100]
    for unit in (1e-13, 1e-20):
        np.testing.assert_array_equal(refused(unit)["skipped"], expected)


def test_a_scale_cannot_fall_below_the_smallest_normal_number():
    with pytest.raises(ValueError, match=r"`min_scale` must be in \[1.2e-38, 1\]"):
        sg.back_off(sg.fixed(5.0, of="value"), min_scale=1e-40)
    least = {"factor": 1e-20, "min_scale": 1.2e-38, "hold_steps": 0}
    cut = sg.back_off(sg.fixed(5.0, of="value"), **least)
    scales = taken([cut], [1, 9, 9, 9, 9, 1, 1])["lr_scale"]
    assert (scales[1:] > 0).all() and (scales[1:] < 1e-10).all()
