"""The benchmark of healthy runs: its rule by hand, and that tables come out."""

import importlib.util
import json
import math
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from _no_harm import grid, records, report
from _no_harm.methods import BARE, LOOKING, OURS, PEERS, ROLLING
from _no_harm.paired import gain, judge
from _no_harm.task import EVALUATIONS, Learner, Runs, World
from _no_harm.tasks import QUICK, every_task

import stablegrad as sg

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "no_harm.py"
T3 = 3.182446305284263  # Student's 97.5 % point at three degrees of freedom.
EXACT = 1e-12  # Float64, a handful of operations.


def test_mean_and_interval_are_those_computed_by_hand():
    seen = judge([0.0] * 4, [1.0] * 4, [0.98, 0.97, 0.99, 0.98], higher=True)
    assert seen.loss == pytest.approx(0.02, rel=1e-9)
    deviation = math.sqrt((0.01**2 + 0.01**2) / 3)
    assert seen.half_width == pytest.approx(T3 * deviation / 2, rel=1e-9)
    assert seen.harmed and not seen.helped


def test_differences_are_in_units_of_what_bare_gains():
    seen = judge([3.0, 3.0], [1.0, 1.0], [1.1, 1.1], higher=False)
    assert seen.loss == pytest.approx(0.05) and seen.harmed
    assert seen.half_width == pytest.approx(0.0, abs=EXACT)
    assert gain([3.0, 3.0], [1.0, 1.0], higher=False) == 2.0
    assert gain([0.0, 1.0], [2.0, 1.0], higher=True) == 1.0


@pytest.mark.parametrize(
    "method, harmed",
    [
        ([0.991, 0.9909, 0.9911, 0.991], False),  # Sure, but under one percent.
        ([0.989, 0.9889, 0.9891, 0.989], True),
        ([0.90, 1.02, 1.03, 0.99], False),  # 1.5 percent, but not sure.
        ([1.02, 1.03, 1.02, 1.03], False),  # Better.
    ],
)
def test_harmed_is_worse_by_more_than_one_percent_and_surely(method, harmed):
    assert judge([0.0] * 4, [1.0] * 4, method, higher=True).harmed == harmed


def test_seeds_are_paired():
    bare = np.array([0.6, 0.9, 1.2, 1.3])
    seen = judge(np.zeros(4), bare, bare - 0.02, higher=True)
    assert seen.harmed and seen.half_width == pytest.approx(0.0, abs=EXACT)


def test_helped_is_the_same_rule_with_the_sign_reversed():
    seen = judge([0.0] * 4, [1.0] * 4, [1.02, 1.03, 1.02, 1.03], higher=True)
    assert seen.helped and not seen.harmed


def test_a_run_that_is_not_finite_is_harmed_unless_bare_is_not_either():
    nan = float("nan")
    assert judge([0.0] * 2, [1.0, 1.0], [1.0, nan], higher=True).harmed
    assert not judge([0.0] * 2, [1.0, nan], [1.0, nan], higher=True).harmed


def test_one_seed_harms_nobody():
    seen = judge([0.0], [1.0], [0.5], higher=True)
    assert seen.loss == 0.5 and seen.half_width == math.inf and not seen.harmed


def test_there_are_enough_runs_of_enough_kinds():
    tasks = every_task()
    names = [task.name for task in tasks]
    assert len(set(names)) == len(names) >= 24
    assert len({task.kind for task in tasks}) >= 14
    assert len(QUICK) == 8 and set(QUICK) <= set(names)
    assert all(task.steps % EVALUATIONS == 0 for task in tasks)


def test_counters_are_read_as_steps_and_stages():
    counter = np.array([[0, 1, 1, 3] * 1, [1, 1, 1, 1]])
    assert records.steps_where(counter) == [[1, 3], [0]]
    long = np.repeat(np.arange(1, EVALUATIONS + 1), 2)[None]
    assert records.by_stage(long) == [1.0] * EVALUATIONS


