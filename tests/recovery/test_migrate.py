"""From one guard's state to another's."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx, serialization
from flax.training.train_state import TrainState

import stablegrad as sg
from stablegrad.engine._step import GuardState

PARAMS = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}
INNER = optax.adam(0.1)
STEPS = 60


def first():
    return sg.guard(
        INNER,
        sg.clip(sg.rarity()),
        sg.clip(sg.zscore(2.5, per="leaf")),
        sg.skip(sg.nonfinite(), sg.zscore(6.0)),
        sg.back_off(sg.ema_ratio(3.0, of="value"), hold_steps=100),
    )


def second():
    """Another order, one response less, one more, another threshold for the skip."""
    return sg.guard(
        INNER,
        sg.back_off(sg.ema_ratio(3.0, of="value"), hold_steps=100),
        sg.skip(sg.nonfinite(), sg.rarity(margin=32.0), sg.window_zscore(6.0)),
        sg.roll_back(sg.fixed(1e9, of="value")),
        sg.clip(sg.zscore(2.5, per="leaf")),
    )


@pytest.fixture(scope="module")
def old():
    """The state of the first guard after steps with a nan and a high loss."""
    tx = first()
    noise = 1 + 0.1 * jax.random.normal(jax.random.key(0), (STEPS,))
    scales = noise.at[30].set(jnp.nan)
    values = jnp.ones(STEPS).at[50].set(100.0)

    def step(carry, xs):
        params, state = carry
        grads = jax.tree.map(lambda p: xs[0] * jnp.ones_like(p), params)
        return sg.apply(tx, grads, state, params, value=xs[1]), None

    start = PARAMS, tx.init(PARAMS)
    return jax.jit(lambda xs: jax.lax.scan(step, start, xs)[0])((scales, values))


def limits(tx, params, state):
    """The limits in force in the next step, by name."""
    _, state = jax.jit(tx.update)(params, state, params, value=1.0)
    seen = sg.metrics(state)
    return {name: x.item() for name, x in seen.items() if name.endswith("_limit")}


@pytest.mark.slow
def test_what_both_guards_have_is_carried_over(old):
    params, state = old
    moved = sg.migrate(second(), params, state)
    chex.assert_trees_all_equal(moved.guarded_inner, state.guarded_inner)
    told = [str(event) for event in sg.events(moved)]
    assert told == [str(event) for event in sg.events(state)] and len(told) == 2
    before, after = sg.metrics(state), sg.metrics(moved)
    for name in ("guarded_steps", "skipped_steps", "backed_off_steps", "grad_norm"):
        assert after[name] == before[name], name
    was, now = limits(first(), params, state), limits(second(), params, moved)
    same = "clip_zscore_grad_norm_limit", "back_off_ema_ratio_value_limit"
    for name in same:
        assert now[name] == was[name], name
    # The statistics are those of another response; the margin is its own.
    ratio = now["skip_rarity_grad_norm_limit"] / was["clip_rarity_grad_norm_limit"]
    assert ratio == pytest.approx(32)
    assert now["skip_window_zscore_grad_norm_limit"] == float("inf")  # Is new.


@pytest.mark.slow
def test_a_cut_of_the_learning_rate_stays(old):
    params, state = old
    tx = second()
    moved = sg.migrate(tx, params, state)
    _, moved = jax.jit(tx.update)(params, moved, params, value=1.0)
    assert sg.metrics(moved)["lr_scale"] == sg.metrics(state)["lr_scale"] == 0.5


@pytest.mark.slow
def test_snapshots_begin_with_what_was_carried_over(old):
    params, state = old
    moved = sg.migrate(second(), params, state)
    chex.assert_trees_all_equal(moved.snapshots[0].params, params)
    chex.assert_trees_all_equal(
        jax.tree.leaves(moved.snapshots[0].guarded_inner),
        jax.tree.leaves(moved.guarded_inner),
    )
    fresh = second().init(params)
    chex.assert_trees_all_equal_shapes_and_dtypes(moved, fresh)
    widths = [own.size for own in fresh.snapshots[0].statistics]
    for own, all_of, width in zip(
        moved.snapshots[0].statistics, moved.numbers, widths, strict=True
    ):
        chex.assert_trees_all_equal(own, all_of[all_of.size - width :])


@pytest.mark.slow
def test_a_guard_that_migrates_to_itself_decides_as_before(old):
    params, state = old
    moved = sg.migrate(first(), params, state)
    assert limits(first(), params, moved) == limits(first(), params, state)


def watched(*responses, **kwargs):
    return sg.guard(optax.sgd(1e-3), *responses, **kwargs)


def with_steps(tx, steps, state=None, first=0, factor=1.0):
    """The state after steps of noise, one leaf's times a factor."""

    def step(state, i):
        noise = 1 + 0.1 * jax.random.normal(jax.random.key(i), (2,))
        grads = {"w": jnp.full((3, 2), factor * noise[0]), "b": jnp.full(2, noise[1])}
        _, state = tx.update(grads, state, PARAMS, value=1.0 + i)
        return state, None

    state = tx.init(PARAMS) if state is None else state
    number = first + jnp.arange(steps)
    return jax.jit(lambda s: jax.lax.scan(step, s, number)[0])(state)


