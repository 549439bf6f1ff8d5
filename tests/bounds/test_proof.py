"""What is shown of an optimizer's step before it is taken."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stablegrad.bounds._kinds import layout_of
from stablegrad.bounds._proof import prove
from stablegrad.bounds._ranges import Ranges

PROVEN = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": optax.adam(1e-3),
    "adamw": optax.adamw(optax.cosine_decay_schedule(1e-3, 100)),
    "adamw with bfloat16 moments": optax.adamw(1e-3, mu_dtype=jnp.bfloat16),
    "amsgrad": optax.amsgrad(1e-3),
    "nadamw": optax.nadamw(1e-3),
    "lion": optax.lion(1e-3),
    "rmsprop": optax.rmsprop(1e-3),
    "adagrad": optax.adagrad(0.1),
    "injected": optax.inject_hyperparams(optax.adamw)(1e-3),
    "masked": optax.masked(optax.adam(1e-3), {"a": True, "b": False, "s": True}),
    "accumulating": optax.MultiSteps(optax.adam(1e-3), 4),
}


def tree(seed=0, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = {"a": (6, 5), "b": (7,), "s": ()}
    return {
        name: jax.random.normal(key, shape).astype(dtype)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def ranges_of(layout, state, params):
    """The true ranges of every kind."""
    values = [[] for _ in range(layout.kinds)]
    for kinds, leaves in (
        (layout.of_state, jax.tree.leaves(state)),
        (layout.of_params, jax.tree.leaves(params)),
    ):
        for kind, leaf in zip(kinds, leaves, strict=True):
            if kind is not None:
                values[kind].append(np.asarray(leaf, np.float64).ravel())
    values = [np.concatenate(own) for own in values]
    return Ranges(
        jnp.array([v.min() for v in values], jnp.float32),
        jnp.array([v.max() for v in values], jnp.float32),
    )


@functools.lru_cache(64)
def shown(tx):
    """The proof for one step, compiled."""
    tx = optax.with_extra_args_support(tx)

    def inner(updates, state, params):
        return tx.update(updates, state, params)

    @jax.jit
    def step(grads, state, params, ranges):
        layout = layout_of(state, params)
        program = jax.make_jaxpr(inner)(grads, state, params)
        size = jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(grads)))
        proof = prove(program, layout, ranges, size, grads, state, params)
        updates, state = inner(grads, state, params)
        return proof, optax.apply_updates(params, updates), state

    return step


@pytest.mark.parametrize("name", PROVEN)
def test_healthy_steps_are_proven_and_stay_within_the_ranges(name):
    tx, params = PROVEN[name], tree()
    state = tx.init(params)
    layout = layout_of(state, params)
    ranges = ranges_of(layout, state, params)
    for i in range(12):
        grads = jax.tree.map(lambda x: 10.0 ** (i % 5 - 2) * x, tree(i + 1))  # noqa: B023
        proof, params, state = shown(tx)(grads, state, params, ranges)
        assert proof is not None and proof.holds
        ranges, true = proof.ranges, ranges_of(layout, state, params)
        assert np.all(ranges.least <= true.least) and np.all(true.most <= ranges.most)


@pytest.mark.parametrize("name", ["adam", "rmsprop", "adagrad", "sgd"])
def test_a_step_that_overflows_is_never_proven(name):
    tx, params = PROVEN[name], tree()
    state = tx.init(params)
    ranges = ranges_of(layout_of(state, params), state, params)
    seen = set()
    for exponent in (5, 15, 18, 19, 20, 25, 30, 38):
        grads = jax.tree.map(lambda x: jnp.clip(x, -1, 1) * 10.0**exponent, tree(1))  # noqa: B023
        proof, after, moments = shown(tx)(grads, state, params, ranges)
        arrays = [x for x in jax.tree.leaves((after, moments))]
        sound = all(bool(jnp.all(jnp.isfinite(x))) for x in arrays)
        assert sound or not proof.holds
        seen.add((sound, bool(proof.holds)))
    assert (True, True) in seen
    assert name == "sgd" or (False, False) in seen


def test_unknown_ranges_prove_nothing():
    tx, params = PROVEN["adam"], tree()
    state = tx.init(params)
    ranges = ranges_of(layout_of(state, params), state, params)
    for one in range(3):
        unknown = ranges._replace(most=ranges.most.at[one].set(3.4e38))
        proof, _, _ = shown(tx)(tree(1), state, params, unknown)
        assert not proof.holds


def test_a_gradient_that_is_not_finite_proves_nothing():
    tx, params = PROVEN["adam"], tree()
    state = tx.init(params)
    ranges = ranges_of(layout_of(state, params), state, params)
    for bad in (jnp.nan, jnp.inf):
        grads = {**tree(1), "b": jnp.full((7,), bad)}
        assert not shown(tx)(grads, state, params, ranges)[0].holds


@pytest.mark.parametrize(
    "tx",
    [
        optax.contrib.muon(1e-3),  # Matrix products.
        optax.add_noise(0.1, 0.5, jax.random.key(0)),  # Random numbers.
    ],
    ids=["muon", "noise"],
)
def test_there_is_no_proof_for_what_no_rule_covers(tx):
    params = tree()
    state = tx.init(params)
    layout = layout_of(state, params)
    ranges = Ranges(jnp.zeros(layout.kinds), jnp.ones(layout.kinds))
    assert shown(tx)(params, state, params, ranges)[0] is None


def test_float16_has_no_proof():
    tx, params = optax.adam(1e-3), tree(dtype=jnp.float16)
    state = tx.init(params)
    ranges = ranges_of(layout_of(state, params), state, params)
    assert shown(tx)(params, state, params, ranges)[0] is None


def test_leaves_of_one_kind_share_one_range_and_the_proof_does_not_grow_with_them():
    def equations(leaves):
        params = {str(i): jnp.ones((3, 3)) for i in range(leaves)}
        tx = optax.adamw(1e-3)
        state = tx.init(params)
        layout = layout_of(state, params)
        assert layout.kinds == 3  # Parameters and two moments.
        assert [owner for owner in layout.owners if owner is not None] == [
            *range(leaves),
            *range(leaves),
        ]
        program = jax.make_jaxpr(tx.update)(params, state, params)
        ranges = Ranges(jnp.zeros(3), jnp.ones(3))

        def proof(params, state):
            return prove(program, layout, ranges, jnp.ones(()), params, state, params)

        return len(jax.make_jaxpr(proof)(params, state).jaxpr.eqns)

    assert equations(40) == equations(2)


def test_the_proof_reads_no_leaf():
    params = {"w": jnp.ones((64, 64))}
    tx = optax.adamw(1e-3)
    state = tx.init(params)
    layout = layout_of(state, params)
    program = jax.make_jaxpr(tx.update)(params, state, params)
    ranges = Ranges(jnp.zeros(3), jnp.ones(3))
    jaxpr = jax.make_jaxpr(
        lambda p, s: prove(program, layout, ranges, jnp.ones(()), p, s, p)
    )(params, state).jaxpr
    assert jaxpr.eqns
    assert all(atom.aval.size < 64 for eqn in jaxpr.eqns for atom in eqn.invars)
