"""Steps that are written in place, beside those that are checked afterwards."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import training

import stablegrad as sg
from stablegrad.stepping._ways import SMALL

STEPS = 40


def guarded(inner, exact, *responses):
    responses = responses or (
        sg.clip(sg.fixed(3.0)),
        sg.clip(sg.fixed(0.5, of="update_norm")),
        sg.skip(sg.nonfinite(), sg.fixed(1e3)),
        sg.halt(after=5),
    )
    return sg.guard(inner, *responses, exact_updates=exact)


def params_of(seed=0, rows=24):
    a, b = jax.random.split(jax.random.key(seed))
    return {"w": jax.random.normal(a, (rows, 8)), "b": jax.random.normal(b, (8,))}


def gradients(faults=()):
    """Healthy gradients of slowly varying size, with some leaves replaced."""
    rng = np.random.default_rng(0)
    size = 1 + np.sin(np.arange(STEPS))[:, None] ** 2
    w = (rng.standard_normal((STEPS, 24 * 8)) * size).reshape(STEPS, 24, 8)
    b = rng.standard_normal((STEPS, 8)) * size
    for step, value in faults:
        w[step, 3, 4] = value
    return {"w": jnp.asarray(w, jnp.float32), "b": jnp.asarray(b, jnp.float32)}


INNER = {
    "sgd": optax.sgd(0.1, momentum=0.9),
    "adamw": optax.adamw(0.05),
    "clipped": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.05)),
    "muon": optax.contrib.muon(0.05),  # No proof: every step is checked.
}


@functools.lru_cache(32)
def pair(name):
    return guarded(INNER[name], exact=False), guarded(INNER[name], exact=True)


@pytest.mark.parametrize("apply", [False, True], ids=["update", "apply"])
@pytest.mark.parametrize("name", INNER)
def test_decisions_numbers_and_parameters_are_those_of_checked_steps(name, apply):
    faults = [(5, np.nan), (9, 1e5), (10, np.inf), (20, 50.0), (30, -np.inf)]
    runs = [
        training.scan(tx, gradients(faults), params_of(), apply=apply)
        for tx in pair(name)
    ]
    (params, state, (_, proven, _)), (_, other, (_, checked, _)) = runs
    assert proven["skipped"].sum() == 4 and proven["clipped_steps"][-1] > 20
    for key in checked:
        chex.assert_trees_all_close(proven[key], checked[key], rtol=1e-4)
    chex.assert_trees_all_close(params, runs[1][0], rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(
        state.guarded_inner, other.guarded_inner, rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e5])
def test_a_rejected_step_leaves_everything_bit_for_bit(bad):
    tx = pair("adamw")[0]
    params = params_of()
    _, state, (every, _, inner) = training.scan(
        tx, gradients([(7, bad)]), params, apply=True
    )
    before, after = (jax.tree.map(lambda x: x[i], (every, inner)) for i in (6, 7))  # noqa: B023
    chex.assert_trees_all_equal(before, after)
    assert sg.events(state, params)[0].step == 7


def finite_after(value, inner, *responses, dtype=jnp.float32, start=None):
    """Metrics and the final state of a run with one element of a gradient set."""
    tx = guarded(inner, False, *responses)
    params = jax.tree.map(lambda x: x.astype(dtype), start or params_of())
    grads = jax.tree.map(lambda x: x.astype(dtype), gradients([(7, value)]))
    params, state, (_, seen, _) = training.scan(tx, grads, params, apply=True)
    chex.assert_tree_all_finite((params, state.guarded_inner))
    return params, state, seen


@pytest.mark.parametrize("value", [1e15, 1e17, 1e18])
def test_a_huge_gradient_that_the_optimizer_bears_is_taken(value):
    _, _, seen = finite_after(value, INNER["adamw"], sg.skip())
    assert seen["skipped_steps"][-1] == 0


@pytest.mark.parametrize("value", [1e20, 1e30, 3e38])
def test_a_gradient_that_breaks_a_moment_is_rejected_and_the_next_step_taken(value):
    params, state, seen = finite_after(value, INNER["adamw"], sg.skip())
    assert seen["skipped"].tolist() == [i == 7 for i in range(STEPS)]
    assert sg.events(state, params)[0].reason == "nonfinite_state"


def test_a_state_that_keeps_an_inf_is_never_taken_for_one_within_a_range():
    def update(updates, state, params=None):
        return updates, jax.tree.map(lambda x: x * 0.5, state)

    # One kind of state has an inf on purpose; the next step is inspected again.
    inner = optax.GradientTransformation(
        lambda params: jax.tree.map(lambda x: x.at[0].set(jnp.inf), params), update
    )
    tx = guarded(inner, False, sg.skip())
    _, state, (_, seen, _) = training.scan(tx, gradients(), params_of(), apply=True)
    assert seen["skipped_steps"][-1] == 0
    known = jnp.abs(state.ranges.most) < 1e30
    assert known.tolist() == [True, False]


def test_an_update_that_overflows_is_rejected_with_its_leaf():
    params, state, seen = finite_after(1e38, optax.sgd(1e3), sg.skip())
    assert seen["skipped"].tolist() == [i == 7 for i in range(STEPS)]
    event = sg.events(state, params)[0]
    assert (event.reason, event.leaf) == ("nonfinite_update", "w")


def test_parameters_that_would_overflow_are_held():
    start = {"w": jnp.full((24, 8), -3e38), "b": jnp.zeros(8)}
    params, state, seen = finite_after(2e38, optax.sgd(1.0), sg.skip(), start=start)
    assert seen["skipped"].tolist() == [i == 7 for i in range(STEPS)]
    assert sg.events(state, params)[0].reason == "nonfinite_parameters"


def test_bfloat16_is_proven_and_float16_checked():
    for dtype, count in ((jnp.bfloat16, 0), (jnp.float16, 1)):
        _, state, seen = finite_after(6e4, optax.sgd(1.9), sg.skip(), dtype=dtype)
        assert seen["skipped_steps"][-1] == count, dtype
        known = bool(jnp.all(jnp.abs(state.ranges.most) < 1e30))
        assert known == (dtype == jnp.bfloat16)


def test_a_checked_step_in_between_forgets_the_ranges():
    def update(updates, state, params=None, *, odd=False, **extra):
        if odd:  # Nothing is known of the range of an orthogonal factor.
            updates = {**updates, "w": jnp.linalg.qr(updates["w"])[0]}
        return jax.tree.map(lambda x: -0.1 * x, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda params: (), update)
    tx = sg.guard(inner, sg.skip(), exact_updates=False)
    params, grads = params_of(), jax.tree.map(lambda x: x[0], gradients())

    def known(state):
        return bool(jnp.all(state.ranges.most < 1e30))

    @functools.partial(jax.jit, static_argnums=3)
    def step(params, state, grads, odd):
        return sg.apply(tx, grads, state, params, **({"odd": True} if odd else {}))

    state = tx.init(params)
    assert not known(state)
    params, state = step(params, state, grads, False)
    assert known(state)
    params, state = step(params, state, grads, True)
    assert not known(state)
    params, state = step(params, state, grads, False)
    assert known(state)


CURVATURE = jnp.linspace(0.2, 4.0, 8)[None]


def bowl(params):
    return 0.5 * jnp.sum(CURVATURE * params["w"] ** 2) + jnp.sum(params["b"] ** 2)


@functools.cache
def looking(name, exact):
    """Steps of a guard that looks along them, some on a bad gradient."""
    tx = sg.guard(
        {**INNER, "too long": optax.sgd(50.0), "adam": optax.adam(1.0)}[name],
        sg.skip(sg.nonfinite(), sg.fixed(1e6)),
        sg.trust_region(every=2),
        exact_updates=exact,
    )

    @jax.jit
    def run(params, faults):
        def step(carry, fault):
            params, state = carry
            loss, grads = jax.value_and_grad(bowl)(params)
            grads = {**grads, "b": grads["b"].at[1].add(fault)}
            params, state = sg.apply(
                tx, grads, state, params, value=loss, value_fn=bowl
            )
            return (params, state), (loss, sg.metrics(state))

        return jax.lax.scan(step, (params, tx.init(params)), faults)

    faults = (
        jnp.zeros(STEPS)
        .at[jnp.array([7, 8, 20])]
        .set(jnp.array([jnp.nan, 1e9, jnp.inf]))
    )
    return run(params_of(), faults)


@pytest.mark.parametrize("name", ["too long", "adam", "clipped"])
def test_a_trust_region_decides_in_place_as_it_does_on_checked_steps(name):
    (params, _), (losses, proven) = looking(name, False)
    (other, _), (_, checked) = looking(name, True)
    assert proven["skipped_steps"][-1] == 3 and proven["trust_probes"][-1] > 10
    assert losses[-1] < 0.05 * losses[0]
    for key in checked:
        chex.assert_trees_all_close(proven[key], checked[key], rtol=2e-3, atol=1e-6)
    chex.assert_trees_all_close(params, other, rtol=2e-3, atol=1e-5)


def test_a_step_with_a_hidden_inf_teaches_the_trust_region_nothing():
    # One divisor, in a row that no sample has, is 1, 1/2 and then 0. What it falls by
    # is in the state, as no proof is had with constants of that size.
    def init(params):
        ones = optax.tree.ones_like(params)
        return ones, jax.tree.map(lambda x: jnp.zeros_like(x).at[1, 1].set(0.5), ones)

    def update(updates, state, params=None):
        divisors, falls = state
        steps = jax.tree.map(lambda g, d: -0.1 * g / d, updates, divisors)
        return steps, (jax.tree.map(jnp.subtract, divisors, falls), falls)

    inner = optax.GradientTransformation(init, update)
    tx = sg.guard(inner, sg.skip(), sg.trust_region(every=1), exact_updates=False)
    params = {"w": jnp.ones((1024, 128))}
    loss_fn = lambda params: 0.5 * jnp.sum(params["w"] ** 2)

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(loss_fn)(params)
        return sg.apply(tx, grads, state, params, value=loss, value_fn=loss_fn)

    state, seen = tx.init(params), []
    for _ in range(3):
        params, state = step(params, state)
        seen.append(sg.metrics(state))
    assert [bool(now["skipped"]) for now in seen] == [False, False, True]
    assert jnp.isfinite(seen[2]["raw_update_norm"])  # The sample's: it was not checked.
    for key in ("trust_radius", "trust_probes", "trust_cuts"):
        assert seen[2][key] == seen[1][key]
    chex.assert_tree_all_finite(params)


@pytest.mark.parametrize("apply", [False, True], ids=["update", "apply"])
def test_one_trace_and_members_of_an_ensemble_decide_alone(apply):
    tx = guarded(INNER["adamw"], exact=False)

    @jax.jit
    @chex.assert_max_traces(1)
    def step(params, state, grads):
        def one(params, state, grads):
            if apply:
                return sg.apply(tx, grads, state, params)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        return jax.vmap(one)(params, state, grads)

    stack = lambda *trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)
    params = stack(params_of(0), params_of(1), params_of(2))
    state = jax.vmap(tx.init)(params)
    healthy = jax.tree.map(lambda x: x[:3], gradients())
    faulty = {**healthy, "b": healthy["b"].at[1, 2].set(jnp.nan)}
    before = params
    for grads in (healthy, faulty, healthy):
        params, state = step(params, state, grads)
    assert sg.metrics(state)["skipped_steps"].tolist() == [0, 1, 0]
    moved = jnp.any(params["w"] != before["w"], axis=(1, 2))
    assert moved.all()


def compiled(tx, shape=(1024, 256)):
    params = {"w": jnp.ones(shape), "b": jnp.ones(shape[1])}
    state = tx.init(params)

    def step(params, state, grads):
        return sg.apply(tx, grads, state, params, value=1.0)

    jitted = jax.jit(step, donate_argnums=(0, 1), compiler_options=training.AS_USERS)
    return jitted.lower(params, state, params).compile(), params


@pytest.mark.parametrize("shape", [(1024, 256), (316, 316)])
def test_nothing_of_the_size_of_a_parameter_is_held_or_copied(shape):
    program, params = compiled(sg.stabilize(optax.adamw(1e-3)), shape)
    size = params["w"].nbytes
    assert size > 4 * SMALL
    # JAX before 0.10.2 stores the squares of a leaf on a CPU while it adds them up.
    least = size / 8 if jax.__version_info__ >= (0, 10, 2) else 1.1 * size
    assert program.memory_analysis().temp_size_in_bytes < least
    copies = [
        line
        for line in program.as_text().splitlines()
        if f"= f32[{shape[0]},{shape[1]}]" in line and " copy(" in line
    ]
    assert not copies


def test_exact_updates_hold_a_second_copy():
    program, params = compiled(sg.stabilize(optax.adamw(1e-3), exact_updates=True))
    assert program.memory_analysis().temp_size_in_bytes > params["w"].nbytes


def test_what_decides_is_the_size_of_the_tree():
    tx = sg.guard(optax.sgd(0.1))
    assert tx.init({"w": jnp.zeros(SMALL)}).ranges.least.ndim == 0
    assert tx.init({"w": jnp.zeros(SMALL + 1)}).ranges.least.ndim == 1
    exact = guarded(optax.sgd(0.1), True)
    assert exact.init({"w": jnp.zeros(SMALL + 1)}).ranges.least.ndim == 0


@pytest.mark.parametrize("rows", [4, SMALL])
def test_optax_can_map_over_what_is_shaped_as_the_parameters(rows):
    tx = sg.stabilize(optax.adamw(1e-3))
    params = {"w": jnp.ones((rows, 2)), "b": jnp.ones(3)}
    state = tx.init(params)
    marked = optax.tree.map_params(
        tx, lambda x: "param", state, transform_non_params=lambda x: "other"
    )
    kinds = {
        (np.shape(leaf) in {(rows, 2), (3,)}, mark)
        for leaf, mark in zip(
            jax.tree.leaves(state.guarded_inner),
            jax.tree.leaves(marked.guarded_inner),
            strict=True,
        )
    }
    assert kinds == {(True, "param"), (False, "other")}
    assert set(jax.tree.leaves(marked.record)) == {"other"}
