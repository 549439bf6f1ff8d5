"""Tests for what is compared: names, policies, and Lookahead for one set of weights."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.marking import core

import stablegrad as sg
from stablegrad.sweep._candidates import candidate, candidates
from stablegrad.sweep._lookahead import lookahead
from stablegrad.sweep._policies import POLICIES

STEPS = 100
PARAMS = {"w": jnp.array([[1.0, -2.0], [3.0, 0.5]]), "b": jnp.array([0.1, 0.2])}


def updates_of(tx, steps=3):
    """Updates of a few steps on gradients that grow."""
    tx = optax.with_extra_args_support(tx)
    state, found = tx.init(PARAMS), []
    for i in range(steps):
        grads = jax.tree.map(lambda x, i=i: (i + 1) * x, PARAMS)
        updates, state = tx.update(grads, state, PARAMS, value=jnp.float32(1.0))
        found.append(updates)
    return found


NAMES = [
    ("sgd", lambda rate: optax.sgd(rate)),
    ("momentum", lambda rate: optax.sgd(rate, momentum=0.9)),
    ("nesterov", lambda rate: optax.sgd(rate, momentum=0.9, nesterov=True)),
    ("amsgrad", optax.amsgrad),
    ("lion", optax.lion),
    (
        "adam + cosine",
        lambda rate: optax.adam(optax.cosine_decay_schedule(rate, STEPS)),
    ),
    (
        "sgd + clip_by_norm",
        lambda rate: optax.chain(sg.clip_by_norm(1.0), optax.sgd(rate)),
    ),
    (
        "sgd + wsd + clip_by_global_norm",
        lambda rate: optax.chain(
            optax.clip_by_global_norm(1.0), optax.sgd(POLICIES["wsd"](rate, STEPS))
        ),
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("text, expected", core(NAMES, NAMES[5], NAMES[6]))
def test_a_name_is_optaxs_own_optimizer_behind_its_clips(text, expected):
    found = updates_of(candidate(text).build(0.1, STEPS))
    chex.assert_trees_all_equal(found, updates_of(expected(0.1)))


def test_a_guard_is_outermost_and_gets_what_it_needs():
    plain = candidate("adam + clip_by_zscore + stabilize")
    assert isinstance(plain.build(0.1, STEPS), sg.GuardedTransformation)
    assert plain.extra == ("value",)
    assert candidate("adam + trust_region").extra == ("value", "value_fn")
    assert candidate("sgd + stabilize_trust_region").extra == ("value", "value_fn")


@pytest.mark.parametrize(
    "text, message",
    [
        ("adm", "'adm' has the unknown word 'adm'. Known words are optimizer: sgd, m"),
        (
            "adam + cosin",
            "unknown word 'cosin'. Known words are policy: static, .*guard",
        ),
        ("adam + cosine + wsd", "at most one policy, got cosine, wsd"),
        ("adam + stabilize + skip_bad_steps", "at most one guard"),
        ("adam + ", "unknown word ''"),
        (
            "clip_by_norm + adam",
            "unknown word 'clip_by_norm'. Known words are optimizer",
        ),
    ],
)
def test_a_wrong_name_is_told_what_there_is(text, message):
    with pytest.raises(ValueError, match=message):
        candidate(text)


def test_transformations_and_functions_are_candidates_too():
    own = candidate(optax.sgd(0.5))
    assert own.own_rate and own.name == "given"
    chex.assert_trees_all_equal(
        updates_of(own.build(9.0, STEPS)), updates_of(optax.sgd(0.5))
    )
    made = candidate(optax.adam)
    assert not made.own_rate and made.name == "adam"
    named = candidates({"mine": optax.lion, "theirs": "adam"})
    assert [one.name for one in named] == ["mine", "theirs"]
    assert [one.name for one in candidates("adam")] == ["adam"]
    (alone,) = candidates(optax.adam(1e-3))
    assert alone.own_rate
    numbered = candidates({1e-3: optax.adam(1e-3), 0: made})
    assert [one.name for one in numbered] == ["0.001", "0"]


def test_what_is_no_candidate_and_two_of_one_name_are_errors():
    with pytest.raises(TypeError, match="a candidate must be a name such as"):
        candidate(0.1)
    with pytest.raises(ValueError, match="different names, got adam twice"):
        candidates(["adam", "sgd", "adam"])
    with pytest.raises(ValueError, match="at least one"):
        candidates([])


EXPECTED = {  # At steps 0, 5, 10, 15, 50, 75, 90 and 100 of 100, for a rate of 1.
    "static": [1, 1, 1, 1, 1, 1, 1, 1],
    "warmup": [0, 0.5, 1, 1, 1, 1, 1, 1],
    "stairs_up": [0.25, 0.5, 0.75, 1, 1, 1, 1, 1],
    "stairs_down": [1, 1, 1, 1, 0.1, 0.01, 0.01, 0.01],
    "cosine": (1 + np.cos(np.pi * np.array([0, 5, 10, 15, 50, 75, 90, 100]) / 100)) / 2,
    "warmup_cosine": [
        *(0, 0.5, 1),
        *(1 + np.cos(np.pi * np.array([5, 40, 65, 80, 90]) / 90)) / 2,
    ],
    "exponential": 0.01 ** (np.array([0, 5, 10, 15, 50, 75, 90, 100]) / 100),
    "wsd": [0, 0.5, 1, 1, 1, 1, 0.5, 0],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_follows_its_formula_and_never_exceeds_the_rate(name):
    def at(rate, steps):
        made = POLICIES[name](rate, STEPS)
        made = made if callable(made) else optax.constant_schedule(made)
        return jax.vmap(made)(steps)

    steps = jnp.array([0, 5, 10, 15, 50, 75, 90, 100])
    found = jax.jit(at)(jnp.float32(3.0), steps)
    np.testing.assert_allclose(found, 3 * np.array(EXPECTED[name]), atol=1e-6)
    assert jax.jit(at)(jnp.float32(1.0), jnp.arange(STEPS)).max() <= 1 + 1e-6


@pytest.mark.slow
def test_lookahead_is_optaxs_seen_from_the_fast_weights():
    wrapped = lookahead(optax.adam(0.1), 5, 0.5)
    pair_tx = optax.lookahead(optax.adam(0.1), 5, 0.5)

    @jax.jit
    def both(params):
        pair = optax.LookaheadParams.init_synced(params)

        def step(carry, i):
            params, state, pair, pair_state = carry
            slope = lambda tree: jax.tree.map(lambda x: x + jnp.cos(x + i), tree)
            moves, state = wrapped.update(slope(params), state, params)
            params = optax.apply_updates(params, moves)
            moves, pair_state = pair_tx.update(slope(pair.fast), pair_state, pair)
            pair = optax.apply_updates(pair, moves)
            return (params, state, pair, pair_state), (params, pair.fast)

        start = (params, wrapped.init(params), pair, pair_tx.init(pair))
        return jax.lax.scan(step, start, jnp.arange(12.0))[1]

    ours, theirs = both(PARAMS)
    chex.assert_trees_all_close(ours, theirs, rtol=1e-6)
    alone = updates_of(optax.adam(0.1), 1)[0]["w"]
    chex.assert_trees_all_close(updates_of(wrapped, 1)[0]["w"], alone, rtol=1e-6)