@pytest.mark.slow
def test_a_policy_is_worth_what_its_walk_is(monkeypatch):
    monkeypatch.setattr(grid, "SLIP", 0.0)
    right_then_down = np.where(np.arange(25) % 5 < 4, 2, 0)
    with jax.numpy_rank_promotion("allow"):
        found = grid.worth(jax.nn.one_hot(right_then_down, 4))
    steps = [8 - cell // 5 - cell % 5 for cell in range(24)]
    expected = np.mean([0.95 ** (n - 1) for n in steps])
    assert float(found) == pytest.approx(expected, rel=1e-5)


def cell(loss, harmed):
    return {
        "mean": 1 - loss, "std": 0.1, "loss": loss, "half_width": 0.01,
        "harmed": harmed, "helped": False, "touched": 0.005, "skipped": 0.0,
        "cuts": 0.0, "lowest_lr_scale": 1.0, "last_lr_scale": 1.0,
    }  # fmt: skip


def test_the_report_counts_harmed_runs_and_marks_sick_ones():
    record = {
        "task": "some-run", "kind": "a kind", "metric": "accuracy", "higher": True,
        "start": 0.0, "healthy": False,
        "methods": {BARE: cell(0.0, False), OURS: cell(0.05, True)},
    }  # fmt: skip
    text = report.whole([record, {**record, "healthy": True}], "about")
    assert "stabilize 2 of 2" in text and "+5.0 ± 1.0 | HARMED | 0.5 %" in text
    assert text.count("NOT HEALTHY") == 1


def test_a_file_keeps_the_last_record_of_each_task(tmp_path):
    path = tmp_path / "new" / "runs.jsonl"
    some = dict.fromkeys(records.FIELDS, 0.0)
    for seeds in (1, 2):
        records.append({**some, "task": "a", "seeds": seeds, "on": "cpu"}, path)
    records.append({**some, "task": "b", "seeds": 3}, path)
    found = records.stored(path)
    assert [r["seeds"] for r in found] == [2, 3]
    assert records.about(found) == "2 or 3 seeds, on an unnamed machine and cpu"


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "it holds no records"),
        (b'{"task": "a"}', "line 1 is no record: it lacks gain"),
        (b"[1, 2]", "line 1 is no record: it lacks an object of JSON"),
        (b'{"task": ', "line 1 is no record: it lacks an object of JSON"),
        (b"\xff\xfe", "utf-8"),
        (None, "No such file"),
    ],
)
def test_a_foreign_file_of_records_is_one_line_and_status_2(
    no_harm, tmp_path, content, message, capsys
):
    path = tmp_path / "runs.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit) as stopped:
        no_harm.main(["--read", str(path), "--out", str(tmp_path)])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and str(path) in line


@pytest.mark.slow
def test_an_interrupted_run_reports_what_is_done(no_harm, tmp_path, monkeypatch):
    done, measured = [], no_harm.measured

    def once(*arguments):
        if done:
            raise KeyboardInterrupt
        done.append(None)
        return measured(*arguments)

    monkeypatch.setattr(no_harm, "measured", once)
    few = ["--tasks", "digits,digits-whole", "--seeds", "2", "--steps", "20"]
    with jax.numpy_rank_promotion("allow"):
        assert no_harm.main([*few, "--out", str(tmp_path)]) == 130
    text = (tmp_path / "no_harm.md").read_text()
    assert "interrupted after 1 of 2 runs" in text and "| digits " in text


@pytest.fixture(scope="module")
def no_harm():
    spec = importlib.util.spec_from_file_location("no_harm", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--tasks", "digits,hope"], "argument --tasks: must be among digits, "),
        (["--seeds", "1"], "must be an integer >= 2, got '1'"),
    ],
)
def test_a_bad_option_is_one_line_and_status_2(no_harm, arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        no_harm.main(arguments)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.slow
def test_tables_come_out(no_harm, tmp_path, capsys):
    kept = tmp_path / "runs.jsonl"
    command = ["--tasks", "digits-batch-2", "--seeds", "2"]
    command += ["--steps", "40", "--full", "--value-fn", "--roll-back"]
    command += ["--jsonl", str(kept), "--out", str(tmp_path)]
    with jax.numpy_rank_promotion("allow"):  # As users run it.
        assert no_harm.main(command) == 0
    printed = capsys.readouterr().out
    assert (tmp_path / "no_harm.md").read_text() in printed
    (digits,) = map(json.loads, kept.read_text().splitlines())
    assert set(digits["methods"]) == {BARE, OURS, LOOKING, ROLLING, *PEERS}
    assert digits["methods"]["AutoClip"]["touched"] > 0.5
    assert digits["methods"][BARE]["touched"] == 0
    assert no_harm.main(["--read", str(kept), "--out", str(tmp_path)]) == 0
    assert "| digits-batch-2" in capsys.readouterr().out


@pytest.mark.slow
def test_methods_see_the_same_data_weights_and_batches():
    (task,) = (task for task in every_task() if task.name == "digits-batch-2")
    with jax.numpy_rank_promotion("allow"):
        runs = Runs(task, range(2), steps=40)
        first, second = (runs.run(w) for w in (lambda i: i, optax.chain))
    np.testing.assert_array_equal(first.results, second.results)
    assert first.results[0] != first.results[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", [task.name for task in every_task()])
def test_every_run_takes_guarded_steps(name):
    (task,) = (task for task in every_task() if task.name == name)
    txs = task.optimizers(sg.stabilize)

    def one_step(key):
        start = task.begin(key)
        states = {who: txs[who].init(params) for who, params in start.params.items()}
        world = World(start.params, states, start.memory)
        after = task.step(world, start.data, key, 0, Learner(txs, task.looks))
        return world, after, task.score(after, start.data)

    with jax.numpy_rank_promotion("allow"):
        before, after, score = jax.eval_shape(one_step, jax.random.key(0))
    assert before.params == after.params and before.states == after.states
    assert set(txs) == set(before.params) and score.shape == ()
