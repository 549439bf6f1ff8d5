"""Tests for the probe: what it finds along a step, against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.marking import core

from stablegrad.responses.trust_region import _probe

CURVATURE = np.array([1.0, 10.0])
KINDS = ["forward", "hvp"]
BOTH = pytest.mark.parametrize("kind", core(KINDS, "forward"))
ANY = np.float32(np.inf)


def quadratic(params):
    return 0.5 * jnp.sum(jnp.asarray(CURVATURE, jnp.float32) * jnp.abs(params) ** 2)


def along(params, step, loss_fn=quadratic, gradient=None):
    """The attempt to take `step` from `params`."""
    loss, found = jax.value_and_grad(loss_fn)(params)
    gradient = jnp.conj(found) if gradient is None else gradient
    length = optax.tree.norm(step)
    return _probe.Attempt(gradient, lambda: step, params, length, loss, loss_fn)


def look(attempt, kind="forward", scale=1.0, rise=ANY, accept=ANY, aim=0.245):
    """What is found; in one program, which is quicker than one an operation."""
    scale, rise = jnp.float32(scale), jnp.float32(rise)
    return jax.jit(lambda: _probe.look(attempt, kind, scale, rise, accept, aim))()


def r_of(found):
    return _probe.ratio(found.excess, found.slope)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_excess_slope_and_ratio_are_the_closed_forms_of_a_quadratic(kind):
    rng = np.random.default_rng(0)
    params = rng.normal(size=(50, 2))
    step = -rng.uniform(0.05, 2, size=(50, 1)) * CURVATURE**0.5 * params
    scale = rng.uniform(0.1, 1, size=50)

    def one(params, step, scale):
        found = look(along(params, step), kind, scale)
        return found, r_of(found)

    found, r = jax.jit(jax.vmap(one))(*map(jnp.float32, (params, step, scale)))
    moved = scale[:, None] * step
    slope = np.sum(CURVATURE * params * moved, axis=1)
    excess = 0.5 * np.sum(CURVATURE * moved**2, axis=1)
    np.testing.assert_allclose(found.slope, slope, rtol=1e-5)
    # The forward pass subtracts two losses; the product of jvps does not.
    rounding = 1e-6 if kind == "forward" else 0
    room = rounding * np.sum(CURVATURE * params**2, axis=1)
    assert (np.abs(found.excess - excess) <= 1e-5 * excess + room).all()
    assert (np.abs(r - excess / -slope) <= 1e-5 * r + room / -slope).all()
    assert (found.part == 1).all() and (found.looks == 1).all()
    assert found.known.all() and found.accepted.all()


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize(
    "tx, critical",
    [
        (optax.sgd(1.0), 2 * 101 / 1001),
        pytest.param(optax.scale_by_sign(), 2.0, marks=pytest.mark.slow),
    ],
    ids=["sgd", "adam's first step"],
)
def test_one_over_r_is_the_critical_multiple_of_the_step(kind, tx, critical):
    # theory.md 1.4: at theta = (1, 1), 0.201798 for SGD and 2.0 for Adam's first step.
    params = jnp.ones(2)
    grads = jax.grad(quadratic)(params)
    step = tx.update(grads, tx.init(params))[0]
    step = -jnp.abs(step)  # `scale_by_sign` ascends.
    np.testing.assert_allclose(1 / r_of(look(along(params, step), kind)), critical)


@BOTH
@pytest.mark.parametrize("decay", core([0.5, 0.9], 0.9))
def test_heavy_ball_gains_nothing_a_step_in_the_mode_at_its_limit(kind, decay):
    # eta lambda = 2 + 2 b: parameters only change their sign, and m with them.
    rate = (2 + 2 * decay) / CURVATURE[1]
    params = jnp.array([0.0, 1.0])
    tx = optax.sgd(rate, momentum=decay)
    trace = jax.tree.map(lambda _: -2 * params / rate, tx.init(params))
    step = tx.update(jax.grad(quadratic)(params), trace)[0]
    np.testing.assert_allclose(step, -2 * params, rtol=1e-5)
    np.testing.assert_allclose(r_of(look(along(params, step), kind)), 1, rtol=1e-5)


@BOTH
def test_a_step_that_is_too_long_is_shortened_to_where_r_is_the_aim(kind):
    params = jnp.ones(2)
    step = -1.0 * jax.grad(quadratic)(params)
    found = look(along(params, step), kind, accept=0.35, aim=0.245)
    np.testing.assert_allclose(found.part, 0.245 * 2 * 101 / 1001, rtol=1e-5)
    np.testing.assert_allclose(r_of(found), 0.245, rtol=1e-4)
    assert found.looks == 2 and found.accepted


@BOTH
def test_one_look_shortens_by_a_hundred_at_most(kind):
    params = jnp.ones(2)
    step = -1e4 * jax.grad(quadratic)(params)
    found = look(along(params, step), kind, accept=0.35, aim=0.245)
    assert found.looks == 4 and found.accepted  # 1e-2, 1e-4, and the rest.
    np.testing.assert_allclose(r_of(found), 0.245, rtol=1e-3)


def test_a_part_may_be_taken_as_far_as_the_loss_rises_by_what_is_allowed():
    params = jnp.ones(2)
    step = -0.3 * jax.grad(quadratic)(params)
    rise = 0.5 * 0.09 * 1001 - 0.3 * 101
    for allowed, looks in ((rise * 1.001, 1), (rise * 0.999, 2)):
        assert look(along(params, step), rise=allowed).looks == looks


@pytest.mark.parametrize("beyond", [np.nan, np.inf])
def test_a_wall_of_the_loss_is_not_run_into(beyond):
    wall = lambda p: jnp.where(jnp.abs(p[0]) > 0.01, beyond, -p[0])
    attempt = along(jnp.zeros(2), jnp.array([5.0, 0.0]), wall)
    found = look(attempt)
    # Blind, it goes ten times nearer each time: 5, 0.5, 0.05, 0.005.
    np.testing.assert_allclose(found.part, 1e-3, rtol=1e-5)
    assert found.looks == 4 and found.accepted and found.known


@BOTH
def test_it_gives_up_where_the_loss_is_finite_nowhere(kind):
    nowhere = lambda p: quadratic(p) * jnp.nan
    attempt = along(jnp.ones(2), -jnp.ones(2))._replace(loss_fn=nowhere)
    found = look(attempt, kind)
    assert found.looks == _probe.TRIES and not found.accepted and not found.known
    assert 0 < found.part < 1e-6 and jnp.isfinite(found.slope)


@pytest.mark.slow
def test_curvature_at_the_parameters_is_all_that_hvp_sees():
    wall = lambda p: jnp.where(p[0] > 0.5, jnp.nan, quadratic(p - 1))
    attempt = along(jnp.zeros(2), jnp.array([1.0, 0.0]), wall)
    assert look(attempt, "hvp").looks == 1
    assert look(attempt, "forward").looks > 1


def test_hvp_measures_a_step_that_is_lost_in_the_rounding_of_the_loss():
    params = jnp.ones(2)
    step = -1e-7 * jax.grad(quadratic)(params)
    attempt = along(params, step, lambda p: quadratic(p) + 100)
    np.testing.assert_allclose(r_of(look(attempt, "hvp")), 1e-7 * 1001 / 202, rtol=1e-4)


def test_a_step_that_does_not_descend_has_no_ratio():
    attempt = along(jnp.ones(2), 0.01 * jnp.ones(2))
    found = look(attempt, accept=0.35)
    assert found.slope > 0 and found.known and found.accepted and found.looks == 1
    assert r_of(found) == jnp.inf
    assert _probe.ratio(jnp.float32(1), jnp.float32(0)) == jnp.inf
    assert _probe.ratio(jnp.float32(np.nan), jnp.float32(-1)) == jnp.inf


def test_a_promise_beyond_float32_is_not_known():
    huge = jnp.full(2, 1e30)
    found = look(along(jnp.ones(2), -huge, gradient=huge), accept=0.35)
    assert not found.known and not found.accepted
    assert found.slope == 0 and 0 < found.part < 1e-6


@BOTH
def test_complex_leaves_count_as_pairs_and_integers_not_at_all(kind):
    params = {"n": jnp.int32(3), "z": jnp.array([1 + 1j, 2 - 1j])}
    loss_fn = lambda p: quadratic(p["z"]) + 0.0 * p["n"].astype(jnp.float32)
    z = np.asarray(params["z"])
    gradient = {"n": jnp.int32(0), "z": jnp.asarray(CURVATURE * z, jnp.complex64)}
    step = {"n": jnp.int32(0), "z": -0.05 * gradient["z"]}
    attempt = _probe.Attempt(
        gradient, lambda: step, params, jnp.float32(1), loss_fn(params), loss_fn
    )
    found = look(attempt, kind)
    first, second = (np.sum(CURVATURE**k * np.abs(z) ** 2) for k in (2, 3))
    np.testing.assert_allclose(found.slope, -0.05 * first, rtol=1e-5)
    np.testing.assert_allclose(found.excess, 0.5 * 0.05**2 * second, rtol=1e-4)


@pytest.mark.slow
@BOTH
def test_half_precision_parameters_are_summed_in_float32(kind):
    params = jnp.ones(2000, jnp.bfloat16)
    loss_fn = lambda p: 0.5 * jnp.sum(p.astype(jnp.float32) ** 2)
    found = look(along(params, -0.5 * params, loss_fn), kind)
    np.testing.assert_allclose(found.slope, -1000, rtol=1e-6)
    np.testing.assert_allclose(r_of(found), 0.25, rtol=1e-5)


@pytest.mark.parametrize("c, mismatch", [(0.1, False), (1.0, False), (3.0, True)])
def test_gradients_of_another_loss_are_told_from_steps_too_long(c, mismatch):
    params = jnp.array([1.0, 1.0])
    for rate in (1e-3, 30.0):
        gradient = c * jax.grad(quadratic)(params)
        attempt = along(params, -rate * gradient, gradient=gradient)
        found = look(attempt, accept=0.35)
        assert found.mismatch == mismatch
        assert found.accepted == (not mismatch)


def test_the_promise_is_of_what_rounded_parameters_really_change():
    params = jnp.full(2, 1.0, jnp.bfloat16)  # Its unit in the last place is 1/128.
    loss_fn = lambda p: jnp.sum(p.astype(jnp.float32))
    gradient = jnp.ones(2, jnp.bfloat16)
    for wanted, done in ((-1e-3, 0.0), (-3e-3, -1 / 256), (-0.1, -26 / 256)):
        attempt = along(params, jnp.full(2, wanted), loss_fn, gradient)
        promised = _probe.slope_along(attempt, jnp.float32(1))
        np.testing.assert_allclose(promised, 2 * done, rtol=1e-6)


@pytest.mark.parametrize("pitch", [7.0, 9.0, 11.0])
def test_a_rough_loss_is_no_mismatch_though_no_part_of_the_step_may_be_taken(pitch):
    # r is 0.7 give or take 0.25, and another at almost every look.
    wave = lambda x: 0.3 + 0.25 * jnp.sin(pitch * jnp.log(jnp.maximum(x, 1e-30)))
    one, zero = jnp.ones(()), jnp.zeros(())
    attempt = _probe.Attempt(-one, lambda: one, zero, one, zero, lambda x: -x * wave(x))
    found = look(attempt, accept=0.35)
    assert found.looks == _probe.TRIES and not found.accepted and not found.mismatch