@pytest.mark.slow
@pytest.mark.parametrize("kept", [3, 5, 9])
def test_the_rows_of_the_last_steps_are_carried_by_name(kept):
    before = watched(sg.clip(sg.rarity()), sg.skip(sg.zscore(6.0)), record_norms=5)
    after = watched(sg.skip(sg.zscore(6.0)), sg.clip(sg.fixed(9.0)), record_norms=kept)
    old = with_steps(before, 12)
    new = sg.migrate(after, PARAMS, old)
    told, fresh = sg.history(old), sg.history(new)
    count = min(5, kept)
    assert fresh.steps.tolist() == list(range(12 - count, 12))
    for name in ("leaf_norms", "loss_value", "grad_norm", "lr_scale"):
        own, theirs = getattr(fresh, name), getattr(told, name)
        np.testing.assert_array_equal(own, theirs[-count:])
    limit = "skip_zscore_grad_norm_limit"
    np.testing.assert_array_equal(fresh.limits[limit], told.limits[limit][-count:])
    assert np.isnan(fresh.limits["clip_fixed_grad_norm_limit"]).all()
    assert sg.metrics(new)[limit] == sg.metrics(old)[limit]
    assert np.isposinf(sg.metrics(new)["clip_fixed_grad_norm_limit"])
    again = with_steps(after, 2, new, 12)
    assert sg.history(again).steps.tolist() == list(range(14 - min(kept, 7), 14))


@pytest.mark.slow
def test_layer_health_warns_as_if_it_had_not_moved(tmp_path):
    tx = watched(sg.layer_health())
    old = with_steps(tx, 600)
    others = sg.layer_health(per="global"), sg.layer_health(cosine=True)
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "state", old)
        saver.wait_until_finished()
        restored = saver.restore(tmp_path / "state")
    warned = [
        int(sg.metrics(with_steps(tx, 100, state, 600, 30.0))["warned_steps"])
        for state in (
            old,
            sg.migrate(tx, PARAMS, old),
            sg.migrate(tx, PARAMS, restored),
        )
    ]
    assert warned[0] > 0 and warned == [warned[0]] * 3
    for other in others:
        moved = sg.migrate(watched(other), PARAMS, old)
        assert sg.metrics(moved)["layer_health_checks"] == 0


@pytest.mark.slow
def test_what_flax_restores_keeps_the_order_of_the_gradients_before():
    params = {f"layer{i:02d}": jnp.ones(2) for i in range(12)}
    tx = watched(sg.layer_health(every=2, cosine=True), record_norms=3)
    state = tx.init(params)
    grads = {name: i * leaf for i, (name, leaf) in enumerate(params.items())}
    for _ in range(4):
        _, state = tx.update(grads, state, params, value=1.0)
    restored = serialization.msgpack_restore(serialization.to_bytes(state))
    moved = sg.migrate(tx, params, restored)
    chex.assert_trees_all_equal(moved.layers, state.layers)
    chex.assert_trees_all_equal(moved.history, state.history)
    assert any(jnp.any(leaf > 0) for leaf in state.layers.previous_gradient)


