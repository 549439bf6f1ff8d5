"""Tests for the causes and batches of events, and for `save_events` and its readers."""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import stablegrad as sg

LOSS_LIMIT = 5.0
TX = sg.guard(
    optax.sgd(0.1),
    sg.clip(sg.fixed(2.0)),
    sg.skip(sg.nonfinite(of="value"), sg.fixed(50.0)),
    sg.back_off(sg.fixed(LOSS_LIMIT, of="value")),
)
START = {"w": jnp.zeros(2)}


@jax.jit
def step(state, norm, loss, batch_id):
    grads = {"w": jnp.array([0.6, 0.8]) * norm}
    return TX.update(grads, state, START, value=loss, batch_id=batch_id)[1]


def run(rows, state=None):
    """A step for each (norm, loss, id of the batch)."""
    state = jax.jit(TX.init)(START) if state is None else state
    for norm, loss, batch_id in rows:
        state = step(state, jnp.float32(norm), jnp.float32(loss), jnp.int32(batch_id))
    return state


def told(event):
    return event.kind, event.signal, event.value, event.limit, event.batch_ids


def test_an_event_tells_signal_value_limit_and_the_batches():
    rows = [
        (1, 1, 9),
        (60, 1, 8),  # Above the limit of `skip`, and above that of `clip` before it.
        (70, 1, 17),
        (3, 1, 5),  # Clipped alone, which is not an event.
        (1, 7, 4),
        (1, np.inf, 2),
        (np.nan, 1, 3),
        (np.inf, 1, 1),
    ]
    found = [told(event) for event in sg.events(run(rows))]
    assert found[0] == ("skip", "grad_norm", pytest.approx(60), 50, (8, 17))
    assert found[1] == ("back_off", "value", 7, LOSS_LIMIT, (4,))
    assert found[2] == ("skip", "value", np.inf, np.inf, (2,))
    assert found[3][:2] == ("skip", "grad_norm") and np.isnan(found[3][2])
    assert found[3][3:] == (pytest.approx(1e18), (3,))
    assert found[4][:3] == ("skip", "grad_norm", np.inf)
    assert str(sg.events(run(rows))[0]).endswith("grad_norm 60 above 50")


@pytest.mark.slow
def test_events_without_a_batch_id_have_none_and_a_wrong_one_is_an_error():
    bad = {"w": jnp.full(2, jnp.nan)}
    state = TX.init(START)
    _, after = TX.update(bad, state, START, value=1.0)
    assert sg.events(after)[0].batch_ids == ()
    for wrong in (1.5, jnp.zeros(2, jnp.int32), jnp.float32(3)):
        with pytest.raises(ValueError, match="batch_id"):
            TX.update(bad, state, START, value=1.0, batch_id=wrong)
    for wrong in (-1, 2**31, np.int64(2**32 + 17), np.uint32(2**32 - 1)):
        with pytest.raises(
            ValueError, match=r"`batch_id` must be an integer in \[0, 2"
        ):
            TX.update(bad, state, START, value=1.0, batch_id=wrong)
    with pytest.raises(ValueError, match=r"`batch_id` must be an integer in \[0, 2"):
        jax.jit(lambda s: TX.update(bad, s, START, value=1.0, batch_id=-1))(state)


def test_the_log_stays_bounded_and_says_what_it_forgot(tmp_path):
    state = TX.init(START)
    shapes = jax.tree.map(jnp.shape, state)
    rows = [(np.nan if i % 2 else 1, 1, i) for i in range(200)]
    state = run(rows, state)
    assert jax.tree.map(jnp.shape, state) == shapes
    assert len(sg.events(state)) == 64 and sg.events(state).forgotten == 36
    assert str(sg.events(state)).startswith("36 older events are no longer known\n")
    # One run of 300 steps is one event, of which the last 256 batches are known.
    state = run([(np.nan, 1, 1000 + i) for i in range(300)], state)
    event = sg.events(state)[-1]
    assert (event.step, event.until) == (199, 499)
    assert event.batch_ids == tuple(range(1044, 1300))
    with pytest.warns(UserWarning, match="the batches of .* are not known"):
        assert sg.batches_to_leave_out(sg.events(state)[-1:]) == [*range(1044, 1300)]


def test_a_file_keeps_what_the_ring_has_lost_and_takes_a_resumed_run(tmp_path):
    path = tmp_path / "events.jsonl"
    state, saved = None, None
    for start in range(0, 200, 50):
        rows = [(np.nan if i % 2 else 1, 1, i) for i in range(start, start + 50)]
        state = run(rows, state)
        sg.save_events(state, path)
        saved = state if start == 50 else saved
    whole = sg.load_events(path)
    assert whole.forgotten == 0
    assert [event.step for event in whole] == list(range(1, 200, 2))
    assert sg.batches_to_leave_out(whole) == list(range(1, 200, 2))
    # The run goes back to step 100 and leaves those batches out.
    rows = [(np.inf if i == 7 else 1, 7 if i == 9 else 1, 500 + i) for i in range(20)]
    sg.save_events(run(rows, saved), path)
    again = sg.load_events(path)
    assert len(again) == 101  # Step 107 has a newer account, step 109 another event.
    found = {(e.step, e.kind): (e.reason, e.batch_ids) for e in again}
    assert found[107, "skip"] == ("gradient_overflow", (107, 507))
    assert found[109, "skip"] == ("nonfinite_gradient", (109,))
    assert found[109, "back_off"] == ("", (509,))


