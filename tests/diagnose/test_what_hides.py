"""Faults that used to hide, healthy losses that used to raise alarms, and crashes."""

import json
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import stablegrad as sg
from stablegrad.diagnose import RULES, Rule, Verdict

pytestmark = pytest.mark.slow

KEYS = jax.random.split(jax.random.key(0), 6)
PARAMS = {
    "first": {"w": jax.random.normal(KEYS[0], (8, 16)) / 3, "b": jnp.zeros(16)},
    "last": {"w": jax.random.normal(KEYS[1], (16, 1)) / 4},
}
X = jax.random.normal(KEYS[2], (64, 8))
Y = jnp.sin(X.sum(axis=1))


@pytest.fixture(autouse=True)
def as_users_run_it():
    with jax.numpy_rank_promotion("allow"):
        yield


def network(params, x, activation=jnp.tanh):
    hidden = activation(x @ params["first"]["w"] + params["first"]["b"])
    return (hidden @ params["last"]["w"])[:, 0]


def loss_fn(params, batch):
    return jnp.mean((network(params, batch[0]) - batch[1]) ** 2)


def rules_of(report):
    return [verdict.rule for verdict in report.causes]


def test_a_layer_of_more_rows_than_their_pairs_fit_into_32_bits_is_measured():
    x = jax.random.normal(KEYS[3], (46_400, 2))
    report = sg.diagnose(lambda p, x: jnp.mean((x @ p) ** 2), jnp.ones((2, 2)), x)
    assert -0.1 < report.layers[0].alike < 0.1


def test_a_nan_gradient_of_a_term_on_a_parameter_alone_is_found():
    def regularised(params, batch):
        return loss_fn(params, batch) + 1e-3 * jnp.linalg.norm(params["first"]["b"])

    tx = optax.adam(1e-3)
    report = sg.diagnose(regularised, PARAMS, (X, Y), tx, steps=3)
    (cause,) = report.causes
    assert (cause.rule, cause.layer) == ("nonfinite_gradients", "first.b")
    assert np.isfinite(report.facts.training.untrained).all()
    assert "3 steps: loss 1." in str(report) and "to nan." in str(report)


def test_a_print_in_a_loss_changes_nothing(capfd):
    def printing(params, batch):
        jax.debug.print("{}", batch[0].sum() + params["first"]["w"].sum())
        pre = batch[0] @ params["first"]["w"] + params["first"]["b"]
        jax.debug.print("{}", pre[0, 0])
        return jnp.mean(((jnp.tanh(pre) @ params["last"]["w"])[:, 0] - batch[1]) ** 2)

    own = [x.activation for x in sg.diagnose(printing, PARAMS, (X, Y)).layers]
    assert own == ["tanh", ""]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", ["relu", "gelu", "silu", "sigmoid"])
def test_activations_in_16_bits_have_their_names(name, dtype):
    activation = getattr(jax.nn, name)
    params = jax.tree.map(lambda x: x.astype(dtype), PARAMS)

    def loss_fn(params, x):
        return jnp.mean(network(params, x.astype(dtype), activation) ** 2)

    assert sg.diagnose(loss_fn, params, X).layers[0].activation == name


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_constants_of_adam_are_read_in_float32(dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), PARAMS)
    with jax.numpy_dtype_promotion("standard"):
        found = sg.diagnose(loss_fn, params, (X, Y), optax.adam(1e-3)).facts.training
    np.testing.assert_allclose([found.b1, found.b2], [0.9, 0.999], rtol=1e-5)
    np.testing.assert_allclose(found.epsilon, 1e-8, rtol=1e-3)
    # Moments of 16 bits round away what a step adds to them.
    assert np.isnan(found.staleness).all()


@pytest.mark.parametrize("name", ["adamax", "adabelief", "yogi", "novograd"])
def test_moments_that_are_not_those_of_adam_give_no_constants(name):
    tx = getattr(optax, name)(1e-3)
    found = sg.diagnose(loss_fn, PARAMS, (X, Y), tx).facts.training
    assert np.isnan([found.b1, found.b2, found.epsilon]).all()
    assert found.staleness == found.below_epsilon == ()


def test_questions_without_an_answer_are_not_within_usual_limits():
    report = sg.diagnose(loss_fn, PARAMS, (X[:7], Y[:7]))
    asked = {rule.name for rule in report.asked}
    unasked = {"rate", "epsilon", "stale_moment", "labels", "updates", "dead_units"}
    assert not asked & unasked and len(asked | unasked) == len(RULES)
    assert not re.search(r"\b(rate|labels|dead_units)\b", str(report))
    assert report.to_html().count("<td>not looked at</td>") == len(unasked)


