"""States, files and folders with a history that recovery must not misread."""

import os
import shutil
import threading
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import stablegrad as sg
from stablegrad.integrations import _checkpoint_folders
from stablegrad.integrations.orbax import HealthyCheckpoints

PARAMS = {"w": jnp.ones(3)}
SKIPS = sg.guard(optax.sgd(0.1), sg.skip())
UPDATE = jax.jit(SKIPS.update)


def every_other_is_bad(state, first, stop):
    for i in range(first, stop):
        grads = {"w": jnp.full(3, jnp.nan if i % 2 == 0 else 1.0)}
        _, state = UPDATE(grads, state, PARAMS, batch_id=i)
    return state


def test_a_file_with_an_abandoned_course_of_the_run_does_not_hide_lost_events(tmp_path):
    path = tmp_path / "events.jsonl"
    checkpoint = every_other_is_bad(SKIPS.init(PARAMS), 1, 3)
    sg.save_events(every_other_is_bad(checkpoint, 100, 200), path)
    resumed = every_other_is_bad(checkpoint, 1000, 1200)
    sg.save_events(resumed, path)
    forgotten = sg.load_events(path).forgotten
    assert forgotten == sg.events(resumed).forgotten > 0
    # With an event in common with the file, nothing was lost since.
    sg.save_events(every_other_is_bad(resumed, 1200, 1210), path)
    assert sg.load_events(path).forgotten == forgotten


def test_a_resumed_run_that_is_saved_in_time_has_lost_nothing(tmp_path):
    path = tmp_path / "events.jsonl"
    checkpoint = every_other_is_bad(SKIPS.init(PARAMS), 1, 3)
    sg.save_events(every_other_is_bad(checkpoint, 100, 200), path)
    state = checkpoint
    for start in range(1000, 1400, 100):
        state = every_other_is_bad(state, start, start + 100)
        sg.save_events(state, path)
    assert sg.load_events(path).forgotten == 0
    ids = sg.batches_to_leave_out(sg.load_events(path))
    assert {*range(1000, 1400, 2)} <= {*ids}


def test_a_back_off_that_is_dropped_is_told():
    other = sg.back_off(sg.fixed(1e9))
    two = sg.guard(optax.sgd(0.1), other, sg.back_off(sg.fixed(5.0, of="value")))
    one = sg.guard(optax.sgd(0.1), sg.back_off(sg.fixed(5.0, of="value")))
    with pytest.warns(UserWarning, match="had 2|has 2 `back_off`s and the new one 1"):
        sg.migrate(one, PARAMS, two.init(PARAMS))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sg.migrate(two, PARAMS, one.init(PARAMS))


@pytest.mark.parametrize("others", [{"v": jnp.ones(3)}, {**PARAMS, "v": jnp.ones(2)}])
def test_migrate_names_parameters_that_are_others(others):
    state = SKIPS.init(PARAMS)
    with pytest.raises(ValueError, match=r"of other parameters.*\['v'\]"):
        sg.migrate(SKIPS, others, state)


def test_migrate_says_that_it_cannot_be_traced():
    many = jax.tree.map(lambda p: jnp.stack([p, p]), PARAMS)
    states = jax.vmap(SKIPS.init)(many)
    with pytest.raises(ValueError, match="one member after the other"):
        jax.vmap(lambda p, s: sg.migrate(SKIPS, p, s))(many, states)


def test_a_calm_checkpoint_deleted_by_hand_is_not_the_one_that_is_kept(tmp_path):
    tx = sg.stabilize(optax.adam(0.1))
    calm = tx.init(PARAMS)
    nan = jax.tree.map(lambda p: p * jnp.nan, PARAMS)
    _, shaken = jax.jit(tx.update)(nan, calm, PARAMS, value=1.0)
    with HealthyCheckpoints(tmp_path / "run", keep=2) as checkpoints:
        checkpoints.save(1, PARAMS, calm)
        checkpoints.save(2, PARAMS, calm)
        checkpoints.wait()
        shutil.rmtree(tmp_path / "run" / "2")
        for step in (3, 4, 5):
            checkpoints.save(step, PARAMS, shaken)
        checkpoints.wait()
        assert checkpoints.steps == [1, 4, 5]
    assert {"1", "4", "5"} <= {*os.listdir(tmp_path / "run")}


def test_a_new_folder_may_be_claimed_by_many_at_once(tmp_path):
    for attempt in range(20):
        folder, errors = tmp_path / str(attempt), []
        gate = threading.Barrier(4)

        def claim(folder=folder, errors=errors, gate=gate):
            gate.wait()
            try:
                _checkpoint_folders.claim(folder)
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=claim) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        _checkpoint_folders.claim(folder)


def test_replay_tells_a_roll_back_and_donated_arrays():
    tx = sg.guard(optax.sgd(0.1), sg.skip(), sg.roll_back())
    state = (PARAMS, tx.init(PARAMS))

    def step(state, grads):
        params, opt_state = state
        return sg.apply(tx, grads, opt_state, params, value=1.0)

    nan = jax.tree.map(lambda p: p * jnp.nan, PARAMS)
    back = jax.jit(step)((nan, state[1]), nan)
    assert sg.metrics(back)["rolled_back"]
    with pytest.raises(ValueError, match="the last step rolled back"):
        sg.replay(step, back, nan)
    own = jax.tree.map(jnp.copy, state)
    after = jax.jit(step, donate_argnums=0)(own, PARAMS)
    if own[0]["w"].is_deleted():
        with pytest.raises(ValueError, match="were donated"):
            sg.replay(step, own, PARAMS, after=after)


@pytest.mark.parametrize("given", ["17", "abc", -1, 2**31])
def test_a_batch_id_that_is_no_small_integer_is_an_error(given):
    with pytest.raises(ValueError, match=r"`batch_id` must be an integer in \[0, 2"):
        SKIPS.update(PARAMS, SKIPS.init(PARAMS), PARAMS, batch_id=given)


def test_adopt_counts_in_whole_steps():
    state = sg.adopt(SKIPS, PARAMS, optax.sgd(0.1).init(PARAMS), step=np.float64(5.0))
    assert int(sg.metrics(state)["guarded_steps"]) == 5