@pytest.mark.parametrize("period", [7, 1000])
def test_ids_that_a_guard_has_forgotten_stay_in_the_file(period, tmp_path):
    path, state = tmp_path / "events.jsonl", None
    good = range(period - 1, 400, period)  # Each ends an event of several steps.
    for start in range(0, 400, 50):
        rows = range(start, start + 50)
        state = run([(1 if i in good else np.nan, 1, i) for i in rows], state)
        sg.save_events(state, path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ids = sg.batches_to_leave_out(sg.load_events(path))
    assert ids == sorted({*range(400)} - {*good})
    assert all([*e.batch_ids] == sorted(e.batch_ids) for e in sg.load_events(path))


def test_a_batch_that_was_tried_again_and_again_is_not_called_unknown(tmp_path):
    path, state = tmp_path / "events.jsonl", run([(np.nan, 1, 5)] * 3)
    for _ in range(2):
        sg.save_events(state, path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sg.batches_to_leave_out(sg.load_events(path)) == [5]


def test_more_ids_than_steps_do_not_hide_that_others_are_unknown():
    (event,) = sg.events(run([(60, 1, 8)]))
    listed = [event._replace(batch_ids=(8, 9)), event._replace(batch_ids=())]
    with pytest.warns(UserWarning, match="the batches of 1 steps"):
        assert sg.batches_to_leave_out(listed) == [8, 9]


def test_events_of_several_guards_are_told_apart(tmp_path):
    path = tmp_path / "events.jsonl"
    both = run([(np.nan, 1, 1), (60, 1, 2)]), run([(1, 1, 3), (70, 1, 4)])
    for _ in range(2):
        sg.save_events(both, path)
        found = sg.load_events(path)
        assert [(e.step, e.guard, e.batch_ids) for e in found] == [
            (0, 0, (1,)),
            (1, 0, (2,)),
            (1, 1, (4,)),
        ]
    assert str(found) == str(sg.events(both))
    assert str(found[2]).startswith("guard 1, step 1: skip (gradient norm), leaf w")
    assert {event.guard for event in sg.events(both[0])} == {None}


def test_a_file_of_a_version_without_guards_is_gone_on_with(tmp_path):
    path, state = tmp_path / "events.jsonl", run([(60, 1, 8)])
    sg.save_events(state, path)
    text = path.read_text()
    path.write_text(text.replace(', "guard": null', ""))
    assert path.read_text() != text and sg.load_events(path) == sg.events(state)
    sg.save_events(state, path)
    assert path.read_text() == text


def test_the_draft_of_a_killed_process_is_overwritten(tmp_path):
    path = tmp_path / "events.jsonl"
    path.with_name("events.jsonl.tmp").write_text('{"step"')
    sg.save_events(run([(60, 1, 8)]), path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert len(sg.load_events(path)) == 1


def test_a_file_says_how_many_events_were_lost_before_it(tmp_path):
    path = tmp_path / "events.jsonl"
    state = run([(np.nan if i % 2 else 1, 1, i) for i in range(200)])
    for _ in range(2):
        sg.save_events(state, path)
        assert sg.load_events(path).forgotten == 36
    assert json.loads(path.read_text().splitlines()[0]) == {"events_forgotten": 36}


def test_events_go_to_json_and_back(tmp_path):
    path = tmp_path / "events.jsonl"
    state = run([(60, 1, 8), (1, np.inf, 2), (np.nan, 1, 3)])
    sg.save_events(state, path)
    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)  # No NaN or Infinity.
    back = sg.load_events(path)
    np.testing.assert_equal(
        [e._asdict() for e in back], [e._asdict() for e in sg.events(state)]
    )


def test_a_symbolic_link_stays_one_and_blank_lines_are_skipped(tmp_path):
    target, link = tmp_path / "there.jsonl", tmp_path / "events.jsonl"
    target.touch()
    link.symlink_to(target)
    state = run([(np.nan, 1, 3)])
    sg.save_events(state, link)
    assert link.is_symlink()
    target.write_text(target.read_text() + "\n  \n")
    assert [e.step for e in sg.load_events(link)] == [0]


BROKEN = (
    ("not JSON", b'{"step": 1, "kind"'),
    ("not JSON", b"\xff\xfe\x00"),
    ("its fields are not", b'{"step": 1}'),
    ("its fields are not", b"[1, 2]"),
    ("its fields are not", b'["events_forgotten"]'),
    ("its fields are not", b"5"),
    ("its fields are not", b'{"step": 1, "events_forgotten": 1}'),
    ("`events_forgotten` must be an integer >= 0", b'{"events_forgotten": null}'),
    ("`events_forgotten` must be an integer >= 0", b'{"events_forgotten": "x"}'),
    # A whole event, with other values of some fields.
    ("`limit` must be a number, got 'fifty'", {"limit": "fifty"}),
    ("`loss` must be a number", {"loss": None}),
    ("`kind` must be a string, got 3", {"kind": 3}),
    ("`leaf` must be a string", {"leaf": None}),
    ("`member` must be null or an integer >= 0", {"member": "x"}),
    ("`guard` must be null or an integer >= 0", {"guard": -1}),
    ("`batch_ids` must be a list of integers >= 0", {"batch_ids": "12"}),
    ("`batch_ids` must be a list of integers >= 0", {"batch_ids": [1.5]}),
    ("`step` must be an integer >= 0, got -1", {"step": -1}),
    ("`step` must be an integer >= 0", {"step": 1.5}),
    ("`until` must be an integer >= 0", {"until": True}),
    ("`until` must be >= `step`, got 0", {"step": 1}),
)


@pytest.mark.parametrize(("what", "line"), BROKEN)
def test_a_broken_file_is_a_clear_error_and_stays_as_it_is(what, line, tmp_path):
    path, state = tmp_path / "events.jsonl", run([(60, 1, 8)])
    sg.save_events(state, path)
    whole = path.read_bytes()
    bad = line
    if isinstance(line, dict):
        bad = json.dumps(json.loads(whole) | line).encode()
    path.write_bytes(whole + bad + b"\n")
    before = path.read_bytes()
    for touch in (sg.load_events, lambda path: sg.save_events(state, path)):
        with pytest.raises(ValueError, match=rf"line 2, is not an event: .*{what}"):
            touch(path)
    assert path.read_bytes() == before


def test_a_file_that_cannot_be_written_stays_as_it_is(tmp_path, monkeypatch):
    path, state = tmp_path / "events.jsonl", run([(60, 1, 8)])
    sg.save_events(state, path)
    before = path.read_bytes()

    def full(self, data):
        self.write_text(data.decode()[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(path), "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        sg.save_events(run([(70, 1, 9)], state), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["events.jsonl"]


def test_batches_are_left_out_by_kind_and_only_of_events():
    listed = sg.events(run([(1, 1, 9), (1, 7, 4), (60, 1, 8), (1, 1, 3), (60, 1, 8)]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sg.batches_to_leave_out(listed) == [8]
        assert sg.batches_to_leave_out(listed, kinds=("back_off",)) == [4]
    with pytest.raises(TypeError, match="takes the events of"):
        sg.batches_to_leave_out([3])


@pytest.mark.slow
def test_the_cause_is_the_leaf_s_own_limit_and_a_function_is_called_by_its_name():
    def spread(updates, params, extra):
        return jnp.float32(7)

    tx = sg.guard(
        optax.sgd(0.1),
        sg.skip(sg.fixed(9.0, per="leaf"), sg.fixed(3.0, of=spread)),
    )
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    grads = {"a": jnp.ones(1), "b": jnp.full(1, 20.0)}
    _, state = tx.update(grads, tx.init(params), params)
    (event,) = sg.events(state)
    assert told(event)[1:4] == ("grad_norm", 20, 9)
    _, state = tx.update(params, tx.init(params), params)
    assert told(sg.events(state)[0])[1:4] == ("skip_fixed_spread", 7, 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "batch_id", [jnp.uint32(2**31 + 5), jnp.int32(-3), np.uint32(2**31 + 5)]
)
def test_an_id_that_an_event_cannot_hold_is_not_kept_as_another_one(batch_id, tmp_path):
    bad, tx = jnp.full(2, jnp.nan), sg.guard(optax.sgd(0.1), sg.skip())
    update = jax.jit(lambda state, i: tx.update(bad, state, bad * 0, batch_id=i))
    _, state = update(tx.init(jnp.zeros(2)), batch_id)
    assert sg.events(state)[0].batch_ids == ()
    sg.save_events(state, tmp_path / "events.jsonl")
    assert sg.load_events(tmp_path / "events.jsonl")[0].batch_ids == ()


def test_kinds_that_no_event_has_are_an_error():
    for kinds in (("skips",), "skip"):
        with pytest.raises(ValueError, match="`kinds` must be some of"):
            sg.batches_to_leave_out([], kinds=kinds)


@pytest.mark.slow
def test_the_batch_of_a_roll_back_is_left_out_if_its_own_gradient_was_refused():
    tx = sg.guard(optax.sgd(0.1), sg.skip(), sg.roll_back(after=3))
    params, state = jnp.zeros(2), tx.init(jnp.zeros(2))
    step = jax.jit(lambda g, s, p, i: sg.apply(tx, g, s, p, value=None, batch_id=i))
    for i in range(12):
        grads = jnp.full(2, jnp.nan if 4 <= i < 8 else 1.0)
        params, state = step(grads, state, params, i)
    listed = sg.events(state)
    assert [event.kind for event in listed] == ["skip", "roll_back", "skip"]
    assert sg.batches_to_leave_out(listed) == [4, 5, 6, 7]
    assert sg.batches_to_leave_out(listed, kinds=("halt",)) == []
