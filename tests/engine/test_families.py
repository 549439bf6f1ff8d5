"""Thresholds of one family share their arrays, and judge as each would alone."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.thresholding import limits, lognormal

import stablegrad as sg
from stablegrad.engine._families import Statistics

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


@pytest.mark.slow
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
            return state, sg.metrics(state)

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
    clip, cut = "clip_zscore_grad_norm_limit", "back_off_zscore_value_limit"
    names = [clip, f"{clip}_2", f"{clip}_3", cut, f"{cut}_2"]
    assert set(names) == {name for name in met if "_limit" in name}
    for name, expected in zip(names, alone, strict=True):
        np.testing.assert_allclose(met[name], expected, rtol=2e-5)
    chex.assert_tree_all_finite(state)


def rows(states):
    """The number of groups in each family's state; None if it has no arrays."""
    counts = [{x.shape[0] for x in jax.tree.leaves(state)} for state in states]
    assert all(len(own) <= 1 for own in counts)
    return [own.pop() if own else None for own in counts]


def test_what_differs_in_more_than_numbers_does_not_share():
    statistics = Statistics(
        (
            sg.clip(FIRST._replace(per="leaf")),
            sg.skip(SECOND, OTHER, sg.nonfinite(), sg.ema_ratio(2.0)),
            sg.back_off(sg.zscore(3.0, warmup_steps=10, patience=20, of="value")),
        )
    )
    states = statistics.init({"a": jnp.zeros(2), "b": jnp.zeros(2)})
    # Two leaves, a gradient norm and a loss; another warm-up; no state; another kind.
    assert rows(states) == [4, 1, None, 1]


def test_the_thresholds_of_the_preset_share_one_state():
    rules = (
        sg.clip(sg.zscore(2.5)),
        sg.skip(sg.nonfinite(), sg.zscore(6.0), sg.zscore(6.0, of="value")),
        sg.back_off(sg.zscore(4.0, of="value")),
    )
    params = {"w": jnp.zeros(2)}
    assert rows(Statistics(rules).init(params)) == [4, None]
    own = jax.tree.leaves(sg.stabilize(optax.identity()).init(params))
    assert sorted(str(x.dtype) for x in own) == ["float32", "int32", "uint8"]
