"""Tests for `stablegrad.trust_region`: what it does to training."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.marking import core
from helpers.training import stack

import stablegrad as sg

CURVATURE = (1.0, 10.0)
START = jnp.array([1.0, 1.0])
PROBES = ["forward", "hvp"]
BOTH = pytest.mark.parametrize("probe", core(PROBES, "forward"))
FREE = float(np.finfo(np.float32).max)
TINY = float(np.finfo(np.float32).tiny)  # Below it a GPU keeps digits, a CPU none.
RUNS, STEPS = 64, 400  # Of `sgd_runs`, compiled once for each probe.


def quadratic(params):
    return 0.5 * jnp.sum(jnp.array(CURVATURE) * params**2)


def guarded(inner, *others, **options):
    return sg.guard(inner, *others, sg.trust_region(**options))


def run(tx, loss_fn, params, steps, seen=None):
    """Trains by `update` in one scan; every step is told its own number.

    `seen(t, loss_fn)` may change what it is given beside the loss.
    """
    tx = optax.with_extra_args_support(tx)

    def step(carry, t):
        params, state = carry
        extra = seen(t, loss_fn) if seen else {"value_fn": loss_fn}
        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = tx.update(grads, state, params, value=loss, **extra)
        found = {"loss": loss, "params": params}
        if hasattr(state, "guarded_inner"):
            found |= sg.metrics(state)
        return (optax.apply_updates(params, updates), state), found

    carry = (params, tx.init(params))
    (params, state), found = jax.lax.scan(step, carry, jnp.arange(steps))
    return state, found | {"last": loss_fn(params), "params_last": params}


def starting_with(radius, response):
    """The same response with another radius before the first step."""
    init_state = lambda: response.init_state()._replace(trust_radius=radius)
    return response._replace(init_state=init_state)


@functools.cache
def sgd_compiled(probe):
    """Many runs of SGD on the quadratic, of which every step may be bent."""

    def one(radius, offset, bends):
        rate_of = lambda count: bends["rate"][count]
        response = sg.trust_region(probe=probe)
        tx = sg.guard(optax.sgd(rate_of), starting_with(radius, response))

        def step(carry, bend):
            params, state = carry
            weighted = lambda p: bend["weight"] * quadratic(p) + offset
            loss, grads = jax.value_and_grad(weighted)(params)
            value = jnp.where(bend["value"] == 0, loss, bend["value"])
            grads = grads * bend["grads"]
            updates, state = tx.update(
                grads,
                state,
                params,
                value=value,
                value_fn=lambda p: (
                    weighted(p)
                    + jnp.where(bend["early"] * jnp.all(p == params), 0.0, bend["rise"])
                ),
            )
            found = sg.metrics(state) | {"params": params, "loss": quadratic(params)}
            found |= {"updates": updates, "grads": grads}
            return (optax.apply_updates(params, updates), state), found

        state = tx.init(START)
        (params, state), found = jax.lax.scan(step, (START, state), bends)
        return state, found | {"last": quadratic(params)}

    return jax.jit(jax.vmap(one))


def sgd_runs(rate, *, probe="forward", radius=FREE, offset=0.0, **bends):
    """As many runs as the first axis of `rate` is long; in numpy.

    `rate` and `bends` may differ at every step: `weight` of the loss, `value` in its
    place if not 0, a factor on `grads`, and the `rise` of `value_fn` above it.
    """
    runs = len(np.atleast_1d(rate))
    usual = {"rate": 0.1, "weight": 1.0, "value": 0.0, "grads": 1.0, "rise": 0.0}

    def table(rows, shape):
        rows = np.asarray(rows, np.float32)
        rows = rows[:, None] if rows.ndim == len(shape) - 1 and rows.ndim else rows
        rows = np.broadcast_to(rows, (runs, *shape[1:]))
        return np.concatenate([rows, np.repeat(rows[-1:], RUNS - runs, axis=0)])

    each = [table(x, (RUNS,)) for x in (radius, offset)]
    rows = {k: table(v, (RUNS, STEPS)) for k, v in (usual | bends).items()}
    rows["rate"] = table(rate, (RUNS, STEPS))
    # In the first probes the loss is looked at where it was taken, too.
    rows["early"] = table(np.arange(STEPS)[None] < 5, (RUNS, STEPS))
    out = sgd_compiled(probe)(*each, rows)
    return jax.tree.map(lambda x: np.asarray(x)[:runs], out)


def steps_where(at, value, usual):
    """A row of `sgd_runs` that is `usual` but for the steps `at`."""
    row = np.full((1, STEPS), usual, np.float32)
    row[:, at] = value
    return row


def calm(found):
    """Whether the radius never touched a step."""
    return bool((found["trust_scale"] == 1).all())


def lengths(found):
    return np.linalg.norm(np.float64(found["updates"]), axis=-1)


# Rates far too high.


def at_rates(optimizer, rates, loss_fn, params, steps, bare=False, **options):
    """Histories at several learning rates, with the trust region or bare."""

    def one(rate):
        inner = optimizer(rate)
        tx = inner if bare else guarded(inner, **options)
        return run(tx, loss_fn, params, steps)[1]

    return jax.jit(jax.vmap(one))(jnp.asarray(rates, jnp.float32))


def diverges(found):
    return ~(found["last"] <= found["loss"][:, 0])


def two_layers(n=64):
    """theory.md 1.3: f = u . v / sqrt(n), whose curvature at the start is `lam`."""
    params = jax.random.normal(jax.random.key(0), (2, n))
    loss_fn = lambda p: 0.5 * (jnp.dot(p[0], p[1]) / np.sqrt(n)) ** 2
    return loss_fn, params, float(jnp.sum(params**2) / n)


@pytest.mark.slow
@BOTH
def test_beyond_the_catapult_a_two_layer_net_still_learns(probe):
    loss_fn, params, lam = two_layers()
    rates = np.array([4.1, 8.0, 40.0, 4000.0]) / lam
    bare = at_rates(optax.sgd, rates, loss_fn, params, 100, bare=True)
    assert diverges(bare)[1:].all()
    held = at_rates(optax.sgd, rates, loss_fn, params, 400, probe=probe)
    assert np.isfinite(held["loss"]).all() and np.isfinite(held["params"]).all()
    assert (held["last"] < 1e-3 * held["loss"][:, 0]).all()


@pytest.mark.slow
@BOTH
def test_sgd_converges_at_any_multiple_of_its_stable_rate(probe):
    rates = 0.2 * np.array([1.5, 10.0, 100.0, 1e6])
    found = at_rates(optax.sgd, rates, quadratic, START, 1000, probe=probe)
    first, losses = found["loss"][:, :1], found["loss"]
    assert (losses <= first).all()
    assert (losses[:, 200:] < 2e-3 * first).all()
    assert (found["last"] < 1e-6 * first[:, 0]).all()


# Optimizers, and the rate up to which each is stable (theory.md 1.1; 0: none such).
OPTIMIZERS = {
    "momentum": (lambda rate: optax.sgd(rate, momentum=0.9), 0.38),
    "nesterov": (lambda rate: optax.sgd(rate, momentum=0.9, nesterov=True), 0.1357),
    "frozen adam": (
        lambda rate: optax.chain(optax.ema(0.9, debias=False), optax.scale(-rate)),
        3.8,
    ),
    "adamw": (optax.adamw, 0),
    "lion": (optax.lion, 0),
    "rmsprop": (optax.rmsprop, 0),
    "in a chain": (
        lambda rate: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate)),
        0,
    ),
}


def one_of(index, rate):
    """The optimizer of a traced index, so that all of them are compiled at once."""
    all_of_them = [make(rate) for make, _ in OPTIMIZERS.values()]

    def update(grads, states, params=None):
        done = [
            tx.update(grads, state, params)
            for tx, state in zip(all_of_them, states, strict=True)
        ]
        updates = jnp.stack([updates for updates, _ in done])[index]
        return updates, tuple(state for _, state in done)

    return optax.GradientTransformation(
        lambda params: tuple(tx.init(params) for tx in all_of_them), update
    )


@functools.cache
def of_every_optimizer():
    """Histories of each at 1.5, 10 and 100 times its stable rate; else 1, 10, 100."""
    stable = np.array([[rate] for _, rate in OPTIMIZERS.values()])
    multiples = np.where(stable > 0, [1.5, 10.0, 100.0], [1.0, 10.0, 100.0])
    rates = jnp.float32(np.where(stable > 0, stable, 1) * multiples)

    def one(index, rate):
        return run(guarded(one_of(index, rate)), quadratic, START, 1200)[1]

    each = jax.vmap(jax.vmap(one, in_axes=(None, 0)))
    return jax.jit(each)(jnp.arange(len(stable)), rates)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_inner_optimizer_converges_far_above_its_stable_rate(name):
    found = of_every_optimizer()
    i = list(OPTIMIZERS).index(name)
    losses, last = np.asarray(found["loss"])[i], np.asarray(found["last"])[i]
    assert np.isfinite(losses).all()
    # At 1.5 times the stable rate, the swings of heavy averages decay slowly.
    first = 1e-2 if name in ("momentum", "frozen adam") else 1e-4
    # At 100 times, rounding decides how far a chain with a clip gets.
    third = 1e-2 if name == "in a chain" else 1e-4
    assert (last < np.array([first, 1e-4, third]) * losses[:, 0]).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["momentum", "nesterov"])
def test_momentum_never_leaves_the_level_that_it_starts_from(name):
    losses = np.asarray(of_every_optimizer()["loss"])[list(OPTIMIZERS).index(name)]
    assert losses.max() <= 2 * losses[0, 0]  # 4740 and 48, from 5.5.


@pytest.mark.slow
def test_a_deep_scalar_linear_net_learns_above_its_stable_rate():
    # theory.md 1.2: of depth 4, y = 1, the stable rate at the minimum is 0.5.
    loss_fn = lambda w: 0.5 * (jnp.prod(w) - 1) ** 2
    start = jnp.array([0.9, 1.1, 1.3, 0.8])
    rates = [5.0, 50.0, 5000.0]
    bare = at_rates(optax.sgd, rates, loss_fn, start, 300, bare=True)
    assert diverges(bare).all()
    held = at_rates(optax.sgd, rates, loss_fn, start, 1200)
    assert (held["loss"] <= held["loss"][:, :1]).all()
    assert (held["last"] < 1e-6 * held["loss"][:, 0]).all()


# Bounds of every step.


@functools.cache
def mixed(probe):
    """Runs at random rates, in which one step in three is faulty in some way."""
    rng = np.random.default_rng(0)
    which = rng.integers(0, 36, (RUNS, STEPS))
    which[:, :5] = 36  # Another loss than `value_fn` gives is a mismatch there.

    def bent(usual, cases):
        rows = np.full((RUNS, STEPS), usual, np.float32)
        for kind, value in cases.items():
            rows[which == kind] = value
        return rows

    rates = np.repeat(10 ** rng.uniform(-2, 3, (RUNS, 1)), STEPS, axis=1)
    state, found = sgd_runs(
        rates,
        probe=probe,
        value=bent(0, {1: 1e30, 2: -5.0}),
        grads=bent(1, {3: np.nan, 4: 1e20, 5: -1.0, 6: 0.0, 7: np.inf}),
        rise=bent(0, {8: np.nan, 9: np.inf, 10: 1e30, 11: -np.inf}),
    )
    return state, found, rates


@pytest.mark.slow
@BOTH
def test_no_step_is_longer_than_the_optimizer_wanted_in_any_element(probe):
    _, found, rates = mixed(probe)
    wanted = -np.float64(rates)[..., None] * found["grads"]
    taken = found["updates"]
    fine = np.isfinite(wanted).all(axis=-1) & ~found["skipped"]
    assert fine.sum() > 0.9 * fine.size
    assert (np.sign(taken) * np.sign(wanted) >= 0)[fine].all()
    assert (np.abs(taken) <= np.abs(wanted) * (1 + 1e-6) + TINY)[fine].all()
    assert (taken[~fine] == 0).all()


@pytest.mark.slow
@BOTH
def test_no_step_is_longer_than_the_radius_of_before_probed_or_not(probe):
    _, found, _ = mixed(probe)
    length, before = lengths(found)[:, 1:], found["trust_radius"][:, :-1]
    assert np.isfinite(before).sum() > 10_000
    # Where the loss overflows it is not so: see the next test but one. Of shorter steps
    # the squares underflow.
    told = np.isfinite(found["loss_value"][:, 1:]) & (length > 1e-18)
    assert (length <= before * (1 + 1e-5))[told].all()
    unprobed = np.diff(found["trust_probes"]) == 0
    assert (unprobed & (length > 0.99 * before)).sum() > 1000


@BOTH
def test_nothing_that_a_step_brings_makes_state_or_parameters_other_than_finite(probe):
    state, found, _ = mixed(probe)
    chex.assert_tree_all_finite(state)
    assert np.isfinite(found["params"]).all()
    assert ((found["trust_scale"] >= 0) & (found["trust_scale"] <= 1)).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_step_whose_loss_is_not_finite_is_held_to_the_radius_too(bad):
    _, found = sgd_runs([20.0], value=steps_where(7, bad, 0.0))
    assert lengths(found)[0, 7] <= found["trust_radius"][0, 6] * (1 + 1e-5)


def test_one_batch_with_a_small_gradient_does_not_free_the_next_ones():
    _, found = sgd_runs([20.0], weight=steps_where(40, 1e-5, 1.0))
    assert found["loss"][0, 36:].max() < 1  # It is 7e10 at step 43.


def test_a_rate_that_jumps_is_held_to_where_the_loss_falls():
    rate = steps_where(slice(12, None), 1e4, 0.05)
    _, found = sgd_runs(rate)
    assert calm({"trust_scale": found["trust_scale"][0, :12]})
    # Probed out of turn, and shortened at once: step 12 is not one of every eight.
    assert found["trust_probes"][0, 12] > found["trust_probes"][0, 11]
    assert found["trust_cuts"][0, 11:13].tolist() == [0, 1]
    assert found["loss"][0, 13] < found["loss"][0, 12]
    assert found["loss"].max() == found["loss"][0, 0]
    assert found["last"] < 1e-6


def test_a_step_that_would_raise_the_loss_is_shortened_before_it_is_taken():
    # It is probed at step 16, where all but the parameters are 100 higher.
    state, found = sgd_runs([0.05], rise=steps_where(16, 100.0, 0.0))
    np.testing.assert_array_equal(found["params"][0, 17], found["params"][0, 16])
    assert found["trust_scale"][0, 16] == 0 and found["shortened_steps"][0, -1] == 1
    assert found["last"] < 1e-6
    event = sg.events(jax.tree.map(lambda x: x[0], state))[0]
    assert (event.step, event.kind) == (16, "shorten")


# No lock-in.


@BOTH
def test_a_radius_far_too_small_recovers_in_a_stated_number_of_steps(probe):
    length = 0.05 * 101**0.5
    smaller, steps = np.array([1e-2, 1e-4, 1e-6]), (110, 220, 300)
    _, found = sgd_runs([0.05] * 3, probe=probe, radius=smaller * length)
    assert (found["trust_scale"][:, 0] < 3 * smaller).all()
    # The target passes 1 after some 25 probes; from there, a third at each.
    for row, most in enumerate(steps):
        assert (found["trust_scale"][row, most:] == 1).all()


def test_a_radius_below_what_the_loss_can_show_recovers_too():
    _, found = sgd_runs([0.05], radius=[1e-10])
    assert found["trust_scale"][0, -1] == 1  # The radius is 1e-30 then.


def test_a_warm_up_from_a_rate_of_nothing_is_left_alone():
    # The first steps change a loss of 100 by less than float32 can tell.
    rate = 1e-8 * np.arange(STEPS)[None]
    _, found = sgd_runs(rate, offset=[100.0])
    assert calm(found)  # The parameters never move again.


@pytest.mark.slow
def test_a_healthy_run_in_bfloat16_is_left_alone_as_long_as_it_learns():
    x = jax.random.normal(jax.random.key(0), (64, 8)).astype(jnp.bfloat16)
    y = x @ jnp.ones(8, jnp.bfloat16) + 0.5
    loss_fn = lambda w: jnp.mean(((x @ w - y) ** 2).astype(jnp.float32))
    start = jnp.zeros(8, jnp.bfloat16)
    _, found = jax.jit(lambda: run(guarded(optax.adam(0.01)), loss_fn, start, 300))()
    losses = np.asarray(found["loss"])
    learnt = int(losses.argmin())  # The parameters can come no nearer.
    assert learnt > 100 and losses[learnt] < 0.05 * losses[0]
    assert (found["trust_scale"][:learnt] == 1).all()


def undefined(steps):
    """A `value_fn` that is nan everywhere but at the parameters, for some steps."""
    return steps_where(slice(0, steps), np.nan, 0.0)


def test_while_the_loss_is_nan_everywhere_else_parameters_are_held():
    state, found = sgd_runs([0.05], rise=undefined(STEPS))
    np.testing.assert_array_equal(found["params"][0], np.ones((STEPS, 2)))
    chex.assert_tree_all_finite(state)
    assert (found["trust_scale"] == 0).all()
    assert found["shortened_steps"][0, -1] == STEPS
    assert found["trust_probes"][0, -1] == 8 * STEPS


ANOTHER = {  # Other losses than the one passed as `value=`.
    "twice": lambda p: 2 * quadratic(p),
    "a term more": lambda p: quadratic(p) + 0.1 * jnp.sum(p**2) + 3.0,
    "nan": lambda p: quadratic(p) * jnp.nan,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ANOTHER)
def test_a_function_that_does_not_repeat_the_loss_is_told_and_limits_nothing(name):
    tx = sg.guard(optax.sgd(1e-3), sg.trust_region())
    bare = optax.sgd(1e-3)

    def step(carry, _):
        params, state, alone = carry
        loss, grads = jax.value_and_grad(quadratic)(params)
        extra = {"value": loss, "value_fn": ANOTHER[name]}
        params, state = sg.apply(tx, grads, state, params, **extra)
        moved, _ = bare.update(jax.grad(quadratic)(alone), bare.init(alone))
        return (params, state, optax.apply_updates(alone, moved)), None

    scan = lambda: jax.lax.scan(step, (START, tx.init(START), START), length=50)
    params, state, alone = jax.jit(scan)()[0]
    np.testing.assert_allclose(params, alone, rtol=1e-5)
    assert sg.scalars(state)["trust_mismatch"] == 1
    assert sg.metrics(state)["trust_probes"] == 2
    assert sg.events(state) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "inner", [optax.sgd(0.1), optax.adam(0.1)], ids=["sgd", "adam"]
)
def test_gradient_ascent_is_told_and_not_limited(inner):
    climbs = optax.chain(inner, optax.scale(-1.0))
    reward = lambda p: -quadratic(p)

    def ascent(tx, **extra):
        def step(carry, _):
            params, state = carry
            value, grads = jax.value_and_grad(reward)(params)
            own = {"value": value, "value_fn": reward} if extra else {}
            updates, state = tx.update(grads, state, params, **own)
            return (optax.apply_updates(params, updates), state), None

        start = START, tx.init(START)
        return jax.jit(lambda: jax.lax.scan(step, start, length=20)[0])()

    expected, _ = ascent(climbs)
    params, state = ascent(sg.guard(climbs, sg.trust_region()), told=True)
    np.testing.assert_allclose(params, expected, rtol=1e-5)
    assert reward(params) > reward(START) and sg.metrics(state)["trust_mismatch"]


def test_once_the_loss_is_fine_again_training_goes_on():
    _, found = sgd_runs([0.05], rise=undefined(5))
    assert found["last"] < 1e-3


# No harm.


@pytest.mark.slow
@BOTH
def test_a_healthy_rate_on_a_convex_problem_is_the_bare_optimizers_run(probe):
    def problem(key):
        x = jax.random.normal(key, (32, 4))
        y = jnp.sign(x @ jnp.ones(4) + 0.5)
        return lambda w: jnp.mean(jnp.logaddexp(0.0, -y * (x @ w)))

    def inner(is_adam):
        adam, sgd = optax.adam(0.05), optax.sgd(0.5)

        def update(grads, states, params=None):
            fast, states = adam.update(grads, states, params)
            slow, _ = sgd.update(grads, sgd.init(params), params)
            return jnp.where(is_adam, fast, slow), states

        return optax.GradientTransformation(adam.init, update)

    def both(key, is_adam):
        start = jax.random.normal(key, (4,))
        tx = inner(is_adam)
        bare = run(sg.guard(tx), problem(key), start, 120)[1]
        held = run(guarded(tx, probe=probe), problem(key), start, 120)[1]
        return bare, held

    keys = jax.random.split(jax.random.key(1), 16)
    bare, held = jax.jit(jax.vmap(both))(keys, jnp.arange(16) < 8)
    assert calm(held) and np.isinf(held["trust_radius"]).all()
    np.testing.assert_array_equal(held["params"], bare["params"])
    assert (held["trust_cuts"] == 0).all() and (held["shortened_steps"] == 0).all()
    assert (held["trust_probes"][:, -1] == 5 + 14).all()


def wave(params):
    """A curve to learn, on which steps are long enough for the edge of stability."""
    x = jnp.linspace(-2, 2, 128)[:, None]
    y = jnp.sin(4 * x) + 0.3 * x**2
    for kernel, bias in params[:-1]:
        x = jnp.tanh(x @ kernel + bias)
    return jnp.mean((x @ params[-1][0] + params[-1][1] - y) ** 2)


def wide_layers():
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((1, 64), (64, 64), (64, 1))
    return [
        (shape[0] ** -0.5 * jax.random.normal(key, shape), jnp.zeros((1, shape[1])))
        for key, shape in zip(keys, shapes, strict=True)
    ]


@functools.cache
def at_the_edge():
    """Final losses of healthy runs that gain nothing by most of their steps."""
    heavy = lambda: (
        lambda p: 0.5 * jnp.sum(jnp.logspace(-3, 0, 20) * p**2),
        jnp.ones(20),
        optax.sgd(1.0, momentum=0.99),
    )
    edge = lambda: (wave, wide_layers(), optax.adam(2e-3))

    def last(loss_fn, start, tx):
        return run(tx, loss_fn, start, 2000)[1]["last"]

    def both(loss_fn, start, inner):
        return last(loss_fn, start, inner), last(loss_fn, start, guarded(inner))

    return jax.jit(lambda: {"heavy": both(*heavy()), "edge": both(*edge())})()


@pytest.mark.slow
def test_heavy_momentum_that_swings_is_hardly_slowed():
    _, held = at_the_edge()["heavy"]
    assert held < 1e-6  # 3.6e-7; alone 1.5e-9, of 10 at the start.


@pytest.mark.slow
def test_a_healthy_run_at_the_edge_of_stability_is_hardly_slowed():
    bare, held = at_the_edge()["edge"]
    assert held < 2 * bare  # 1.0 times.


@pytest.mark.parametrize("scale", [4.0, 2.0**15])
def test_gradients_of_another_loss_are_said_and_left_to_the_optimizer(scale):
    _, found = sgd_runs([0.05 / scale], grads=np.full((1, STEPS), scale))
    assert found["trust_mismatch"][0].all()
    assert calm(found) and found["last"] < 1e-6
    assert (found["shortened_steps"] == 0).all()
    assert (found["trust_probes"][0, -1] == found["trust_probes"][0, 0]).all()


@pytest.mark.slow
@pytest.mark.parametrize("k", [2, 4, 8])
def test_steps_of_no_length_do_not_put_the_probes_out_of_step(k):
    tx = guarded(optax.MultiSteps(optax.sgd(20.0), k).gradient_transformation())
    _, found = jax.jit(lambda: run(tx, quadratic, START, 40 * k))()
    # Of 40 steps; looks at shorter steps and at steps that were much longer included.
    assert 5 + 8 <= found["trust_probes"][-1] <= 48
    assert found["last"] < 0.05 * quadratic(START)


# How it runs.


@pytest.mark.slow
def test_forward_passes_are_made_at_five_steps_and_then_at_every_eighth_while_free():
    calls = []

    def counted(t, loss_fn):
        def value_fn(params):
            jax.debug.callback(lambda step: calls.append(int(step)), t)
            return loss_fn(params)

        return {"value_fn": value_fn}

    tx = guarded(optax.sgd(0.01))
    _, found = jax.jit(lambda: run(tx, quadratic, START, 23, counted))()
    jax.effects_barrier()
    assert sorted(calls) == [0, 1, 2, 3, 4, 8, 16]
    assert found["trust_probes"][-1] == 7


def stepper(tx, loss_fn=quadratic):
    def step(params, state):
        loss, grads = jax.value_and_grad(loss_fn)(params)
        return sg.apply(tx, grads, state, params, value=loss, value_fn=loss_fn)

    return step


@pytest.mark.slow
def test_apply_jitted_once_donated_is_the_scanned_ensembles_member():
    tx = guarded(optax.sgd(20.0))
    step = stepper(tx)
    once = jax.jit(chex.assert_max_traces(step, n=1), donate_argnums=(0, 1))
    _, found = sgd_runs([0.05, 20.0])
    params, state = jnp.array(START), tx.init(START)
    for t in range(12):
        np.testing.assert_allclose(params, found["params"][1, t], rtol=1e-3, atol=1e-6)
        params, state = once(params, state)
        for key in ("trust_radius", "trust_probes", "trust_cuts", "grad_norm"):
            seen = sg.metrics(state)[key]
            np.testing.assert_allclose(seen, found[key][1, t], rtol=1e-3)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(START))


@pytest.mark.slow
def test_it_works_the_same_without_jit():
    tx = guarded(optax.sgd(20.0))
    params, state = START, tx.init(START)
    with jax.disable_jit():
        for _ in range(2):
            params, state = stepper(tx)(params, state)
    _, found = sgd_runs([20.0])
    np.testing.assert_allclose(params, found["params"][0, 2], rtol=1e-4)
    radius = sg.metrics(state)["trust_radius"]
    np.testing.assert_allclose(radius, found["trust_radius"][0, 1], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("probe", core(PROBES, "hvp"))
def test_bfloat16_complex_and_integer_leaves_keep_their_dtypes(probe):
    params = {
        "half": jnp.ones(4, jnp.bfloat16),
        "n": jnp.int32(3),
        "z": jnp.array([1 + 1j, 2 - 1j]),
    }
    loss_fn = lambda p: (
        jnp.sum(p["half"].astype(jnp.float32) ** 2) + 10 * jnp.sum(jnp.abs(p["z"]) ** 2)
    )
    tx = guarded(optax.sgd(50.0), probe=probe)

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(loss_fn, allow_int=True)(params)
        grads = grads | {"n": jnp.int32(0), "z": jnp.conj(grads["z"])}
        return sg.apply(tx, grads, state, params, value=loss, value_fn=loss_fn)

    now, state = params, tx.init(params)
    for _ in range(25):
        now, state = step(now, state)
    chex.assert_trees_all_equal_dtypes(now, params)
    assert now["n"] == 3
    assert loss_fn(now) < 0.1 * loss_fn(params)


# What is missing or wrong.


def test_a_missing_value_or_value_fn_is_an_error_that_shows_every_fix():
    tx = guarded(optax.sgd(0.1))
    state = tx.init(START)
    for extra, name in (
        ({"value": 1.0}, "value_fn"),
        ({"value_fn": quadratic}, "value"),
    ):
        with pytest.raises(ValueError, match=f"got no `{name}=`") as error:
            jax.eval_shape(lambda e=extra: tx.update(START, state, START, **e))
        for way in (
            "tx.update(grads, state, params, value=loss,",
            "sg.apply(tx, grads, state, params, value=loss,",
            "optimizer.update(model, grads, value=loss, value_fn=lambda p:",
            "state.tx.update(",
        ):
            assert way in str(error.value)
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(START, state, value=1.0, value_fn=quadratic)


def test_stabilize_does_not_rest_silently_where_the_loss_was_forgotten():
    tx = sg.stabilize(optax.sgd(0.1))
    state = tx.init(START)
    with pytest.raises(ValueError, match="got no `value=`"):
        jax.eval_shape(lambda: tx.update(START, state, START, value_fn=quadratic))


@pytest.mark.parametrize(
    "value_fn, found",
    [
        (lambda p: (quadratic(p), {}), "it returns a tuple"),
        (lambda p: None, "it returns a NoneType"),
        (3.0, "it is .*float32"),
    ],
)
def test_a_value_fn_that_gives_no_loss_is_an_error_that_says_what_it_gives(
    value_fn, found
):
    tx = guarded(optax.sgd(0.1))
    with pytest.raises(ValueError, match=f"returns the loss alone, but {found}"):
        tx.update(START, tx.init(START), START, value=1.0, value_fn=value_fn)


def test_a_loss_without_a_forward_derivative_is_told_of_the_other_probe():
    only_vjp = jax.custom_vjp(quadratic)
    only_vjp.defvjp(lambda p: (quadratic(p), p), lambda p, g: (g * p,))
    tx = guarded(optax.sgd(0.1), probe="hvp")
    with pytest.raises(ValueError, match='Pass probe="forward"'):
        tx.update(START, tx.init(START), START, value=1.0, value_fn=only_vjp)
    tx = guarded(optax.sgd(0.1))
    step = functools.partial(tx.update, value=1.0, value_fn=only_vjp)
    jax.eval_shape(step, START, tx.init(START), START)


def test_a_value_fn_that_is_not_a_scalar_is_named():
    tx = guarded(optax.sgd(0.1))
    with pytest.raises(ValueError, match="`value_fn` must be a real scalar"):
        tx.update(START, tx.init(START), START, value=1.0, value_fn=lambda p: p)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"every": 0}, "`every` must be an integer >= 1, got 0"),
        ({"every": 2.5}, "`every` must be an integer"),
        ({"every": 2**40}, "`every` must be an integer <= 2147483647"),
        ({"probe": "x"}, "`probe` must be one of .*, got 'x'"),
    ],
)
def test_rejects_arguments_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        sg.trust_region(**options)


@pytest.mark.slow
def test_nothing_is_promoted_implicitly(strict):
    tx = guarded(optax.sgd(1.0))
    jax.eval_shape(stepper(tx), START, tx.init(START))


@pytest.mark.slow
def test_it_may_be_traced_while_float64_is_enabled(x64):
    tx = guarded(optax.sgd(1.0))
    jax.eval_shape(stepper(tx), START, tx.init(START))


# Among others.


def accumulated(tx):
    several = optax.MultiSteps(tx, 2)
    return optax.GradientTransformationExtraArgs(several.init, several.update)


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.chain(optax.clip_by_global_norm(100.0), tx, optax.scale(0.9)),
        accumulated,
    ],
    ids=["chain", "MultiSteps"],
)
def test_a_chain_and_accumulated_gradients_pass_the_value_fn_on(wrap):
    tx = wrap(guarded(optax.sgd(20.0)))
    state, found = jax.jit(lambda: run(tx, quadratic, START, 80))()
    assert found["last"] < 0.05 * quadratic(START)
    assert 5 <= sg.metrics(state)["trust_probes"] < 40


@pytest.mark.slow
def test_the_factors_of_back_off_and_trust_region_multiply():
    exploding = lambda updates, params, extra: extra["exploded"]

    def with_back_off(inner):
        rule = sg.fixed(0.5, of=exploding)
        back_off = sg.back_off(rule, factor=0.5, hold_steps=99)
        clip = sg.clip(sg.fixed(3.0))
        watched = sg.skip(sg.fixed(1e9, of="update_norm"))  # Measures the update.
        return sg.guard(inner, back_off, sg.trust_region(), clip, watched)

    tx, params = with_back_off(optax.sgd(20.0)), START
    step = jax.jit(
        lambda params, state, exploded: sg.apply(
            tx,
            jax.grad(quadratic)(params),
            state,
            params,
            value=quadratic(params),
            value_fn=quadratic,
            exploded=exploded,
        )
    )
    state = tx.init(params)
    for t in range(8):
        before = params
        params, state = step(params, state, jnp.float32(t == 3))
        seen = sg.metrics(state)
        assert seen["back_off_scale"] == (1 if t < 3 else 0.5)
        product = seen["back_off_scale"] * seen["trust_scale"]
        np.testing.assert_allclose(seen["lr_scale"], product, rtol=1e-6)
        moved = np.linalg.norm(params - before)
        np.testing.assert_allclose(seen["update_norm"], moved, rtol=1e-3)
        wanted = seen["raw_update_norm"] * seen["lr_scale"]
        np.testing.assert_allclose(moved, wanted, rtol=1e-3)
    assert params @ params < START @ START


@pytest.mark.slow
def test_an_element_that_is_kept_out_does_not_stop_the_others_under_a_limit():
    broken = optax.stateless_with_tree_map(lambda g, p: (-0.1 * g).at[0].set(jnp.nan))
    clip = sg.clip(sg.fixed(1.0, of="update_norm"))
    tx, params = sg.guard(broken, clip, sg.trust_region()), START
    extra = {"value": quadratic(params), "value_fn": quadratic}
    grads = jax.grad(quadratic)(params)
    updates, state = tx.update(grads, tx.init(params), params, **extra)
    assert updates[0] == 0 and (updates[1:] != 0).all()
    assert sg.metrics(state)["kept_out_elements"] == 1


def test_a_skipped_step_leaves_parameters_and_radius():
    _, found = sgd_runs([20.0], grads=steps_where(6, np.nan, 1.0))
    np.testing.assert_array_equal(found["params"][0, 7], found["params"][0, 6])
    for key in ("trust_radius", "trust_ratio"):
        assert found[key][0, 6] == found[key][0, 5]
    assert found["last"] < 1e-6 and found["skipped_steps"][0, -1] == 1


def test_metrics_and_events_tell_what_was_found():
    state, found = sgd_runs([1.0, 0.01])
    seen = {name: rows[0, 0] for name, rows in found.items() if name.startswith("t")}
    assert set(seen) == {
        f"trust_{name}"
        for name in ("radius", "ratio", "scale", "probes", "cuts", "mismatch", "target")
    }
    # r of the whole step is 1001 / 202; shortened to where it is 1 / 4.
    part = 0.25 * 202 / 1001
    np.testing.assert_allclose(seen["trust_scale"], part, rtol=1e-5)
    np.testing.assert_allclose(seen["trust_ratio"], 0.25, rtol=1e-4)
    np.testing.assert_allclose(seen["trust_radius"], part * 101**0.5, rtol=1e-5)
    # The whole step, the parameters themselves, and the part that is taken.
    assert (seen["trust_probes"], seen["trust_cuts"]) == (3, 1)
    assert found["shortened_steps"][0, 0] == 1
    events, none = (
        sg.events(jax.tree.map(lambda x, i=i: x[i], state)) for i in range(2)
    )
    assert (events[0].step, events[0].kind, events[0].reason) == (0, "shorten", "")
    np.testing.assert_allclose(events[0].lr_scale, part, rtol=1e-5)
    assert none == [] and (found["trust_radius"][1] == np.inf).all()


def stabilized(**more):
    """Losses and metrics of sixty steps at a rate far too high."""
    tx = sg.stabilize(optax.sgd(20.0))

    def step(params, state):
        loss, grads = jax.value_and_grad(quadratic)(params)
        params, state = sg.apply(tx, grads, state, params, value=loss, **more)
        return params, state, (quadratic(params), sg.metrics(state))

    step, params, state, rows = jax.jit(step), START, tx.init(START), []
    for _ in range(60):
        params, state, row = step(params, state)
        rows.append(jax.device_get(row))
    return stack(rows)


@pytest.mark.slow
def test_stabilize_holds_with_a_value_fn():
    losses, _ = stabilized(value_fn=quadratic)
    assert losses[-1] < 0.01 * quadratic(START)


@pytest.mark.slow
def test_stabilize_rests_without_a_value_fn():
    losses, rests = stabilized()
    assert (rests["trust_probes"] == 0).all() and calm(rests)
    # What it takes is what all other responses leave, and that is not enough.
    np.testing.assert_array_equal(rests["lr_scale"], rests["back_off_scale"])
    assert not losses[-1] < quadratic(START)


@pytest.mark.slow
def test_float64_losses_are_resolved_as_float32(x64):
    rows = np.random.default_rng(0).normal(size=(64, 8))
    target = np.random.default_rng(1).normal(size=64)
    loss_fn = lambda params: jnp.mean((rows @ params - target) ** 2) + 100
    warm_up = lambda count: 0.3 * jnp.minimum((count + 1) / 500, 1.0) ** 3
    tx = sg.stabilize(optax.sgd(warm_up))

    def step(carry, _):
        params, state = carry
        loss, grads = jax.value_and_grad(loss_fn)(params)
        return sg.apply(tx, grads, state, params, value=loss, value_fn=loss_fn), loss

    start = jnp.zeros(8, jnp.float64)
    run = jax.jit(lambda carry: jax.lax.scan(step, carry, None, length=1000))
    (_, state), losses = run((start, tx.init(start)))
    least = np.linalg.lstsq(rows, target)[1][0] / 64 + 100
    assert losses[-1] - least < 1e-3 and not sg.metrics(state)["trust_mismatch"]


@pytest.mark.slow
def test_a_misspelt_value_fn_warns_once():
    tx = sg.stabilize(optax.sgd(0.1))
    state, extra = tx.init(START), {"value": 1.0, "value_func": quadratic}
    with pytest.warns(UserWarning, match=r"got `value_func=`.*Is `value_fn=` meant"):
        tx.update(START, state, START, **extra)
    tx.update(START, state, START, **extra)
    tx.update(START, state, START, value=1.0, batch_id=jnp.int32(3))


def test_a_function_of_more_than_the_parameters_is_told():
    tx = sg.stabilize(optax.sgd(0.1))
    of_two = lambda params, batch: quadratic(params)
    with pytest.raises(ValueError, match="more than them: .*batch.* value_fn=lambda p"):
        tx.update(START, tx.init(START), START, value=1.0, value_fn=of_two)
