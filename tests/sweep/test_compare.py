"""Tests for `stablegrad.sweep.compare`: runs, ranks, and survives its candidates."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.marking import core

import stablegrad as sg
from stablegrad.sweep import _compiled

CURVATURE = np.array([1.0, 4.0])
START = np.array([3.0, -1.0])
RATES = (0.01, 0.1, 0.6)  # Stable below 2 / 4.
STEPS = 40
ROWS = jnp.asarray(CURVATURE, jnp.float32)[None] * jnp.ones((8, 1))


def loss_fn(params, batch):
    return 0.5 * jnp.mean(batch @ params**2)


def compare(candidates, **options):
    options = {
        "learning_rates": RATES,
        "steps": STEPS,
        "evaluations": 4,
        "show_progress": False,
        **options,
    }
    if not callable(options.get("data", ROWS)):
        options.setdefault("batch_size", 8)
    data = options.pop("data", ROWS)
    start = options.pop("params", jnp.asarray(START, jnp.float32))
    loss = options.pop("loss_fn", loss_fn)
    return sg.sweep.compare(loss, start, data, candidates, **options)


def descent(rate, momentum=0.0, steps=STEPS):
    """Losses before every step, and at the end, in float64."""
    point, speed, losses = START.copy(), np.zeros(2), []
    for _ in range(steps + 1):
        losses.append(0.5 * np.sum(CURVATURE * point**2))
        speed = momentum * speed + CURVATURE * point
        point = point - rate * speed
    return np.array(losses)


@pytest.fixture(scope="module")
def result():
    return compare(["sgd", "momentum"], validation=ROWS, trivial_loss=6.5)


def test_every_run_is_gradient_descent_to_the_digit(result):
    for name, momentum in (("sgd", 0.0), ("momentum", 0.9)):
        row = result.row(name)
        assert row.train.shape == (3, 1, STEPS)
        for i, rate in enumerate(RATES):
            expected = descent(rate, momentum)
            np.testing.assert_allclose(row.train[i, 0], expected[:-1], rtol=2e-4)
            at = expected[row.steps]
            np.testing.assert_allclose(row.validation[i, 0], at, rtol=2e-4)
        np.testing.assert_array_equal(row.steps, [0, 10, 20, 30, 40])


def test_rows_are_ranked_and_scored_over_the_rates(result):
    finals = {
        name: np.array([descent(rate, momentum)[-1] for rate in RATES])
        for name, momentum in (("sgd", 0.0), ("momentum", 0.9))
    }
    assert [row.name for row in result.rows] == sorted(
        finals, key=lambda name: finals[name].min()
    )
    for name, final in finals.items():
        row, capped = result.row(name), np.minimum(final, descent(0.1)[0])
        np.testing.assert_allclose(row.loss.mean, final.min(), rtol=2e-4)
        assert row.scores.best_rate == RATES[final.argmin()]
        mean = np.mean(capped - capped.min())
        np.testing.assert_allclose(row.scores.sensitivity.mean, mean, rtol=1e-3)
    sgd = result.row("sgd")
    assert sgd.diverged[2, 0] > 0 and (sgd.diverged[:2] == -1).all()
    np.testing.assert_array_equal(sgd.trivial, [False, False, True])


def test_the_table_has_a_line_for_each_and_says_what_its_columns_mean(result):
    lines = str(result).splitlines()
    assert lines[0].split()[:4] == ["candidate", "rate", "loss", "sensitivity"]
    assert lines[2].split()[:2] == [result.rows[0].name, "0.1"]
    assert "accuracy" not in lines[0] and "skipped" not in lines[0]
    assert any("1/3 @" in line for line in lines)
    assert "40 steps a run, 1 seed." in lines
    assert max(map(len, lines)) < 120


@pytest.mark.slow
def test_it_is_drawn_and_saved_with_all_curves(result, tmp_path):
    figure = result.figure()
    curves, rates = figure.axes
    (legend,) = figure.legends
    assert len(legend.get_texts()) == 2 and "not drawn" not in str(legend.get_title())
    (shorter,) = result.figure(most=1).legends
    assert "not drawn, as they end higher: 1" in shorter.get_title().get_text()
    assert rates.get_xscale() == "log" and curves.get_ylabel() == "validation loss"
    figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert len(result.figure(most=1).axes[0].lines) == 1
    result.save(tmp_path / "result.json")
    saved = json.loads((tmp_path / "result.json").read_text())
    first = saved["rows"][0]
    assert first["candidate"] == result.rows[0].name and first["cliff"] is not None
    assert np.shape(first["train"]) == (3, 1, STEPS)
    with pytest.raises(ValueError, match="`most` must be an integer >= 1"):
        result.figure(most=0)
    with pytest.raises(KeyError, match="there are"):
        result.row("adam")


def noisy(key):
    return ROWS[:4] + 0.1 * jax.random.normal(key, (4, 2))


def scattered(key):
    return jax.random.normal(key, (2,))


@pytest.mark.slow
@pytest.mark.parametrize("share", [None, 0.0])
def test_runs_in_groups_are_the_same_as_all_at_once(share, monkeypatch):
    options = {"data": noisy, "params": scattered, "seeds": 3, "steps": 7}
    whole = compare("adam", **options).rows[0]
    assert whole.at_once == 9
    if share is None:
        some = compare("adam", **options, at_once=4).rows[0]  # 4, 4 and 1.
        assert some.at_once == 4
    else:
        monkeypatch.setattr(_compiled, "SHARE", share)
        some = compare("adam", **options).rows[0]
        assert some.at_once == 1
    np.testing.assert_allclose(some.train, whole.train, rtol=1e-5)
    np.testing.assert_allclose(some.validation, whole.validation, rtol=1e-5)
    assert len(np.unique(whole.train[0, :, 0])) == 3  # Seeds differ.


@pytest.mark.slow
@pytest.mark.parametrize(
    "data",
    [
        pytest.param(noisy, marks=pytest.mark.slow),
        jnp.arange(24.0).reshape(12, 2) / 20,
    ],
)
def test_a_run_is_the_same_however_often_it_is_evaluated(data):
    options = {"data": data, "steps": 7, "learning_rates": [0.01]}
    if not callable(data):
        options["batch_size"] = 4
    once, often = (compare("sgd", **options, evaluations=n).rows[0] for n in (1, 4))
    np.testing.assert_allclose(often.train, once.train, rtol=1e-5)
    # And every step sees another batch: no step repeats the losses of the first ones.
    assert len(np.unique(once.train.round(6))) == 7


@pytest.mark.slow
def test_convolutions_on_a_cpu_are_stepped_outside_of_a_loop_with_the_same_results(
    monkeypatch,
):
    images = jax.random.normal(jax.random.key(0), (16, 4, 4, 1))

    def loss(kernel, batch):
        found = jax.lax.conv(jnp.moveaxis(batch, -1, 1), kernel, (1, 1), "SAME")
        return jnp.mean((found - 1.0) ** 2)

    options = {
        "loss_fn": loss,
        "params": lambda key: jax.random.normal(key, (2, 1, 3, 3)),
        "data": images,
        "validation": images,
        "steps": 6,
        "learning_rates": (0.01, 0.1),
    }
    alone = compare("momentum", **options).rows[0]
    together = compare("momentum", **options, at_once=2).rows[0]
    monkeypatch.setattr(_compiled, "_slow_in_loop", lambda *given: False)
    looped = compare("momentum", **options).rows[0]
    assert (alone.at_once, together.at_once, looped.at_once) == (1, 2, 2)
    for other in (together, looped):
        np.testing.assert_allclose(other.train, alone.train, rtol=1e-5)
        np.testing.assert_allclose(other.validation, alone.validation, rtol=1e-5)


@pytest.mark.slow
def test_candidates_and_rates_see_the_same_batches_and_weights():
    rows = compare(["sgd", "momentum"], data=noisy, params=scattered, seeds=[4, 7]).rows
    first = np.stack([row.train[..., 0] for row in rows])
    assert first.shape == (2, 3, 2)
    np.testing.assert_allclose(first - first[:1, :1], 0.0, atol=1e-6)
    (alone,) = compare("sgd", data=noisy, params=scattered, seeds=[7]).rows
    among = next(row for row in rows if row.name == "sgd")
    np.testing.assert_allclose(alone.train[:, 0], among.train[:, 1], rtol=1e-5)


def test_every_example_comes_once_an_epoch_in_an_order_of_the_seeds_own():
    draws = sg.sweep._experiment.sampler(jnp.arange(10), batch_size=3)
    drawn = np.asarray(draws(0, 0, 6))
    assert drawn.shape == (6, 3)
    for epoch in (drawn[:3], drawn[3:]):
        assert len(np.unique(epoch)) == 9
    assert (drawn[:3] != drawn[3:]).any() and (
        drawn != np.asarray(draws(1, 0, 6))
    ).any()
    # In chunks as in one go.
    np.testing.assert_array_equal(np.asarray(draws(0, 2, 3)), drawn[2:5])


@pytest.mark.slow
def test_a_training_step_of_ones_own_is_the_same_run(result):
    def step(tx, params, opt_state, batch):
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    made = compare("momentum", loss_fn=step, validation=ROWS, evaluate=loss_fn).rows[0]
    np.testing.assert_allclose(made.train, result.row("momentum").train, rtol=1e-6)


@pytest.mark.slow
def test_a_candidate_that_fails_is_told_and_the_others_run():
    def broken(rate):
        raise RuntimeError("no such thing\nas this")

    def wrong_update(updates, state, params=None):
        return {"other": updates}, state

    candidates = {
        "broken": broken,
        "wrong": optax.GradientTransformation(lambda params: (), wrong_update),
        "sgd": "sgd",
    }
    seen = compare(candidates)
    assert [row.name for row in seen.rows] == ["sgd"]
    assert seen.failed["broken"] == "RuntimeError: no such thing as this"
    assert "wrong" in seen.failed and not seen.interrupted
    assert "broken: RuntimeError: no such thing" in str(seen)


@pytest.mark.slow
def test_a_transformation_that_reads_its_rate_in_python_runs_rate_by_rate(result):
    def picky(rate):
        return optax.sgd(float(rate), momentum=0.9)

    row = compare({"picky": picky}, validation=ROWS).rows[0]
    np.testing.assert_allclose(row.train, result.row("momentum").train, rtol=1e-5)


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_done():
    def stop(rate):
        raise KeyboardInterrupt

    seen = compare({"sgd": "sgd", "stop": stop, "adam": "adam"})
    assert [row.name for row in seen.rows] == ["sgd"]
    assert seen.interrupted and "stop" in seen.failed and "adam" not in seen.failed
    assert "interrupted" in str(seen)


def test_a_transformation_runs_at_its_own_rate():
    row = compare({"mine": optax.sgd(0.1)}).rows[0]
    assert np.isnan(row.rates).all() and row.train.shape == (1, 1, STEPS)
    np.testing.assert_allclose(row.train[0, 0], descent(0.1)[:-1], rtol=2e-4)
    assert np.isfinite(row.loss.mean)


@pytest.mark.slow
def test_a_run_is_ended_after_evaluations_without_a_better_loss():
    rising = lambda params, batch: {"loss": jnp.sum(params**2), "accuracy": 0.5}
    climb = lambda params, batch: -loss_fn(params, batch)
    options = {"loss_fn": climb, "validation": ROWS, "evaluate": rising}
    row = compare("sgd", **options, patience=2).rows[0]
    assert row.rounds == 0 and row.accuracy.mean == 0.5
    np.testing.assert_allclose(row.loss.mean, np.sum(START**2), rtol=1e-6)
    assert (
        np.isfinite(row.train[..., :20]).all() and np.isnan(row.train[..., 20:]).all()
    )
    whole = compare("sgd", **options).rows[0]
    assert whole.rounds == STEPS and np.isfinite(whole.train[0]).all()


@pytest.mark.slow
def test_a_run_that_breaks_counts_as_no_better_than_before_training():
    row = compare("sgd", learning_rates=(0.1, 1e20), validation=ROWS).rows[0]
    assert row.diverged.tolist() == [[-1], [1]]
    np.testing.assert_allclose(row.scores.loss[1], descent(0.1)[0], rtol=1e-6)
    assert row.scores.broken.tolist() == [0, 1]


@pytest.mark.slow
def test_guards_tell_what_they_skipped_and_the_plateau_sees_the_validation_loss():
    def data(key):
        bad = jax.random.uniform(key) < 0.2
        return jnp.where(bad, jnp.nan, ROWS)

    candidates = ["sgd + stabilize", "sgd + apply_if_finite", "sgd"]
    seen = compare(candidates, data=data, validation=ROWS, learning_rates=[0.1])
    ours, theirs = seen.row(candidates[0]), seen.row(candidates[1])
    assert ours.skipped == theirs.skipped > 2
    bare = seen.row("sgd")
    assert ours.loss.mean < 0.1 * bare.loss.mean
    assert (ours.diverged == -1).all() and (bare.diverged > 0).all()
    assert seen.rows[-1].name == "sgd" and "skipped" in str(seen)
    assert "1 of 1 seeds broken" in str(seen)
    # And without a validation set, from the losses that are finite.
    (row,) = compare(candidates[:1], data=data, learning_rates=[0.1]).rows
    assert row.rounds == STEPS and row.loss.mean < 0.1 * bare.loss.mean
    flat = lambda params, batch: jnp.float32(1.0)
    row = compare(
        "sgd + plateau",
        validation=ROWS,
        evaluate=flat,
        evaluations=20,
        learning_rates=[0.01],
    ).rows[0]
    moved = np.diff(np.log(row.train[0, 0]))
    # The first counts as better; of the next, each fourth halves the rate.
    assert moved[-1] > moved[0] / 8 and moved[-1] < 0


@pytest.mark.slow
def test_one_rate_and_a_number_of_seeds_may_be_numpys():
    seen = compare("sgd", learning_rates=np.float64(0.1), seeds=np.int64(2))
    assert seen.row("sgd").rates == (0.1,) and seen.seeds == (0, 1)
    seen = compare("sgd", learning_rates=0.1, seeds=(seed for seed in (2, 5)))
    assert seen.seeds == (2, 5)


@pytest.mark.slow
def test_one_broken_seed_counts_with_its_loss_before_training():
    def start(key):  # Of one seed, so far out that its loss overflows later on.
        first = jax.random.key_data(key)[1] == 1
        return jnp.where(first, 1e18, 1.0) * jnp.asarray(START, jnp.float32)

    options = {"params": start, "seeds": 2, "validation": ROWS}
    seen = compare("sgd", learning_rates=[0.6], **options)
    row = seen.rows[0]
    assert row.scores.broken.tolist() == [1]
    before = descent(0.1)[0]
    np.testing.assert_allclose(row.loss.mean, (1e36 + 1) / 2 * before, rtol=1e-4)
    assert "1 of 2 seeds broken" in str(seen)


@pytest.mark.slow
def test_runs_do_not_depend_on_their_place_whatever_the_generator():
    with jax.default_prng_impl("rbg"):
        row = compare("sgd", data=noisy, params=scattered, seeds=2, steps=2).rows[0]
    np.testing.assert_allclose(row.train[0, :, 0], row.train[2, :, 0], rtol=1e-6)


@pytest.mark.slow
def test_lookahead_is_judged_by_its_slow_weights():
    options = {"learning_rates": [0.1], "validation": ROWS, "steps": 3}
    row = compare("lookahead", evaluations=3, **options).rows[0]
    np.testing.assert_allclose(row.validation[0, 0], descent(0.1)[0], rtol=1e-6)


@pytest.mark.slow
def test_a_candidate_may_ask_for_more_and_a_step_must_pass_it_on():
    tx = lambda rate, steps: sg.guard(optax.sgd(rate), sg.trust_region())
    held = sg.sweep.Candidate("held", tx, extra=("value", "value_fn"))
    rates = {"learning_rates": [50.0]}
    first, second = compare([held, "sgd"], **rates).rows
    assert first.name == "held" and first.loss.mean < 0.1 < second.loss.mean

    def step(tx, params, opt_state, batch):
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params, value=loss)
        return optax.apply_updates(params, updates), opt_state, loss

    seen = compare(["sgd + stabilize_trust_region"], loss_fn=step, **rates)
    assert "must pass `value_fn=`" in seen.failed["sgd + stabilize_trust_region"]


@pytest.mark.slow
def test_schedule_free_is_judged_by_its_averaged_weights():
    row = compare("schedule_free", learning_rates=[0.3], validation=ROWS).rows[0]
    tx = optax.contrib.schedule_free_adamw(0.3)

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(loss_fn)(params, ROWS), state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, state), _ = jax.lax.scan(step, (params, tx.init(params)), None, STEPS)
        averaged = optax.contrib.schedule_free_eval_params(state, params)
        return loss_fn(averaged, ROWS), loss_fn(params, ROWS)

    averaged, last = train(jnp.asarray(START, jnp.float32))
    np.testing.assert_allclose(row.loss.mean, averaged, rtol=1e-4)
    assert abs(last - averaged) > 1e-3 * averaged


@pytest.mark.slow
@pytest.mark.parametrize("size", core([7, 1000, 2300], 7))
def test_validation_in_slices_is_the_mean_over_all_and_a_dead_unit_fires_nowhere(size):
    rng = np.random.default_rng(0)
    held = jnp.asarray(rng.normal(size=(size, 2)), jnp.float32)
    seen = []

    def evaluate(params, batch):
        seen.append(1)
        return {"loss": jnp.mean(batch @ params), "accuracy": jnp.mean(batch > 0)}

    def hidden(params, batch):
        last = jnp.arange(len(batch)) == len(batch) - 1
        never, once = jnp.zeros(len(batch)), jnp.where(last, 1.0, 0.0)
        return [jax.nn.relu(batch), jnp.stack([never, once], axis=1)]

    options = {"evaluate": evaluate, "hidden": hidden, "steps": 2, "evaluations": 1}
    row = compare("sgd", validation=held, **options).rows[0]
    expected = np.mean(np.asarray(held, np.float64) @ START)
    np.testing.assert_allclose(row.validation[0, 0, 0], expected, rtol=2e-3)
    np.testing.assert_allclose(
        row.accuracy.mean, np.mean(np.asarray(held) > 0), rtol=1e-5
    )
    np.testing.assert_allclose(row.dead, 0.25)
    traces = len(seen)
    assert traces <= 1 + 2 * 2  # The check, and each size of slice.
    if size > 7:
        compare("sgd", validation=held, **{**options, "steps": 20, "evaluations": 10})
        assert len(seen) <= 2 * traces  # However many steps.


def test_labels_have_the_entropy_of_their_shares():
    np.testing.assert_allclose(sg.sweep.label_entropy([0, 0, 1, 1]), np.log(2))
    assert sg.sweep.label_entropy(np.zeros(5, int)) == 0
    with pytest.raises(ValueError, match="`labels` must be integers"):
        sg.sweep.label_entropy([0.5])


@pytest.mark.slow
def test_progress_is_told_with_and_without_rich(capsys, monkeypatch):
    compare(["sgd", "adam"], steps=2, show_progress=True)
    assert capsys.readouterr().out == ""
    real = sg.sweep._progress.importlib.import_module

    def without(name):
        if name.startswith("rich"):
            raise ImportError(name)
        return real(name)

    monkeypatch.setattr(sg.sweep._progress.importlib, "import_module", without)
    compare(["sgd", "adam"], steps=2, show_progress=True)
    assert capsys.readouterr().err.splitlines() == ["sgd (1/2)", "adam (2/2)"]


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"learning_rates": []}, ValueError, "`learning_rates` must be finite rates"),
        ({"learning_rates": [0.1, np.nan]}, ValueError, "`learning_rates`"),
        ({"seeds": 0}, ValueError, "`seeds` must be an integer >= 1"),
        ({"seeds": [1, 1]}, ValueError, "`seeds` must be different integers"),
        ({"steps": 0}, ValueError, "`steps` must be an integer >= 1"),
        ({"patience": 0}, ValueError, "`patience` must be"),
        ({"batch_size": 9}, ValueError, "`batch_size` must be <= 8 examples, got 9"),
        ({"batch_size": None}, ValueError, "`batch_size` must be an integer >= 1"),
        ({"data": noisy, "batch_size": 4}, ValueError, "`batch_size` goes with"),
        ({"data": jnp.ones(())}, ValueError, "`data` must hold arrays"),
        ({"data": (ROWS, ROWS[:3])}, ValueError, "same number of examples"),
        ({"hidden": loss_fn}, ValueError, "`hidden` needs `validation=`"),
        (
            {"validation": ROWS, "evaluate": lambda p, b: {"val_loss": 1.0}},
            ValueError,
            "`evaluate` must return a scalar loss, or a dict of scalars with",
        ),
        (
            {"validation": ROWS, "evaluate": lambda p, b: b},
            ValueError,
            "`evaluate` must return a scalar loss",
        ),
        (
            {"loss_fn": lambda params: 0.0},
            TypeError,
            "must be a loss of .params, batch. or a",
        ),
        (
            {"loss_fn": lambda a, b, c, d: 0.0, "validation": ROWS},
            ValueError,
            "needs `evaluate=`",
        ),
    ],
)
def test_a_bad_argument_is_told_before_anything_runs(options, error, message):
    with pytest.raises(error, match=message):
        compare("sgd", **options)


def test_a_flax_module_is_told_how_to_be_split():
    from flax import nnx

    with pytest.raises(TypeError, match="got a Flax NNX module"):
        compare("sgd", params=nnx.Linear(2, 2, rngs=nnx.Rngs(0)))


@pytest.mark.slow
def test_a_batch_of_nan_that_a_guard_skips_costs_no_run_its_score():
    # Seeds see different batches; a third of them is nan, at the start or the end.
    def data(key):
        bad = jax.random.bernoulli(jax.random.fold_in(key, 1), 0.4)
        return jnp.where(bad, jnp.nan, jax.random.normal(key, (8, 2)) + 1)

    found = sg.sweep.compare(
        lambda params, batch: jnp.mean((batch @ params - 1.0) ** 2),
        jnp.zeros(2),
        data,
        ["sgd + stabilize", "sgd"],
        [1e-2, 1e-1],
        seeds=8,
        steps=20,
        show_progress=False,
    )
    guarded, bare = found.row("sgd + stabilize"), found.row("sgd")
    train = guarded.train[1]
    assert np.isnan(train[:, 0]).any() and np.isnan(train[:, -1]).any()
    assert guarded.scores.best_rate == 0.1 and guarded.loss.mean < 0.6
    assert (guarded.diverged == -1).all() and (guarded.scores.broken == 0).all()
    assert (bare.diverged >= 0).all() and found.rows[0].name == "sgd + stabilize"


@pytest.mark.slow
def test_a_loss_that_is_nan_at_every_rate_has_no_best_rate():
    found = sg.sweep.compare(
        lambda params, batch: jnp.nan * jnp.sum(params),
        jnp.ones(2),
        lambda key: jnp.zeros(1),
        ["sgd"],
        [1e-2, 1e-1],
        steps=5,
        show_progress=False,
    )
    assert np.isnan(found.rows[0].scores.best_rate) and "sgd" in str(found)
    found.figure()


@pytest.mark.slow
def test_arrays_of_one_number_and_debug_nans_do_not_disturb_it():
    with jax.debug_nans(True):
        found = sg.sweep.compare(
            lambda params, batch: jnp.mean((batch @ params - 1.0) ** 2),
            jnp.zeros(2),
            lambda key: jax.random.normal(key, (8, 2)) + 1,
            ["sgd"],
            jnp.float32(0.1),
            seeds=jnp.int32(2),
            steps=np.int64(10),
            show_progress=False,
        )
    assert not found.failed and found.seeds == (0, 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        (dict(params={"w": jnp.zeros(2), "f": jnp.tanh}), TypeError, "eqx.partition"),
        (dict(params=jnp.zeros(2), seeds=[2**40]), ValueError, "different integers in"),
        (dict(params=jnp.zeros(2), trivial_loss=np.nan), ValueError, "`trivial_loss`"),
    ],
)
def test_what_no_candidate_could_run_is_an_error_at_once(changed, error, message):
    arguments = {"params": jnp.zeros(2), "show_progress": False, **changed}
    params = arguments.pop("params")
    data = lambda key: jnp.ones(2)
    with pytest.raises(error, match=message):
        sg.sweep.compare(
            lambda p, x: jnp.sum(p * x), params, data, ["sgd"], 0.1, **arguments
        )
