"""Thresholds of one family share their arrays, and judge as each would alone."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.thresholding import limits, lognormal

import stablegrad as sg
from stablegrad.engine._families import batches_of

STEPS = 90
FIRST = sg.zscore(2.5, warmup_steps=10, patience=20)
SECOND = sg.zscore(4.0, decay=0.9, spread_floor=0.2, warmup_steps=10, patience=20)
OTHER = sg.zscore(3.0, warmup_steps=12, patience=20)


def signal(seed, level):
    """A norm that moves to another level, with an outlier."""
    norms = lognormal(STEPS, level=level, seed=seed)
    norms[50:] *= 8
    norms[30] *= 1e4
    return norms


def guarded(*responses):
    return sg.guard(optax.sgd(0.0), *responses, sg.halt(after=9))


@pytest.mark.parametrize("per", ["global", "leaf"])
def test_limits_in_one_state_are_those_of_each_threshold_alone(per):
    norms = np.stack([signal(0, 1.0), signal(1, 30.0)], axis=1)
    grads = {
        "a": jnp.asarray(norms[:, :1], jnp.float32),
        "b": jnp.asarray(norms[:, 1:], jnp.float32),
    }
    losses = jnp.asarray(signal(2, 5.0), jnp.float32)
    rules = [
        FIRST._replace(per=per),
        SECOND,
        OTHER,
        sg.zscore(3.0, warmup_steps=10, patience=20, of="value"),
        sg.zscore(9.0, warmup_steps=10, patience=20, of="value"),
    ]
    tx = guarded(*(sg.clip(rule) for rule in rules[:3]), sg.back_off(*rules[3:]))
    params = jax.tree.map(lambda x: x[0], grads)

    @jax.jit
    def run(state):
        def step(state, xs):
            grad, loss = xs
            _, state = tx.update(grad, state, params, value=loss)
            return state, state.record.limits

        return jax.lax.scan(step, state, (grads, losses))

    state, met = run(tx.init(params))
    whole = np.sqrt(np.sum(norms.astype(np.float32) ** 2, axis=1))
    alone = [
        limits(rules[0], norms if per == "leaf" else whole)[0],
        limits(SECOND, whole)[0],
        limits(OTHER, whole)[0],
        limits(rules[3], losses)[0],
        limits(rules[4], losses)[0],
    ]
    if per == "leaf":
        alone[0] = alone[0].min(axis=1)  # What is recorded is the strictest.
    largest = float(np.finfo(np.float32).max)
    clip, cut = "clip_zscore_grad_norm_limit", "back_off_zscore_value_limit"
    names = [clip, f"{clip}_2", f"{clip}_3", cut, f"{cut}_2"]
    assert set(names) == set(met)
    for name, expected in zip(names, alone, strict=True):
        expected = np.where(np.isinf(expected), largest, expected)
        np.testing.assert_allclose(met[name], expected, rtol=2e-5)
    chex.assert_tree_all_finite(state.threshold_states)


def test_what_differs_in_more_than_numbers_does_not_share():
    members = [
        [threshold.name for threshold in batch.members]
        for batch in batches_of(
            (
                sg.clip(FIRST),
                sg.skip(SECOND, OTHER, sg.nonfinite()),
                sg.back_off(sg.zscore(3.0, warmup_steps=10, patience=20, of="value")),
            )
        )
    ]
    assert members == [["zscore", "zscore"], ["zscore"], ["nonfinite"], ["zscore"]]


def test_the_preset_keeps_two_sets_of_statistics():
    state = sg.stabilize(optax.sgd(0.1)).init({"w": jnp.zeros(2)})
    arrays = jax.tree.leaves(state.threshold_states)
    # Norms on one scale, losses on two: gradient, update, gradient; loss, loss.
    assert sorted(x.shape[0] for x in arrays) == [2] * 11 + [3] * 6
