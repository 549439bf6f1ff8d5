"""The benchmark on learning-rate sensitivity: its scores, and a run in small."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import stablegrad as sg
from stablegrad.sweep import _scores as scores

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "lr_sensitivity.py"
METHODS = ("optimizer alone", "Polyak step")
SMALL = ["--quick", "--tasks", "B-adam", "--steps", "2", "--rounds", "0"]
LOSSES, INITIAL = np.array([3.2, 3, 2.9, 3, 4, 12, np.nan]), 10.0
RATES = np.array([3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1])


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("lr_sensitivity", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def part(name):
    return sys.modules[f"_lr_sensitivity.{name}"]


def run(script, out, *more):
    with jax.numpy_rank_promotion("allow"):  # As users run it.
        chosen = ["--out", str(out), "--only", *METHODS]
        assert script.main([*SMALL, *chosen, *more]) == 0
    return (out / "lr_sensitivity.md").read_text()


@pytest.fixture(scope="module")
def out(script, tmp_path_factory):
    """The folder of a run that is complete."""
    folder = tmp_path_factory.mktemp("lr_sensitivity")
    run(script, folder)
    return folder


def curve(loss, accuracy=np.nan, dead=0.0, initial=INITIAL):
    arrays = np.broadcast_arrays(initial, loss, accuracy, dead)
    return part("running").Curve(*arrays)


def score(*curves, trivial=9.0):
    return scores.score(RATES, trivial, curves)


def cells(text, method):
    """The row of a method, by column."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    split = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    header = next(line for line in split if line[0] == "method")
    row = next(line for line in split if line[0] == method)
    return dict(zip(header, row, strict=True))


def test_good_rates_are_those_near_the_best_that_do_not_break(script):
    seen = score(curve(np.array([3.2, 3, 2.9, 2.95, 3.18, 3.2, np.nan])))
    expected = [False, True, True, True, True, False, False]
    np.testing.assert_array_equal(part("goals").good(seen), expected)


def test_a_goal_is_met_or_missed(script):
    rows, goals = part("rows"), part("goals")
    made = {"bare": curve(LOSSES), "clip": curve(LOSSES), "ours": curve(LOSSES / 1.1)}

    def told(mine, task="A"):
        listed = [
            rows.Row(
                kind, kind, score(mine if kind == "ours" else made[kind]), None, seeds=1
            )
            for kind in made
        ]
        table = {task: rows.Table(task, RATES, 9.0, INITIAL, listed, {})}
        chosen = [goal for goal in goals.goals() if goal.task == task]
        return [goal.cell(table, "ours") for goal in chosen]

    # LR sensitivity, loss over bare's, largest rates, step time.
    assert told(curve(np.full(7, 2.95))) == [
        "0.05 met",  # From bare's best.
        "1.017 MISSED",
        "1.017 met",
        "-",
    ]
    assert told(curve(LOSSES + 0.1))[1:3] == ["1.034 MISSED", "3.448 MISSED"]
    # LR sensitivity, loss minus bare's.
    assert told(curve(np.full(7, 2.9015)), "B-adam") == ["0.0015 met", "0.0015 met"]


def test_report_has_a_row_for_each_method(out):
    text = (out / "lr_sensitivity.md").read_text()
    for method in METHODS:
        row = cells(text, method)
        assert {"0.0001", "1", "best loss", "flags"} <= set(row)
        assert "±" not in row["LR sensitivity"]  # One seed.
        assert row["0.0001"].endswith(")")  # Test accuracy.
    assert (out / "lr_sensitivity.png").stat().st_size > 10_000


def test_a_run_is_taken_up_where_it_was_left(script, out, monkeypatch):
    before = (out / "lr_sensitivity.md").read_text()
    (kept,) = out.glob("results/*/Polyak-step/seed-0.json")
    done = []

    def measured(run, task, seed):
        done.append(seed)
        return curve(np.full(9, 1.25), 0.5, initial=2.0)

    monkeypatch.setattr(script.running, "measured", measured)
    assert run(script, out) == before and not done
    stale = json.loads(kept.read_text()) | {"digest": "of another task"}
    kept.write_text(json.dumps(stale))
    after = run(script, out)
    assert done == [0]
    assert cells(after, "optimizer alone") == cells(before, "optimizer alone")
    assert cells(after, "Polyak step")["1"] == "1.250 (50.0)"


def toy(steps=1, slope=1.0):
    """A quadratic, at two rates."""

    def loss(params, batch):
        return slope * jnp.sum((params - batch) ** 2)

    return part("tasks").Task(
        name="toy",
        rates=np.array([0.01, 0.1]),
        steps=steps,
        batch_size=1,
        init=lambda key: jnp.ones(2),
        batch=lambda key: jnp.zeros(()),
        loss=loss,
        final_loss=lambda params: loss(params, 0.0),
        accuracy=None,
        dead=lambda params: jnp.zeros(()),
        trivial_loss=1.0,
        optimizer=optax.sgd,
    )


def test_a_digest_tells_tasks_and_methods_apart(script):
    def digest(task, build=None):
        running = part("running")
        return running.digest(running.program(task, build or task.optimizer), task)

    same, again = digest(toy()), digest(toy())
    assert same == again
    others = [
        digest(toy(steps=2)),
        digest(toy(slope=2.0)),
        digest(toy()._replace(rates=np.array([0.01, 0.2]))),
        digest(toy(), lambda rate: optax.sgd(rate, momentum=0.9)),
    ]
    assert len({same, *others}) == 5


