"""Steps of many parameters, which are taken in place: numbers, memory, ensembles."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.marking import core
from helpers.training import scan

import stablegrad as sg

STEPS = 40
ROWS = 8256  # Of 8 columns: more than 2**16 elements.
SHAPES = {"b": (8,), "w": (ROWS, 8)}
INNER = {
    "sgd": optax.sgd(0.1, momentum=0.9),
    "adamw": optax.adamw(0.05),
    "clipped": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.05)),
    "muon": optax.contrib.muon(0.05),
}


def guarded(inner):
    return sg.guard(
        inner,
        sg.clip(sg.fixed(300.0)),
        sg.clip(sg.fixed(0.5, of="update_norm")),
        sg.skip(sg.nonfinite(), sg.fixed(1e4)),
        sg.halt(after=5),
    )


def params_of(seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.standard_normal(shape), jnp.float32)
        for name, shape in SHAPES.items()
    }


def gradients(faults=()):
    """Healthy gradients of slowly varying size, with single elements replaced."""
    rng = np.random.default_rng(0)
    size = 1 + np.sin(np.arange(STEPS)) ** 2
    grads = {
        name: rng.standard_normal((STEPS, *shape)) * size.reshape(-1, *[1] * len(shape))
        for name, shape in SHAPES.items()
    }
    for step, value in faults:
        grads["w"][step, 3, 4] = value
    return {name: jnp.asarray(leaf, jnp.float32) for name, leaf in grads.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", core(INNER, "adamw"))
def test_apply_decides_as_update_does_and_gives_the_same(name):
    faults = [(5, np.nan), (9, 1e5), (10, np.inf), (20, 50.0), (30, -np.inf)]
    grads, tx = gradients(faults), guarded(INNER[name])
    separate, other, (_, updated, _) = scan(tx, grads, params_of())
    fused, state, (_, applied, _) = scan(tx, grads, params_of(), apply=True)
    assert applied["skipped"].sum() == 4 and applied["clipped_steps"][-1] > 20
    for key in updated:
        chex.assert_trees_all_close(applied[key], updated[key], rtol=1e-4)
    chex.assert_trees_all_close(fused, separate, rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(
        state.guarded_inner, other.guarded_inner, rtol=1e-4, atol=1e-6
    )


@pytest.mark.slow
@pytest.mark.parametrize("apply", [False, True], ids=["update", "apply"])
def test_members_of_an_ensemble_decide_alone_in_one_trace(apply):
    tx = guarded(INNER["adamw"])

    @jax.jit
    @chex.assert_max_traces(1)
    def step(params, state, grads):
        def one(params, state, grads):
            if apply:
                return sg.apply(tx, grads, state, params)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        return jax.vmap(one)(params, state, grads)

    members = range(3)
    params = jax.tree.map(lambda *x: jnp.stack(x), *[params_of(i) for i in members])
    state = jax.vmap(tx.init)(params)
    healthy = jax.tree.map(lambda x: x[:3], gradients())
    faulty = {**healthy, "b": healthy["b"].at[1, 2].set(jnp.nan)}
    for grads, skipped in ((healthy, 0), (faulty, 1), (healthy, 1)):
        before = params
        params, state = step(params, state, grads)
        assert sg.metrics(state)["skipped_steps"].tolist() == [0, skipped, 0]
        moved = jnp.any(params["w"] != before["w"], axis=(1, 2))
        assert moved.tolist() == [True, grads is healthy, True]


@pytest.mark.slow
def test_the_norm_of_the_update_is_exact_where_a_threshold_watches_it():
    rng = np.random.default_rng(0)
    shapes = {
        "dense": (512, 300),
        "layers": (12, 96, 64),
        "filters": (3, 3, 64, 128),
        "table": (20_000, 8),
        "vector": (100_003,),
        "wide": (2, 50_000),
        "small": (64, 64),
        "scalar": (),
    }
    grads = {
        name: jnp.asarray(
            rng.standard_t(5, shape) * 10.0 ** rng.uniform(-2, 2), jnp.float32
        )
        for name, shape in shapes.items()
    }
    tx = sg.guard(optax.sgd(0.1), sg.clip(sg.fixed(1e9, of="update_norm")))
    step = jax.jit(lambda g: sg.metrics(sg.apply(tx, g, tx.init(g), g)[1]))
    for kept in (grads, *[{name: leaf} for name, leaf in grads.items()]):
        rest = {name: jnp.zeros(shape) for name, shape in shapes.items()}
        only = {**rest, **kept}
        exact = 0.1 * np.sqrt(
            sum(np.sum(np.asarray(x, np.float64) ** 2) for x in jax.tree.leaves(only))
        )
        seen = step(only)
        np.testing.assert_allclose(seen["raw_update_norm"], exact, rtol=1e-5)
        np.testing.assert_allclose(seen["update_norm"], exact, rtol=1e-5)


@pytest.mark.slow
def test_the_norm_of_an_update_of_few_rows_is_exact():
    # An embedding of which a batch touches 64 of 20,000 rows.
    tx = sg.guard(optax.sgd(1.0), sg.clip(sg.fixed(1e6, of="update_norm")), sg.skip())
    start = {"embed": jnp.zeros((20_000, 8))}

    def step(carry, key):
        params, state = carry
        rows = jax.random.randint(key, (64,), 0, 20_000)
        grads = {"embed": params["embed"].at[rows].add(jax.random.normal(key, (64, 8)))}
        new, state = sg.apply(tx, grads, state, params)
        exact = jnp.linalg.norm(new["embed"] - params["embed"])
        return (start, state), sg.metrics(state)["update_norm"] / exact

    keys = jax.random.split(jax.random.key(0), 20)
    _, ratios = jax.lax.scan(step, (start, tx.init(start)), keys)
    np.testing.assert_allclose(ratios, 1.0, rtol=1e-5)


def test_nothing_measures_the_update_without_a_threshold_on_it():
    params = {"w": jnp.ones(3)}
    for tx in (sg.guard(optax.sgd(0.1), sg.skip()), sg.stabilize(optax.sgd(0.1))):
        step = lambda p, s, tx=tx: sg.metrics(tx.update(p, s, p, value=None)[1])
        seen = jax.eval_shape(step, params, tx.init(params))
        assert not {"update_norm", "raw_update_norm"} & set(seen)


@pytest.mark.slow
@pytest.mark.parametrize("make", [sg.guard, sg.stabilize])
def test_exact_updates_is_accepted_with_a_warning_where_it_is_passed(make):
    with pytest.warns(DeprecationWarning, match="`exact_updates` has no") as said:
        tx = make(optax.sgd(0.1), exact_updates=True)
    assert said[0].filename == __file__
    params = {"w": jnp.ones(3)}
    updates, _ = tx.update(params, tx.init(params), params, value=None)
    np.testing.assert_allclose(updates["w"], -0.1, rtol=1e-6)


@pytest.mark.parametrize(
    "shape", [(1024, 256), pytest.param((316, 316), marks=pytest.mark.slow)]
)
def test_nothing_of_the_size_of_a_parameter_is_held_or_copied(shape):
    tx = sg.stabilize(optax.adamw(1e-3))
    params = {"w": jnp.ones(shape), "b": jnp.ones(shape[1])}
    state = tx.init(params)

    def step(params, state, grads):
        return sg.apply(tx, grads, state, params, value=1.0)

    jitted = jax.jit(step, donate_argnums=(0, 1))
    program = jitted.lower(params, state, params).compile()
    # JAX before 0.10.2 stores the squares of a leaf on a CPU while it adds them up.
    size = params["w"].nbytes
    least = size / 8 if jax.__version_info__ >= (0, 10, 2) else 1.1 * size
    if jax.default_backend() != "cpu":  # Sums of blocks, one a group of threads.
        least = size / 2
    assert program.memory_analysis().temp_size_in_bytes < least
    copies = [
        line
        for line in program.as_text().splitlines()
        if f"= f32[{shape[0]},{shape[1]}]" in line and " copy(" in line
    ]
    assert not copies


@pytest.mark.parametrize("rows", [4, ROWS])
def test_optax_can_map_over_what_is_shaped_as_the_parameters(rows):
    tx = sg.stabilize(optax.adamw(1e-3))
    params = {"w": jnp.ones((rows, 8)), "b": jnp.ones(3)}
    state = tx.init(params)
    marked = optax.tree.map_params(
        tx, lambda x: "param", state, transform_non_params=lambda x: "other"
    )
    kinds = {
        (np.shape(leaf) in {(rows, 8), (3,)}, mark)
        for leaf, mark in zip(
            jax.tree.leaves(state.guarded_inner),
            jax.tree.leaves(marked.guarded_inner),
            strict=True,
        )
    }
    assert kinds == {(True, "param"), (False, "other")}
    assert set(jax.tree.leaves((marked.numbers, marked.names))) == {"other"}


@pytest.mark.parametrize(
    "make",
    [sg.stabilize, lambda inner: sg.skip_bad_steps(inner, "olmo"), guarded],
    ids=["stabilize", "skip_bad_steps", "guard"],
)
def test_the_state_has_few_arrays_beside_the_inner_state(make):
    # Each array costs an argument and a result of the compiled step.
    tx, params = make(optax.adam(1e-3)), {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}
    count = len(jax.tree.leaves(tx.init(params)))
    inner = len(jax.tree.leaves(optax.adam(1e-3).init(params)))
    assert count - inner <= 10