def test_a_nan_target_of_one_number_is_found():
    report = sg.diagnose(loss_fn, PARAMS, (X, Y.at[3].set(jnp.nan)))
    assert rules_of(report) == ["bad_examples"]
    assert "1 of 64 examples" in report.causes[0].finding


@pytest.mark.parametrize("beside", [jax.random.key(0), 0.5, np.arange(2.0)])
def test_a_nan_example_is_found_beside_arrays_that_are_no_examples(beside):
    def of_dict(params, batch):
        return loss_fn(params, (batch["x"], batch["y"]))

    batch = {"x": X.at[5, 2].set(jnp.nan), "y": Y, "beside": beside}
    report = sg.diagnose(of_dict, PARAMS, batch)
    assert rules_of(report) == ["bad_examples"]
    shallowest = report.verdicts[1].finding
    assert "so is its input, first in the batch" in shallowest


def test_a_loss_that_asserts_its_batch_size_is_taken_whole():
    def strict(params, batch):
        assert len(batch[0]) == 64
        return loss_fn(params, batch)

    report = sg.diagnose(strict, PARAMS, (X, Y), optax.adam(1e-3), steps=2)
    assert report.facts.batch.norms == ()
    assert np.isnan(report.facts.training.labels_seen)


def test_the_entropy_of_a_policy_makes_its_head_no_router():
    head = {"w": jax.random.normal(KEYS[3], (16, 4)) / 4, "b": 9.0 * jnp.eye(4)[0]}
    params = {"first": PARAMS["first"], "policy": head}

    def actor(params, batch):
        hidden = jnp.tanh(batch[0] @ params["first"]["w"])
        logits = hidden @ params["policy"]["w"] + params["policy"]["b"]
        chances, logs = jax.nn.softmax(logits), jax.nn.log_softmax(logits)
        entropy = -jnp.sum(chances * logs, axis=-1)
        return -jnp.mean(logs[:, 0] * batch[1]) - 0.01 * jnp.mean(entropy)

    report = sg.diagnose(actor, params, (X, Y))
    assert [layer.kind for layer in report.layers] == ["linear", "linear"]


def test_the_squares_of_a_layer_norm_are_no_activation():
    class Normalised(eqx.Module):
        first: eqx.nn.Linear
        norm: eqx.nn.LayerNorm

        def __call__(self, x):
            return jnp.tanh(self.norm(self.first(x)))

    model = Normalised(eqx.nn.Linear(8, 16, key=KEYS[4]), eqx.nn.LayerNorm(16))
    model = eqx.tree_at(lambda m: m.first.weight, model, 1e-3 * model.first.weight)
    report = sg.diagnose(lambda m, x: jnp.mean(jax.vmap(m)(x) ** 2), model, X)
    assert [layer.activation for layer in report.layers] == ["", ""]
    assert "dead_units" not in rules_of(report)


def test_units_are_found_dead_behind_a_limited_gradient():
    params = {**PARAMS, "first": {**PARAMS["first"], "b": jnp.full(16, -9.0)}}
    limited = lambda x: jax.nn.relu(sg.limit_gradient(x, 1.0))
    loss_fn = lambda params, x: jnp.mean(network(params, x, limited) ** 2)
    cause = sg.diagnose(loss_fn, params, X).causes[0]
    assert (cause.rule, cause.layer) == ("dead_units", "first")


def test_an_infinite_weight_is_the_only_cause():
    last = {"w": PARAMS["last"]["w"].at[0, 0].set(jnp.inf)}
    report = sg.diagnose(loss_fn, {**PARAMS, "last": last}, (X, Y))
    assert rules_of(report) == ["nonfinite_parameters"]
    assert "1 of 16 elements" in report.causes[0].finding


def test_images_of_bytes_are_too_large_as_they_are():
    images = np.random.default_rng(0).integers(0, 256, X.shape).astype(np.uint8)
    as_floats = lambda params, batch: loss_fn(
        params, (batch[0].astype(jnp.float32), batch[1])
    )
    assert rules_of(sg.diagnose(as_floats, PARAMS, (images, Y)))[0] == "input_size"


def test_a_scan_over_time_that_takes_learned_positions_is_no_stack_of_layers():
    params = {
        **PARAMS,
        "hidden": {"w": jax.nn.initializers.orthogonal()(KEYS[3], (16, 16))},
        "positions": 0.1 * jax.random.normal(KEYS[4], (30, 16)),
    }

    def recurrent(params, batch):
        def step(hidden, inputs):
            x, position = inputs
            hidden = hidden @ params["hidden"]["w"] + x @ params["first"]["w"]
            return jnp.tanh(hidden + position), None

        times = jnp.linspace(0, 1, 30)[:, None, None] * batch[0]
        start = jnp.zeros((len(batch[0]), 16))
        hidden, _ = jax.lax.scan(step, start, (times, params["positions"]))
        return jnp.mean(((hidden @ params["last"]["w"])[:, 0] - batch[1]) ** 2)

    report = sg.diagnose(recurrent, params, (X, Y))
    assert len(report.layers) == 3 and report.causes == ()


