"""The contract that every public transformation keeps; a new one is one line here."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from helpers.marking import core

import stablegrad as sg


def chained(clip):
    return optax.chain(clip, optax.sgd(0.1))


# name -> a factory of the transformation around (or beside) plain SGD
TRANSFORMATIONS = {
    "guard": lambda: sg.guard(
        optax.sgd(0.1),
        sg.clip(sg.zscore(2.5)),
        sg.clip(sg.ema_ratio(2.0, per="leaf", of="update_norm")),
        sg.skip(sg.nonfinite(), sg.window_zscore(6.0), sg.fixed(1e4)),
        sg.back_off(sg.zscore(6.0, of="value")),
        sg.halt(after=5),
        record_norms=3,
    ),
    "stabilize": lambda: sg.stabilize(optax.sgd(0.1)),
    "roll_back": lambda: sg.guard(optax.sgd(0.1), sg.skip(), sg.roll_back()),
    "skip_bad_steps": lambda: sg.skip_bad_steps(optax.sgd(0.1), window=16),
    "clip_by_norm": lambda: chained(sg.clip_by_norm(1.0)),
    "clip_by_percentile": lambda: chained(sg.clip_by_percentile(window=30)),
    "clip_by_zscore": lambda: chained(sg.clip_by_zscore()),
    "clip_by_ema": lambda: chained(sg.clip_by_ema()),
    "clip_by_param_norm": lambda: chained(sg.clip_by_param_norm()),
    "clip_by_second_moment": lambda: chained(sg.clip_by_second_moment()),
    "clip_update_rms": lambda: chained(sg.clip_update_rms()),
    "clip_by_max": lambda: chained(sg.clip_by_max()),
    "limit_direction": lambda: chained(sg.limit_direction()),
    "scale_by_explosion_aware_schedule": lambda: chained(
        sg.scale_by_explosion_aware_schedule(
            optax.cosine_decay_schedule(1.0, 100),
            sg.ema_ratio(6.0, of="value"),
            limit=sg.fixed(1.0, per="leaf"),
        )
    ),
    # A plateau lets a nan pass; the clip before it does not.
    "reduce_on_plateau": lambda: chained(
        optax.chain(sg.clip_by_norm(9.0), sg.reduce_on_plateau(patience=0))
    ),
}
NEED_PARAMS = {"clip_by_param_norm", "roll_back"}
# Public names that are not transformations.
PIECES = {
    "fixed",
    "nonfinite",
    "rarity",
    "zscore",
    "ema_ratio",
    "window_zscore",
    "percentile",
    "param_ratio",
    "units",
}
RESPONSES = {
    "clip",
    "skip",
    "back_off",
    "trust_region",
    "roll_back",
    "halt",
    "layer_health",
}
READERS = {"metrics", "scalars", "events", "is_healthy", "raise_if_halted", "apply"}
FLIGHT_RECORDER = {"save_events", "load_events", "batches_to_leave_out", "history"}
KEEPERS = {"keep_if_skipped", "unwrap", "adopt", "migrate"}
BEFORE_TRAINING = {"critical_learning_rate", "learning_rate_range_test", "sharpness"}
IN_NETWORKS = {"limit_gradient"}
# Functions of `stablegrad.structure`; those of a chain need more than a gradient.
STRUCTURE = {
    "activation_init",
    "attend",
    "chi",
    "clip_logits",
    "critical_point",
    "decay_with_schedule",
    "deepnorm",
    "deepnorm_init",
    "depth_scaled_init",
    "fixed_point",
    "fixup_init",
    "gain",
    "limit_gradient",
    "lsuv",
    "normalize_qk",
    "soft_cap",
    "z_loss",
}
REPORTS = {"diagnose", "replay"}
SCHEDULES = {"explosion_aware_schedule", "observe_metric"}

every = pytest.mark.parametrize("name", TRANSFORMATIONS)
SIMPLE = ("clip_by_norm", "limit_direction")  # Quick to compile.
BUILT = ("guard", "clip_by_zscore")


@functools.cache
def made(name):
    """One of each, so that what two tests do alike is compiled once."""
    return TRANSFORMATIONS[name]()


@functools.cache
def compiled(name):
    """Its update, compiled once for each shape, and a list with an item a trace."""
    traces = []

    def update(*args, **extra):
        traces.append(name)
        return made(name).update(*args, **extra)

    return jax.jit(update), traces


PARAMS = {"w": jnp.ones((2, 3)), "b": jnp.ones(4)}
DTYPES = ["bfloat16", "complex64"]


def specs(tree):
    """Structure, shapes, dtypes and weak types."""
    return jax.tree.map(lambda x: (jnp.shape(x), x.dtype, x.weak_type), tree)


def params_like(dtype):
    """A tree with everything that a user's may hold: scalars, None, empty, integers."""
    return {
        "matrix": jnp.ones((2, 3), dtype),
        "scalar_and_none": (jnp.ones((), dtype), None),
        "empty": jnp.ones((0, 3), dtype),
        "integers": jnp.arange(3),
    }


@functools.partial(jax.jit, static_argnames=("name", "steps"))
def run(name, params, grads, steps):
    """Scans some steps; the carry must keep its structure for this to compile."""
    tx = made(name)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(grads, state, params, value=1.0)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), length=steps)[0]


@every
def test_built_while_tracing_it_holds_nothing_of_the_trace(name):
    built = []
    with jax.checking_leaks():
        jax.jit(lambda: built.append(TRANSFORMATIONS[name]())).trace()


