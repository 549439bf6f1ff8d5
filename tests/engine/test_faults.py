"""Random sequences of healthy, huge, tiny, zero, nan and inf steps."""

import functools

import chex
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.marking import core
from hypothesis import HealthCheck, example, given, settings

import stablegrad as sg

STEPS = 80
AFTERWARDS = 250  # Healthy steps: longer than any patience in these guards.
NORMS = {
    "healthy": 1.0,
    "huge": 1e20,
    "extreme": 3e38,
    "large": 30.0,
    "tiny": 1e-30,
    "zero": 0.0,
    "nan": np.nan,
    "inf": np.inf,
}
LOSSES = [1.0, 50.0, -1e30, 1e30, np.nan, np.inf, -np.inf]
PARAMS = {"a": jnp.ones((2, 2)), "b": jnp.ones(3)}
# Where half of the steps are huge, huge is normal, and plain Adam would remember that
# for longer than these runs: what is tested is how long the guards do.
FORGETFUL = optax.adam(0.01, b1=0.5, b2=0.5)
GUARDS = {
    "stabilize": sg.stabilize(FORGETFUL),
    "per leaf": sg.guard(
        FORGETFUL,
        sg.clip(sg.ema_ratio(2.0, per="leaf", warmup_steps=3, patience=5)),
        sg.clip(sg.zscore(2.5, per="leaf", of="update_norm")),
        sg.skip(
            sg.window_zscore(6.0, window=8),
            sg.zscore(6.0, of="value", warmup_steps=4, patience=6),
            max_consecutive=4,
        ),
        sg.back_off(sg.ema_ratio(3.0, of="value"), regrow_steps=5, hold_steps=1),
        sg.halt(after=3),
    ),
}
steps = st.tuples(st.sampled_from(list(NORMS)), st.sampled_from(LOSSES))


def grads_of(kinds):
    """One gradient a step: all of the given norm, but a nan or inf in one element."""
    norms = np.array([NORMS[kind] for kind in kinds], np.float32)
    bad = ~np.isfinite(norms)
    size = np.where(bad, 1.0, norms)[:, None] / 7**0.5
    flat = (size * np.ones((len(norms), 7))).astype(np.float32)
    flat[bad, 5] = norms[bad]
    flat = jnp.asarray(flat)
    return {"a": flat[:, :4].reshape(-1, 2, 2), "b": flat[:, 4:]}


ALL = list(HealthCheck)


@pytest.mark.parametrize("name", core(GUARDS, "stabilize"))
@settings(
    max_examples=60,
    derandomize=True,
    deadline=None,
    suppress_health_check=ALL,
    database=None,
)
@given(faults=st.lists(steps, min_size=STEPS, max_size=STEPS), fused=st.booleans())
@example(faults=[("nan", np.nan)] * STEPS, fused=True)
@example(faults=[("extreme", 1e30)] * STEPS, fused=False)
def test_any_sequence_leaves_everything_finite_and_training_resumes(
    name, faults, fused
):
    kinds, losses = zip(*faults, strict=True)
    grads = grads_of([*kinds, *["healthy"] * AFTERWARDS])
    values = np.float32([*losses, *[1.0] * AFTERWARDS])
    last, (trail, seen, inner) = compiled(name, fused)(grads, values)
    chex.assert_tree_all_finite((last, trail, inner))
    skipped = np.asarray(seen["skipped"])
    moved = np.any(np.diff(np.asarray(trail["b"]), axis=0) != 0, axis=1)
    assert not moved[skipped[1:]].any()  # A skipped step moves nothing.
    # Training resumes: healthy steps are taken, whole, at a rate that regrows.
    assert not skipped[-40:].any() and not seen["halted"][-1]
    assert moved[-40:].all() and (np.asarray(seen["clip_scale"])[-40:] > 0.5).all()
    scale = np.asarray(seen["lr_scale"])
    assert ((scale > 0) & (scale <= 1)).all()


CLIPS = optax.chain(
    sg.clip_by_percentile(window=30),
    sg.clip_by_zscore(),
    sg.clip_by_ema(),
    sg.clip_by_second_moment(),
    sg.clip_update_rms(),
    sg.clip_by_max(),
    sg.limit_direction(),
)


@pytest.mark.slow
@settings(
    max_examples=60,
    derandomize=True,
    deadline=None,
    suppress_health_check=ALL,
    database=None,
)
@given(kinds=st.lists(st.sampled_from(list(NORMS)), min_size=STEPS, max_size=STEPS))
@example(kinds=["extreme"] * STEPS)
def test_any_sequence_leaves_a_chain_of_clips_finite_and_lets_healthy_steps_pass(kinds):
    grads = grads_of([*kinds, *["healthy"] * AFTERWARDS])
    updates, state = _run_clips(grads)
    chex.assert_tree_all_finite((updates, state))
    left = np.linalg.norm(updates["b"][-40:], axis=1)
    assert (left > 0.5 * np.linalg.norm(grads["b"][-40:], axis=1)).all()


@jax.jit
def _run_clips(grads):
    """What comes out of every step, and the last state."""

    def step(state, grad):
        updates, state = CLIPS.update(grad, state, PARAMS)
        return state, updates

    state, updates = jax.lax.scan(step, CLIPS.init(PARAMS), grads)
    return updates, state


@functools.cache
def compiled(name, fused):
    """All steps in one scan: the last state, and what every step left behind."""
    tx = GUARDS[name]

    def step(carry, xs):
        params, state = carry
        grad, value = xs
        if fused:
            params, state = sg.apply(tx, grad, state, params, value=value)
        else:
            updates, state = tx.update(grad, state, params, value=value)
            params = optax.apply_updates(params, updates)
        return (params, state), (params, sg.metrics(state), state.guarded_inner)

    carry = (PARAMS, GUARDS[name].init(PARAMS))
    return jax.jit(lambda *xs: jax.lax.scan(step, carry, xs))