def test_complex_values_are_measured_by_their_absolute_values():
    weights = jax.lax.complex(PARAMS["first"]["w"], 2 * PARAMS["first"]["w"])
    loss_fn = lambda params, x: jnp.mean(jnp.abs(x.astype(complex) @ params) ** 2)
    report = sg.diagnose(loss_fn, weights, X)
    np.testing.assert_allclose(report.layers[0].rms ** 2, report.loss, rtol=1e-5)


def test_a_constant_that_is_not_finite_is_named_as_the_origin():
    bad = np.array([np.nan, 1.0], np.float32)
    report = sg.diagnose(lambda p, b: loss_fn(p, b) + bad.sum(), PARAMS, (X, Y))
    assert report.facts.origin != ""
    moving = np.full((8,), np.nan, np.float32)  # As statistics of a batch norm.
    loss = lambda p, b: loss_fn(p, (b[0] - moving, b[1]))
    assert sg.diagnose(loss, PARAMS, (X, Y)).facts.origin == "a constant"


def test_a_parameter_without_elements_does_not_hide_that_nothing_has_a_gradient():
    params = {**PARAMS, "empty": jnp.zeros((0, 3))}
    stopped = lambda params, batch: jax.lax.stop_gradient(loss_fn(params, batch))
    assert "no_gradient" in rules_of(sg.diagnose(stopped, params, (X, Y)))


def test_a_layer_without_units_and_a_loss_without_operations_are_read():
    def with_empty(params, batch):
        empty = jnp.tanh(batch[0] @ params["empty"])
        return loss_fn(params, batch) + jnp.sum(empty)

    params = {**PARAMS, "empty": jnp.zeros((8, 0))}
    assert sg.diagnose(with_empty, params, (X, Y)).loss > 0
    report = sg.diagnose(lambda p, b: p["s"], {"s": jnp.nan}, X)
    assert rules_of(report) == ["nonfinite_parameters"]


def test_a_nan_is_a_finding_where_jax_looks_for_them_too():
    broken = lambda params, batch: loss_fn(params, batch) * jnp.log(-1.0)
    with jax.debug_nans(True):
        assert sg.diagnose(loss_fn, PARAMS, (X, Y)).causes == ()
        report = sg.diagnose(broken, PARAMS, (X, Y))
    assert rules_of(report) == ["nonfinite_values"]


def test_a_state_of_other_parameters_is_refused():
    tx = optax.adam(1e-3)
    state = tx.init({**PARAMS, "table": jnp.arange(3)})
    with pytest.raises(ValueError, match="with 7 arrays of their shapes, got 9"):
        sg.diagnose(loss_fn, PARAMS, (X, Y), tx, state)


def test_batches_may_be_of_a_class_that_does_not_compare():
    @jax.tree_util.register_pytree_node_class
    class Batch:
        def __init__(self, x):
            self.x = x

        def tree_flatten(self):
            return (self.x,), None

        @classmethod
        def tree_unflatten(cls, _, children):
            return cls(*children)

    loss = lambda params, batch: loss_fn(params, (batch.x, Y))
    more = {"more_batches": [Batch(X + 1)], "steps": 1}
    report = sg.diagnose(loss, PARAMS, Batch(X), optax.sgd(0.01), **more)
    assert len(report.facts.training.losses) == 2


def test_output_takes_dollars_scalars_of_numpy_and_points_at_the_right_layer(tmp_path):
    def own(facts):
        yield Verdict(
            rule="own",
            severity="note",
            layer="",
            finding="found",
            evidence={"size": np.float32(2)},
            threshold="",
            source="",
            remedy="",
            formula="",
            code="",
        )

    params = {"$a$_b$": PARAMS["first"], "last": PARAMS["last"]}

    def loss(params, batch):
        first = jax.lax.stop_gradient(params["$a$_b$"])
        return loss_fn({"first": first, "last": params["last"]}, batch)

    rules = (*RULES, Rule("own", "Own?", own))
    report = sg.diagnose(loss, params, (X, Y), rules=rules)
    report.figure().savefig(tmp_path / "profile.png")
    plain = json.loads(report.to_json())
    assert plain["verdicts"][-1]["evidence"] == {"size": 2.0}
    tips = re.findall(r"<title>(.*?)</title></circle>", report.to_html())
    assert [tip.split(":")[0] for tip in tips].count("last") == 2