@pytest.mark.slow
def test_a_guard_inside_a_chain_is_found(old):
    params, state = old
    tx = optax.chain(second(), optax.identity())
    moved = sg.migrate(tx, params, (state, optax.EmptyState()))
    assert sg.metrics(moved)["skipped_steps"] == 1


@pytest.mark.slow
def test_the_state_of_other_responses_is_an_error_that_names_migrate(old):
    params, state = old
    with pytest.raises(ValueError, match=r"stablegrad\.migrate\(tx, params, state\)"):
        second().update(params, state, params, value=1.0)


def old_version(state):
    fields = ("guarded_inner", "numbers", "columns", "names")
    return {name: getattr(state, name) for name in fields}


def test_a_state_of_the_first_version_keeps_the_inner_state_and_says_so(old):
    params, state = old
    with pytest.warns(UserWarning, match="of an older version"):
        moved = sg.migrate(second(), params, old_version(state))
    chex.assert_trees_all_equal(moved.guarded_inner, state.guarded_inner)
    assert sg.metrics(moved)["guarded_steps"] == 0
    with pytest.raises(ValueError, match=r"stablegrad\.migrate"):
        first().update(params, GuardState(**old_version(state)), params, value=1.0)


def test_a_state_of_a_newer_version_is_an_error(old):
    params, state = old
    layout = {**state.layout}
    (version, *_) = sorted(layout)
    del layout[version]
    newer = state._replace(layout={version.replace(" 2", " 3"): None, **layout})
    with pytest.raises(ValueError, match="of version 3; this stablegrad reads"):
        sg.migrate(second(), params, newer)


def test_a_bare_state_is_sent_to_adopt():
    with pytest.raises(ValueError, match=r"stablegrad\.adopt\(tx, params, state\)"):
        sg.migrate(second(), PARAMS, INNER.init(PARAMS))


@pytest.mark.slow
def test_states_with_more_guards_than_the_optimizer_are_an_error(old):
    params, state = old
    with pytest.raises(ValueError, match="2 guards for an optimizer with 1"):
        sg.migrate(second(), params, (state, state))


@pytest.mark.slow
def test_what_orbax_restores_without_a_target_is_migrated(old, tmp_path):
    params, state = old
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state")
    moved = sg.migrate(second(), params, restored)
    chex.assert_trees_all_equal(moved, sg.migrate(second(), params, state))


def three_events(tx):
    """A state with a high norm, then a high loss, then a gradient that is nan."""
    params, state = PARAMS, tx.init(PARAMS)
    for scale, value in ((1.0, 1.0), (1e3, 1.0), (1.0, 1e3), (np.nan, 1.0)):
        grads = jax.tree.map(lambda p, scale=scale: jnp.full_like(p, scale), params)
        params, state = sg.apply(tx, grads, state, params, value=value)
    return params, state


def watching(*signals):
    limits = [sg.fixed(50.0, of=of) for of in signals]
    return sg.guard(INNER, sg.skip(sg.nonfinite(), *limits), sg.halt(after=1))


@pytest.mark.slow
@pytest.mark.parametrize(
    "signals", [("value", "grad_norm"), ("value",), ()], ids=["swapped", "less", "none"]
)
def test_events_keep_the_signals_that_the_new_guard_has_too(signals):
    params, state = three_events(watching("grad_norm", "value"))
    moved = sg.migrate(watching(*signals), params, state)
    assert [e.signal for e in sg.events(state)[:2]] == ["grad_norm", "value"]
    kept = [name if name in signals else "" for name in ("grad_norm", "value")]
    assert [e.signal for e in sg.events(moved)[:2]] == kept
    with pytest.raises(sg.TrainingHalted, match="nonfinite gradient"):
        sg.raise_if_halted(moved)


@pytest.mark.slow
def test_counts_of_roll_backs_are_carried_and_one_program_goes_on():
    make = lambda keep: sg.guard(INNER, sg.skip(), sg.roll_back(keep=keep))
    tx, poisoned = make(2), {**PARAMS, "b": jnp.full(2, jnp.nan)}
    state = tx.init(PARAMS)
    params, state = sg.apply(tx, poisoned, state, poisoned, value=1.0)
    new = make(3)
    moved = sg.migrate(new, params, state)
    step = jax.jit(lambda p, s: sg.apply(new, PARAMS, s, p, value=1.0))
    for _ in range(3):
        params, moved = step(params, moved)
    assert sg.metrics(moved)["roll_backs"] == 1
    assert step._cache_size() == 1