def test_rates_are_trained_side_by_side(script):
    seen = part("running").curve(toy(steps=3), optax.sgd, seed=0)
    np.testing.assert_allclose(seen.initial_loss, 2.0)
    np.testing.assert_allclose(seen.final_loss, [2 * 0.98**6, 2 * 0.8**6], rtol=1e-5)


def test_one_rate_after_the_other_is_the_same_and_a_tail_is_its_mean_loss(script):
    task = toy(steps=3)._replace(together=False)
    seen = part("running").curve(task, optax.sgd, seed=0)
    np.testing.assert_allclose(seen.final_loss, [2 * 0.98**6, 2 * 0.8**6], rtol=1e-5)
    seen = part("running").curve(task._replace(tail=2), optax.sgd, seed=0)
    expected = [np.mean([2 * x**2, 2 * x**4]) for x in (0.98, 0.8)]  # Before the step.
    np.testing.assert_allclose(seen.final_loss, expected, rtol=1e-5)


SHAPE = {"layers": 1, "width": 8, "heads": 2, "context": 8, "batch": 2}


def language_tasks(folder):
    language = part("language")
    shape = language.Shape(**SHAPE)
    narrow = language.Shape(**SHAPE, dtype=jnp.bfloat16)
    (folder / "text.txt").write_text("To be, or not to be. " * 400)
    return {
        "D": language.small_task(steps=2, shape=shape),
        "E": language.tuning_task(steps=2, shape=shape, first_steps=2),
        "G": language.gpt_task(str(folder), steps=2, shape=narrow),
        "K": language.recurrent_task(steps=2, width=8, context=8),
    }


def test_language_models_learn_and_tuning_starts_from_a_trained_network(
    script, tmp_path
):
    seen = {}
    for name, task in language_tasks(tmp_path).items():
        task = task._replace(rates=np.array([1e-3]))
        with jax.numpy_rank_promotion("allow"):  # As users run it.
            seen[name] = part("running").curve(task, task.optimizer, seed=0)
        assert np.isfinite(seen[name].final_loss).all(), name
        assert 0 <= seen[name].accuracy[0] <= 1
        assert seen[name].initial_loss[0] > task.trivial_loss, name
    # The network of E has been trained, the one of D has not.
    assert seen["E"].initial_loss < seen["D"].initial_loss


def test_tuning_is_judged_on_what_it_learns_and_on_what_it_forgets(script):
    language = part("language")
    shape, texts = language.Shape(**SHAPE), language.manual()
    tuned = language.tuning_task(steps=1, shape=shape, first_steps=1)
    with jax.numpy_rank_promotion("allow"):
        params = tuned.init(jax.random.key(0))
        on = {
            kind: language._transformer_task(
                "D", texts[kind], shape, steps=1, judged=texts[kind].held_out
            )
            for kind in ("language", "library")
        }
        assert tuned.final_loss(params) == on["library"].final_loss(params)
        assert tuned.accuracy(params) == on["language"].accuracy(params)
        assert tuned.accuracy(params) != on["library"].accuracy(params)


def test_the_two_texts_of_tuning_are_parts_of_the_manual(script):
    texts = part("language").manual()
    length = lambda text: len(text.train) + len(text.held_out)
    assert length(texts["library"]) > 50_000
    parts = length(texts["library"]) + length(texts["language"])
    assert parts == length(texts["whole"])


def test_the_large_model_is_not_measured_without_a_gpu_and_a_text(script, tmp_path):
    small = ["--quick", "--rounds", "0", "--only", *METHODS, "--out", str(tmp_path)]
    assert script.main([*small, "--tasks", "G"]) == 0
    text = (tmp_path / "lr_sensitivity.md").read_text()
    assert (
        "Not measured here: G needs a GPU and --data-dir." in text
        and "## G" not in text
    )


def test_steps_are_timed_both_ways(script):
    clock = part("timing").Clock(toy(), rounds=1)
    plain = clock.times(optax.sgd(0.1), ("value",))
    assert plain.apply is None and plain.least == plain.update > 0
    guarded = clock.times(sg.guard(optax.sgd(0.1)), ("value",))
    assert guarded.least == min(guarded.update, guarded.apply) > 0
    assert guarded.bare_ms > 0


def test_a_method_that_fails_is_a_row(script, tmp_path, monkeypatch, capsys):
    def broken(task, rate):
        raise TypeError("no such luck")

    method = script.Method("hopeless", "clip", broken, "none")
    monkeypatch.setattr(script, "methods", lambda: [method])
    status = script.main([*SMALL, "--out", str(tmp_path)])
    assert status == 0
    text = (tmp_path / "lr_sensitivity.md").read_text()
    assert cells(text, "hopeless")["0.0001"] == "failed: TypeError: no such luck"
    assert "B-adam, hopeless: TypeError: no such luck" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--only", "hope"], "argument --only: invalid choice: 'hope'"),
        (["--tasks", "Z"], "argument --tasks: invalid choice: 'Z'"),
        (["--data-dir", "/nowhere"], "/nowhere is not a folder"),
        (["--seeds", "0"], "argument --seeds: must be an integer >= 1, got '0'"),
        (["--steps", "few"], "argument --steps: must be an integer >= 1, got 'few'"),
    ],
)
def test_a_bad_option_is_one_line_and_status_2(script, arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        script.main(arguments)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_it_is_a_script():
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "--quick" in done.stdout
