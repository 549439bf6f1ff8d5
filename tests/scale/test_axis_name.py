"""`axis_name=`: what counts once, and what is averaged, in a step of many shards."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.mapping import AXIS, DEVICES, mapped
from helpers.marking import core
from jax import lax
from jax.sharding import AxisType, PartitionSpec as P

import stablegrad as sg

pytestmark = pytest.mark.devices(DEVICES)


def one_step(tx, grads, where, check_vma=True, **extra):
    """Metrics of one step from zero; `extra` has one number a device."""
    params = jax.tree.map(jnp.zeros_like, grads)

    def step(params, grads, extra):
        extra = {name: numbers[0] for name, numbers in extra.items()}
        _, state = tx.update(grads, tx.init(params), params, **extra)
        return sg.metrics(state)

    step = mapped(step, (where, where, P(AXIS)), P(), check_vma)
    return step(params, grads, extra)


@pytest.mark.slow
@pytest.mark.parametrize("tracked, copies", [(True, 1), (False, DEVICES)])
def test_a_leaf_that_every_device_has_counts_once_where_that_can_be_told(
    tracked, copies
):
    tx = sg.guard(optax.sgd(1.0), sg.clip(sg.fixed(1.0)), axis_name=AXIS)
    grads = {"shards": jnp.full(DEVICES, 3.0), "whole": jnp.array([5.0])}
    where = {"shards": P(AXIS), "whole": P()}
    seen = one_step(tx, grads, where, tracked)
    norm = (DEVICES * 3.0**2 + copies * 5.0**2) ** 0.5
    np.testing.assert_allclose(seen["grad_norm"], norm, rtol=1e-6)
    np.testing.assert_allclose(seen["clip_scale"], 1 / norm, rtol=1e-6)
    np.testing.assert_allclose(seen["clipped_grad_norm"], 1, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("averaged, shards", [(False, DEVICES), (True, 1)])
def test_skip_bad_steps_sees_all_shards(averaged, shards):
    tx = sg.skip_bad_steps(optax.sgd(1.0), axis_name=AXIS, averaged_gradients=averaged)
    where = {"w": P() if averaged else P(AXIS)}
    grads = {"w": jnp.full(1 if averaged else DEVICES, 3.0)}
    losses = jnp.arange(DEVICES, dtype=jnp.float32)
    seen = one_step(tx, grads, where, check_vma=False, value=losses)
    np.testing.assert_allclose(seen["grad_norm"], 3.0 * shards**0.5, rtol=1e-6)
    np.testing.assert_allclose(seen["loss_value"], (DEVICES - 1) / 2, rtol=1e-6)


@pytest.mark.parametrize("level", [1e-18, 1e17])
def test_norms_of_shards_are_exact_over_the_range_of_float32_squares(level):
    tx = sg.guard(optax.sgd(1.0), axis_name=AXIS)
    seen = one_step(tx, {"w": jnp.full(DEVICES, level).at[0].set(0)}, {"w": P(AXIS)})
    expected = level * (DEVICES - 1) ** 0.5
    np.testing.assert_allclose(seen["grad_norm"], expected, rtol=1e-6)
    assert not seen["skipped"]


@pytest.mark.parametrize(
    "bad, norm, reason",
    [
        (1e30, np.inf, sg.Reason.GRADIENT_OVERFLOW),
        pytest.param(
            *(np.inf, np.inf, sg.Reason.GRADIENT_OVERFLOW), marks=pytest.mark.slow
        ),
        (np.nan, np.nan, sg.Reason.NONFINITE_GRADIENT),
    ],
)
def test_an_overflow_in_one_shard_rejects_the_step_on_all(bad, norm, reason):
    tx = sg.guard(optax.sgd(1.0), axis_name=AXIS)
    grads = {"w": jnp.ones(DEVICES).at[-1].set(bad)}

    def step(grads):
        params = jax.tree.map(jnp.ones_like, grads)
        updates, state = tx.update(grads, tx.init(params), params)
        return updates, jax.tree.map(lambda x: x[None], sg.metrics(state))

    where = {"w": P(AXIS)}
    updates, seen = mapped(step, (where,), (where, P(AXIS)), check_vma=False)(grads)
    np.testing.assert_array_equal(updates["w"], np.zeros(DEVICES))
    np.testing.assert_array_equal(seen["skip_reason"], [reason] * DEVICES)
    np.testing.assert_array_equal(seen["grad_norm"], np.full(DEVICES, norm))


@pytest.mark.parametrize("of", core(["value", "function"], "value"))
@pytest.mark.parametrize(
    "own, skipped",
    core([(40.0, False), (48.0, True), (np.nan, True)], (48.0, True)),
    ids=str,
)
def test_a_signal_of_each_shard_counts_with_its_mean(of, own, skipped):
    losses = jnp.zeros(DEVICES).at[-1].set(own)
    signal = of if of == "value" else lambda updates, params, extra: extra["value"]
    rule = sg.skip(sg.nonfinite(of=signal), sg.fixed(5.5, of=signal))
    tx = sg.guard(optax.sgd(1.0), rule, axis_name=AXIS)
    seen = one_step(tx, {"w": jnp.ones(DEVICES)}, {"w": P(AXIS)}, value=losses)
    assert bool(seen["skipped"]) == skipped
    np.testing.assert_allclose(seen["loss_value"], own / DEVICES)


@pytest.mark.slow
@pytest.mark.parametrize(
    "specs",
    [
        [P("data", "model"), P("model"), P()],
        *(
            pytest.param(specs, marks=pytest.mark.slow)
            for specs in ([P("model")], [P(), P("data")], [P()])
        ),
    ],
)
def test_a_leaf_may_vary_over_both_axes_or_one_or_none(specs):
    axes = {"data": 2, "model": 4}
    tx = sg.guard(optax.sgd(1.0), sg.skip(), axis_name=tuple(axes))
    grid = jax.make_mesh(
        tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * 2
    )
    grads = [jnp.ones([axes[name] for name in spec]) for spec in specs]

    def step(grads):
        return sg.metrics(tx.update(grads, tx.init(grads), grads)[1])

    step = jax.shard_map(step, mesh=grid, in_specs=(specs,), out_specs=P())
    seen = jax.jit(step)(grads)
    norm = sum(leaf.size for leaf in grads) ** 0.5
    np.testing.assert_allclose(seen["grad_norm"], norm, rtol=1e-6)


def test_units_have_no_axis_name():
    with pytest.raises(ValueError, match="axis_name"):
        sg.guard(optax.sgd(1.0), sg.clip(sg.zscore(2.5, per="unit")), axis_name=AXIS)


@pytest.mark.slow
def test_averaged_gradients_need_no_axis_name():
    tx = sg.guard(optax.adam(0.1), sg.clip(sg.fixed(1.0)), sg.skip())
    params = {"w": jnp.ones(4)}
    shares = jnp.arange(4.0 * DEVICES).reshape(DEVICES, 4)

    def step(params, state, share):
        grads = {"w": lax.pmean(share[0], AXIS)}
        return sg.apply(tx, grads, state, params)

    step = mapped(step, (P(), P(), P(AXIS)), P())
    new, state = step(params, tx.init(params), shares)
    alone = jax.jit(lambda share: sg.apply(tx, share, tx.init(params), params))
    expected, other = alone({"w": shares.mean(0)})
    np.testing.assert_allclose(new["w"], expected["w"], rtol=1e-6)
    np.testing.assert_allclose(
        sg.metrics(state)["grad_norm"], sg.metrics(other)["grad_norm"], rtol=1e-6
    )
    bad, state = step(new, state, shares.at[2, 1].set(jnp.nan))
    np.testing.assert_array_equal(bad["w"], new["w"])
    assert sg.metrics(state)["skipped_steps"] == 1