def nnx_training(tx):
    """A model and an optimizer that has taken a step."""
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    grads = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    optimizer.update(model, grads, value=1.0)
    return model, optimizer


@pytest.mark.slow
def test_what_flax_restores_without_a_target_is_migrated(old):
    params, state = old
    restored = serialization.msgpack_restore(serialization.to_bytes(state))
    moved = sg.migrate(second(), params, restored)
    chex.assert_trees_all_equal(moved, sg.migrate(second(), params, state))


@pytest.mark.slow
def test_what_orbax_restores_of_an_nnx_optimizer_is_migrated_or_says_how(tmp_path):
    model, optimizer = nnx_training(first())
    params = nnx.state(model, nnx.Param)
    expected = sg.migrate(second(), params, optimizer)
    assert sg.metrics(expected)["guarded_steps"] == 1
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "whole", {"opt_state": optimizer.opt_state})
        checkpointer.save(tmp_path / "arrays", nnx.state(optimizer))
        checkpointer.wait_until_finished()
        whole, arrays = map(
            checkpointer.restore, (tmp_path / "whole", tmp_path / "arrays")
        )
        moved = sg.migrate(second(), params, whole["opt_state"])
        chex.assert_trees_all_equal(moved, expected)
        for found in (arrays, nnx.state(optimizer)):
            with pytest.raises(ValueError, match=r"nnx\.update\(target, restored\)"):
                sg.migrate(second(), params, found["opt_state"])
        # As the error says:
        target = nnx.Optimizer(model, first(), wrt=nnx.Param)
        restored = checkpointer.restore(tmp_path / "arrays", nnx.state(target))
        nnx.update(target, restored)
    chex.assert_trees_all_equal(sg.migrate(second(), params, target), expected)


@pytest.mark.parametrize("move", [sg.adopt, sg.migrate])
def test_a_train_state_stands_for_its_optimizers_state(move):
    tx = INNER if move is sg.adopt else first()
    held = TrainState.create(apply_fn=None, params=PARAMS, tx=tx)
    moved = move(second(), PARAMS, held)
    chex.assert_trees_all_equal(moved, move(second(), PARAMS, held.opt_state))


def test_a_cut_of_one_back_off_is_not_given_to_another():
    by_loss = sg.back_off(sg.fixed(10.0, of="value"), regrow_steps=1000)
    one = sg.guard(INNER, by_loss)
    two = sg.guard(INNER, by_loss, sg.back_off(sg.fixed(1e6), regrow_steps=1000))
    grads = jax.tree.map(jnp.ones_like, PARAMS)
    state = one.init(PARAMS)
    for loss in (1.0, 1.0, 1.0, 50.0):
        _, state = one.update(grads, state, PARAMS, value=loss)
    moved = sg.migrate(two, PARAMS, state)
    _, moved = two.update(grads, moved, PARAMS, value=1.0)
    _, stayed = one.update(grads, state, PARAMS, value=1.0)
    assert sg.metrics(moved)["lr_scale"] == sg.metrics(stayed)["lr_scale"] < 1


def test_statistics_and_events_of_leaves_follow_their_names():
    class Before(NamedTuple):
        w: Any
        b: Any

    class After(NamedTuple):
        b: Any
        w: Any

    tx = sg.guard(INNER, sg.clip(sg.ema_ratio(2.0, per="leaf")), sg.skip())
    params = Before(jnp.ones(3), jnp.ones(2))
    state, update = tx.init(params), jax.jit(tx.update)
    for i in range(30):
        size = jnp.nan if i == 20 else 1.0
        _, state = update(Before(size * jnp.full(3, 100.0), jnp.ones(2)), state, params)
    other = After(params.b, params.w)
    moved = sg.migrate(tx, other, state)
    assert [event.leaf for event in sg.events(moved)] == ["w"]
    _, after = tx.update(After(jnp.ones(2), jnp.full(3, 100.0)), moved, other)
    assert sg.metrics(after)["clip_scale"] == 1.0