def test_every_public_function_is_in_a_registry():
    functions = {name for name, _ in inspect.getmembers(sg, inspect.isfunction)}
    functions = {name for name in functions if not name.startswith("_")}
    others = PIECES | RESPONSES | READERS | KEEPERS | SCHEDULES
    others |= BEFORE_TRAINING | IN_NETWORKS | FLIGHT_RECORDER | REPORTS
    assert functions == set(TRANSFORMATIONS) | others
    pieces = {name for name, _ in inspect.getmembers(sg.structure, inspect.isfunction)}
    assert pieces == STRUCTURE


@every
@pytest.mark.parametrize("dtype", core(DTYPES, "bfloat16"))
def test_update_keeps_structure_shapes_and_dtypes(name, dtype, strict):
    tx, params = made(name), params_like(dtype)
    state = jax.eval_shape(tx.init, params)
    step = lambda grads, state, params: tx.update(
        grads, state, params, value=1.0, unused=2
    )
    with jax.numpy_dtype_promotion("standard"):  # SGD scales integers too.
        updates, after = jax.eval_shape(step, params, state, params)
    floats = {k: v for k, v in updates.items() if k != "integers"}
    chex.assert_trees_all_equal_shapes_and_dtypes(
        floats, {k: v for k, v in params.items() if k != "integers"}
    )
    assert specs(after) == specs(state)  # Hence usable under lax.scan.


@every
def test_float64_parameters_keep_their_dtype_and_the_state_its_own(name, x64):
    tx, params = made(name), {"w": jnp.ones(3, jnp.float64)}
    state = jax.eval_shape(tx.init, params)
    step = lambda grads, state, params: tx.update(grads, state, params, value=1.0)
    updates, after = jax.eval_shape(step, params, state, params)
    assert updates["w"].dtype == jnp.float64
    assert specs(after) == specs(state)
    if hasattr(after, "snapshots"):
        after = after._replace(snapshots=())  # Copies of the parameters themselves.
    assert not [x.dtype for x in jax.tree.leaves(after) if x.dtype.itemsize == 8]


@pytest.mark.parametrize("name", core(TRANSFORMATIONS, "skip_bad_steps", *SIMPLE))
def test_trees_without_numbers_work(name):
    params = {"none": None, "i": jnp.arange(2)}
    run(name, params, params, steps=3)


@every
def test_init_needs_only_shapes_and_dtypes(name):
    tx, params = made(name), params_like("float32")
    abstract = jax.eval_shape(tx.init, params)
    assert specs(abstract) == specs(tx.init(params))


@pytest.mark.parametrize("bad", [-jnp.inf, jnp.nan])
@every  # Slowest to change: one program for both.
def test_nothing_nonfinite_reaches_the_state_or_the_parameters(name, bad):
    params, state = PARAMS, made(name).init(PARAMS)
    grads = {"w": params["w"].at[1, 1].set(bad), "b": params["b"]}
    for _ in range(40):
        updates, state = compiled(name)[0](grads, state, params, value=1.0)
        params = optax.apply_updates(params, updates)
    chex.assert_tree_all_finite((params, state))
    chex.assert_trees_all_equal(params, PARAMS)


@every
def test_one_trace_serves_many_calls(name):
    params, (update, traces) = PARAMS, compiled(name)
    state, before = made(name).init(params), len(traces)
    for value in (1.0, jnp.nan, 3.0):
        _, state = update(params, state, params, value=value)
    assert len(traces) <= before + 1


@pytest.mark.slow
@pytest.mark.parametrize("name", core(BUILT, "clip_by_zscore"))
def test_one_that_is_built_within_a_trace_can_be_used_after_it(name):
    params, built = {"w": jnp.ones(3)}, []

    @jax.jit
    def build(params):
        tx = TRANSFORMATIONS[name]()
        built.append(tx)
        return tx.update(params, tx.init(params), params, value=1.0)[0]

    expected = build(params)
    (tx,) = built
    update = jax.jit(lambda p, s: tx.update(p, s, p, value=1.0))
    for _ in range(2):  # The second call takes the short way through the cache.
        found, _ = update(params, tx.init(params))
        chex.assert_trees_all_close(found, expected, rtol=1e-6)


# Not the guard of all responses, which takes a minute: `stabilize` stands for it.
UNJITTED = [name for name in TRANSFORMATIONS if name != "guard"]


@pytest.mark.parametrize("name", core(UNJITTED, "clip_by_norm"))
def test_works_the_same_without_jit(name):
    tx, params = made(name), jax.tree.map(lambda x: 6 * x, PARAMS)
    update, _ = compiled(name)
    fast, _ = update(params, tx.init(params), params, value=1.0)
    with jax.disable_jit():
        plain, _ = tx.update(params, tx.init(params), params, value=1.0)
    chex.assert_trees_all_close(plain, fast, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", core(TRANSFORMATIONS, "clip_by_zscore"))
def test_works_for_an_ensemble_under_vmap(name):
    tx, params = made(name), jax.tree.map(lambda x: jnp.stack([x] * 4), PARAMS)
    grads = jax.tree.map(lambda x: jnp.arange(1.0 * x.size).reshape(x.shape), params)
    state = jax.jit(jax.vmap(tx.init))(params)
    together = jax.jit(jax.vmap(lambda g, s, p: tx.update(g, s, p, value=1.0)))
    updates, _ = together(grads, state, params)
    third = lambda tree: jax.tree.map(lambda x: x[2], tree)
    one, (update, _) = third(params), compiled(name)
    alone, _ = update(third(grads), tx.init(one), one, value=1.0)
    chex.assert_trees_all_close(third(updates), alone, rtol=1e-6)


@every
def test_needs_no_parameters_unless_the_inner_optimizer_does(name):
    tx, params = made(name), {"w": jnp.ones(3)}
    if name in NEED_PARAMS:
        with pytest.raises(ValueError, match="needs the parameters"):
            tx.update(params, tx.init(params), value=1.0)
    else:
        jax.eval_shape(tx.update, params, tx.init(params), value=1.0)
