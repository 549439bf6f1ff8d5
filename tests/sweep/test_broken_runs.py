"""Runs that die late, guards that are stuck, and arguments that do not fit."""

import pickle

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import stablegrad as sg


def root_loss(params, batch):
    """Mean root, nan once a parameter is negative."""
    return jnp.mean(jnp.sqrt(params)) + 0 * jnp.sum(batch)


def squares(params, batch):
    return jnp.mean((batch @ params - 1.0) ** 2)


def draw(key):
    return jax.random.normal(key, (8, 2))


def compare(loss=squares, candidates=("sgd",), rates=(0.1,), **settings):
    settings = {"params": jnp.ones(2), "data": draw, "steps": 10} | settings
    params, data = settings.pop("params"), settings.pop("data")
    return sg.sweep.compare(
        loss, params, data, list(candidates), rates, show_progress=False, **settings
    )


@pytest.mark.slow
@pytest.mark.parametrize("evaluations", [1, 2])
def test_parameters_that_become_nan_after_the_last_evaluation_break_a_run(evaluations):
    rates = (0.01, 0.03)
    found = compare(root_loss, rates=rates, steps=100, evaluations=evaluations)
    (row,) = found.rows
    assert np.isnan(row.train[1, 0, -1]) and np.isfinite(row.train[0]).all()
    assert row.scores.broken.tolist() == [0, 1] and row.scores.best_rate == 0.01
    assert row.scores.loss[1] == 1.0  # The loss before training.


@pytest.mark.slow
@pytest.mark.parametrize("validation", [None, np.ones((4, 2), np.float32)])
def test_a_guard_that_skips_to_the_end_breaks_a_run(validation):
    found = compare(
        root_loss,
        ["sgd + skip_bad_steps", "sgd"],
        (0.03,),
        steps=120,
        validation=validation,
    )
    assert not found.failed
    for row in found.rows:
        assert row.loss.mean == 1.0 and row.scores.broken == 1
        assert (row.diverged > 0).all()


@pytest.mark.slow
def test_a_loss_as_good_as_a_negative_trivial_loss_is_flagged():
    shifted = lambda params, batch: squares(params, batch) - 2.0
    data = lambda key: draw(key) + 1
    settings = {"params": jnp.zeros(2), "data": data, "trivial_loss": -1.0}
    found = compare(shifted, rates=(1e-9, 0.1), steps=50, **settings)
    assert found.rows[0].trivial.tolist() == [True, False]


@pytest.mark.slow
def test_data_on_several_devices_are_compared():
    mesh = jax.make_mesh((2,), ("d",), devices=jax.devices()[:2])
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
    rows = draw(jax.random.key(0))
    own = compare(data=rows, batch_size=4)
    for place in (spread, jax.devices()[1]):
        found = compare(data=jax.device_put(rows, place), batch_size=4)
        np.testing.assert_array_equal(found.rows[0].train, own.rows[0].train)


@pytest.mark.slow
def test_an_infinite_loss_under_debug_infs_breaks_a_run_alone():
    with jax.debug_infs(True):
        found = compare(rates=(0.1, 1e30), steps=20)
    assert not found.failed and found.rows[0].scores.broken.tolist() == [0, 1]


@pytest.mark.slow
def test_a_result_is_equal_to_itself_alone_and_saves_errors(tmp_path):
    found = compare(seeds=2)
    assert found == found and found != pickle.loads(pickle.dumps(found))
    found.save("/dev/null")
    found.save(tmp_path / "result.json")
    assert '"validated": false' in (tmp_path / "result.json").read_text()
    assert {"accuracy_error", "sensitivity_error"} <= found.records()[0].keys()


@pytest.mark.slow
def test_rows_are_shuffled_once_an_epoch(monkeypatch):
    calls = []
    make = np.random.default_rng
    monkeypatch.setattr(
        np.random, "default_rng", lambda seed: calls.append(seed) or make(seed)
    )
    compare(data=np.ones((40, 2), np.float32), batch_size=4, rates=(0.1, 0.2, 0.3))
    assert sorted(set(calls)) == sorted(calls)


def test_a_loss_with_auxiliary_output_is_an_error_at_once():
    with pytest.raises(TypeError, match="`loss_fn` must return the loss alone"):
        compare(lambda params, batch: (squares(params, batch), batch))


def test_an_error_of_the_users_function_is_raised():
    def broken(key):
        raise RuntimeError("no parameters")

    with pytest.raises(RuntimeError, match="no parameters"):
        compare(params=broken)


@pytest.mark.parametrize(
    "params",
    [{"w": jnp.ones(2), "count": jnp.zeros(1, int)}, {"w": jnp.ones(2), "scale": 0.1}],
)
def test_parameters_that_would_not_be_trained_by_others_are_an_error(params):
    with pytest.raises(TypeError, match=r"eqx.partition\(model, eqx.is_inexact_array"):
        compare(lambda params, batch: squares(params["w"], batch), params=params)


def test_a_float_of_an_equinox_module_is_an_error():
    class Scaled(eqx.Module):
        w: jax.Array
        scale: float

    model = Scaled(jnp.ones(2), 0.1)
    with pytest.raises(TypeError, match="eqx.partition"):
        compare(lambda m, batch: squares(m.scale * m.w, batch), params=model)


def test_a_flax_module_in_a_dict_is_told_how_to_be_split():
    params = {"net": nnx.Linear(2, 2, rngs=nnx.Rngs(0))}
    with pytest.raises(TypeError, match="got a Flax NNX module"):
        compare(params=params)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"rates": None}, "`learning_rates`"),
        ({"rates": "0.1"}, "`learning_rates`"),
        ({"rates": (1e-50,)}, "`learning_rates`"),
        ({"rates": (1e39,)}, "`learning_rates`"),
        ({"seeds": [0.5, 1.7]}, "`seeds`"),
        ({"seeds": "12"}, "`seeds`"),
        ({"seeds": True}, "`seeds`"),
        ({"seeds": []}, "`seeds`"),
        ({"evaluate": squares}, "`evaluate` needs `validation="),
    ],
)
def test_arguments_out_of_range_are_named(settings, named):
    with pytest.raises(ValueError, match=named):
        compare(**settings)


@pytest.mark.parametrize("extra", [("valuefn",), "value"])
def test_an_unknown_extra_argument_of_a_candidate_is_named(extra):
    with pytest.raises(ValueError, match="`extra` must be a tuple of some of"):
        sg.sweep.Candidate("one", lambda rate, steps: optax.sgd(rate), extra=extra)


@pytest.mark.slow
def test_rates_may_be_a_set_or_a_generator():
    found = compare(rates={0.1, 0.2})
    again = compare(rates=(rate for rate in (0.2, 0.1)))
    assert found.rows[0].rates == again.rows[0].rates == (0.1, 0.2)
