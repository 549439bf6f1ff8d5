"""Tests for the commit: non-finite elements are kept out one by one."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.marking import core
from helpers.training import of_norm, scan

import stablegrad as sg
from stablegrad import _platform
from stablegrad.engine import _commit

STEPS, BAD_STEP = 4, 1
ROWS = {"small": 2, "large": 8256}  # Of 8 columns: 2**16 elements lie between.
PLACE = (1, 2)  # The element that breaks.
WAYS = list(itertools.product(ROWS, (False, True)))  # Sizes, and whether by `apply`.
on_cpu = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="Elsewhere every step is masked."
)


def dividing(breaks):
    """SGD whose update or memory is 0/0 where the gradient is zero."""

    def update(updates, state, params=None):
        del params
        ones = jax.tree.map(lambda g: g / g, updates)
        steps = optax.tree.scale(-0.1, updates)
        if breaks == "update":
            steps = jax.tree.map(jnp.multiply, steps, ones)
        else:
            state = jax.tree.map(jnp.add, state, ones)
        return steps, state

    return optax.GradientTransformation(optax.tree.zeros_like, update)


def params_of(size):
    return {"b": jnp.ones(3), "w": jnp.ones((ROWS[size], 8))}


def gradients(size, bad_step=BAD_STEP, steps=STEPS):
    """Ones, but for a zero at one place in one step."""
    params = params_of(size)
    grads = jax.tree.map(lambda p: jnp.ones((steps, *p.shape)), params)
    return {**grads, "w": grads["w"].at[bad_step, *PLACE].set(0.0)}


def only_at_place(flags):
    """Whether flags are true at `PLACE` and nowhere else."""
    return bool(flags[PLACE]) and int(np.sum(flags)) == 1


def assert_one_event(state, kind, reason=""):
    (event,) = sg.events(state)
    assert (event.step, event.until) == (BAD_STEP, BAD_STEP)
    assert (event.kind, event.reason, event.leaf) == (kind, reason, "w")


@pytest.mark.slow
@pytest.mark.parametrize("size, apply", core(WAYS, ("small", False), ("large", True)))
def test_an_element_of_the_update_is_kept_out_and_the_others_move(size, apply):
    tx = sg.guard(dividing("update"))
    _, state, (trail, seen, _) = scan(tx, gradients(size), params_of(size), apply=apply)
    np.testing.assert_array_equal(seen["kept_out_elements"], [0, 1, 0, 0])
    assert not seen["skipped"].any()
    assert sg.metrics(state)["kept_out_steps"] == 1
    assert only_at_place(trail["w"][BAD_STEP] == trail["w"][BAD_STEP - 1])
    for step in range(1, STEPS):
        moved = trail["w"][step - 1] - trail["w"][step]
        expected = np.full(moved.shape, 0.1)
        expected[PLACE] = 0.0 if step == BAD_STEP else 0.1
        np.testing.assert_allclose(moved, expected, rtol=1e-5)
    np.testing.assert_allclose(trail["b"][-1], 1 - 0.1 * STEPS, rtol=1e-5)
    assert_one_event(state, "keep_out")


@pytest.mark.slow
@pytest.mark.parametrize("apply", core([False, True], False), ids=["update", "apply"])
def test_an_element_of_the_inner_state_is_kept_out_and_the_step_is_taken(apply):
    tx = sg.guard(dividing("memory"))
    _, state, (trail, seen, inner) = scan(
        tx, gradients("small"), params_of("small"), apply=apply
    )
    np.testing.assert_array_equal(seen["kept_out_elements"], [0, 1, 0, 0])
    assert not seen["skipped"].any()
    assert only_at_place(inner["w"][BAD_STEP] == inner["w"][BAD_STEP - 1])
    expected = np.full((2, 8), STEPS)
    expected[PLACE] = STEPS - 1
    np.testing.assert_array_equal(inner["w"][-1], expected)
    unmoved = trail["w"][BAD_STEP] == trail["w"][BAD_STEP - 1]
    assert only_at_place(unmoved)  # Its gradient is zero.
    assert_one_event(state, "keep_out")


@pytest.mark.slow
@on_cpu
@pytest.mark.parametrize("apply", core([False, True], True), ids=["update", "apply"])
def test_a_large_step_that_would_break_the_inner_state_is_rejected(apply):
    tx = sg.guard(dividing("memory"))
    _, state, (trail, seen, inner) = scan(
        tx, gradients("large"), params_of("large"), apply=apply
    )
    reason = sg.Reason.NONFINITE_STATE
    np.testing.assert_array_equal(seen["skip_reason"], [0, reason, 0, 0])
    at = lambda step: jax.tree.map(lambda leaf: leaf[step], (trail, inner))
    chex.assert_trees_all_equal(at(BAD_STEP), at(BAD_STEP - 1))
    chex.assert_tree_all_finite(at(-1))
    np.testing.assert_array_equal(inner["w"][-1], STEPS - 1)
    assert_one_event(state, "skip", "nonfinite_state")


@pytest.mark.slow
@on_cpu
def test_a_large_step_that_is_not_inspected_keeps_the_parameters_finite():
    tx = sg.guard(dividing("update"))
    grads = gradients("large", bad_step=9, steps=11)
    _, _, (trail, seen, _) = scan(tx, grads, params_of("large"), apply=True)
    assert only_at_place(trail["w"][9] == trail["w"][8])
    assert (trail["w"][10] != trail["w"][9]).all()
    assert not seen["kept_out_elements"].any()  # Only inspected steps are counted.


@pytest.mark.slow
def test_elements_kept_out_of_update_and_state_at_one_place_count_once():
    both = optax.chain(dividing("memory"), dividing("update"))
    _, _, (_, seen, _) = scan(sg.guard(both), gradients("small"), params_of("small"))
    np.testing.assert_array_equal(seen["kept_out_elements"], [0, 1, 0, 0])


@pytest.mark.slow
@pytest.mark.parametrize("size, apply", core(WAYS, ("small", False)))
def test_a_step_without_a_finite_element_counts_as_rejected_and_halts(size, apply):
    broken = optax.stateless(lambda g, p: jax.tree.map(lambda x: x / x * -0.1, g))
    params = params_of(size)
    grads = jax.tree.map(lambda p: jnp.ones((5, *p.shape)).at[1:4].set(0.0), params)
    tx = sg.guard(broken, sg.halt(after=3))
    _, state, (trail, seen, _) = scan(tx, grads, params, apply=apply)
    reason = sg.Reason.NONFINITE_UPDATE
    np.testing.assert_array_equal(seen["skip_reason"], [0, reason, reason, reason, 0])
    np.testing.assert_array_equal(seen["halted"], [0, 0, 0, 1, 0])
    np.testing.assert_array_equal(trail["w"][3], trail["w"][0])
    assert (trail["w"][4] != trail["w"][3]).all()
    assert [event.kind for event in sg.events(state)] == ["skip", "halt"]


@pytest.mark.slow
def test_a_halt_on_steps_without_a_finite_element_is_raised():
    broken = optax.stateless(lambda g, p: jax.tree.map(lambda x: x - x / 0.0, g))
    tx = sg.guard(broken, sg.halt(after=2))
    _, state, _ = scan(tx, of_norm(np.ones(3)), {"w": jnp.ones(2)})
    with pytest.raises(sg.TrainingHalted, match="3 steps in a row were rejected"):
        sg.raise_if_halted(state)


OPTIMIZERS = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "adam": optax.adam(1e-3),
    "adamw": optax.adamw(1e-3),
    "lion": optax.lion(1e-3),
    "rmsprop": optax.rmsprop(1e-3),
    "adagrad": optax.adagrad(0.1),
    "bfloat16 moments": optax.adamw(1e-3, mu_dtype=jnp.bfloat16),
    # Their updates overflow by themselves, in some elements.
    "rate of 1e25": optax.sgd(1e25),
    "no epsilon": optax.adam(1e-3, eps=0.0),
}
# Norms of a run, and whether all of each is in one element.
NORMS = [1, 1, 0.9e18, 0.9e18, 1e-3, 0.9e18, 0, 1e-18, 1e-25, 1, 9e11, 9e11, 0.9e18, 1]
SPIKY = [i % 3 == 0 for i in range(len(NORMS))]


@pytest.mark.parametrize("size, apply", core(WAYS, ("large", True)))
@pytest.mark.parametrize("name", core(OPTIMIZERS, "adam"))
def test_finite_gradients_never_break_parameters_or_inner_state(name, size, apply):
    tx, params = sg.guard(OPTIMIZERS[name]), params_of(size)
    flat = optax.tree.scale(1 / optax.tree.norm(params), params)
    zeros = optax.tree.zeros_like(params)
    one = {**zeros, "w": zeros["w"].at[PLACE].set(-1.0)}

    @jax.jit
    def run(params, norms, spiky):
        def step(carry, xs):
            params, state = carry
            norm, is_spiky = xs
            grads = optax.tree.scale(norm, optax.tree.where(is_spiky, one, flat))
            if apply:
                params, state = sg.apply(tx, grads, state, params)
            else:
                updates, state = tx.update(grads, state, params)
                params = optax.apply_updates(params, updates)
            leaves = jax.tree.leaves((params, state.guarded_inner))
            finite = [jnp.isfinite(x).all() for x in leaves]
            return (params, state), (jnp.stack(finite), sg.metrics(state))

        return jax.lax.scan(step, (params, tx.init(params)), (norms, spiky))

    (after, _), (finite, seen) = run(params, jnp.array(NORMS), jnp.array(SPIKY))
    assert finite.all()
    assert not np.isin(seen["skip_reason"], [sg.Reason.GRADIENT_OVERFLOW]).any()
    assert (after["b"] != params["b"]).all()


@pytest.mark.slow
@pytest.mark.parametrize("by_apply", (False, True))
def test_the_program_of_an_accelerator_counts_as_that_of_a_cpu_does(
    by_apply, monkeypatch
):
    tx = sg.guard(dividing("update"), sg.skip())
    good = {"a": jnp.array([1.0, 0.0, 1.0]), "b": jnp.ones((2, 40))}
    nan = {**good, "a": jnp.full(3, jnp.nan)}
    sound = jax.tree.map(jnp.ones_like, good)
    poisoned = {**sound, "b": sound["b"].at[0, 3].set(jnp.inf)}

    def seen():
        def step(gradients, params):
            state = tx.init(params)
            if by_apply:
                return sg.apply(tx, gradients, state, params)
            updates, state = tx.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        found = []
        for gradients, params in ((good, sound), (nan, sound), (nan, poisoned)):
            params, state = jax.jit(step)(gradients, params)
            found.append((params, sg.metrics(state)))
        return found

    here = seen()
    for module in (_platform, _commit):
        monkeypatch.setattr(module, "on_cpu", lambda: jnp.zeros((), bool))
    elsewhere = seen()
    chex.assert_trees_all_equal(here, elsewhere)
    numbers = [m for _, m in elsewhere]
    assert [int(m["kept_out_elements"]) for m in numbers] == [1, 0, 0]
    assert [int(m["first_bad_leaf"]) for m in numbers] == [0, 0, 1]
    assert numbers[2]["skip_reason"] == sg.Reason.NONFINITE_PARAMETERS
