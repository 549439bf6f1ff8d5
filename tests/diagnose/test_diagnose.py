"""What a diagnosis measures, and what it says."""

import json
import math
import sys
import types

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn, nnx

import stablegrad as sg
from stablegrad.diagnose import RULES, Rule, Verdict
from stablegrad.diagnose.__main__ import main

WIDTH, DEPTH = 16, 4
X = jax.random.normal(jax.random.key(0), (32, WIDTH))


def weights(seed=0, gain=1.3):
    keys = jax.random.split(jax.random.key(seed), DEPTH)
    return [gain * jax.random.normal(k, (WIDTH, WIDTH)) / WIDTH**0.5 for k in keys]


def plain_params(**changed):
    layers = {
        f"layer{i}": {"w": w, "b": jnp.zeros(WIDTH)} for i, w in enumerate(weights())
    }
    for name, factor in changed.items():
        layers[name]["w"] *= factor
    return layers


def tanh_net(params, x):
    for i in range(DEPTH):
        layer = params[f"layer{i}"]
        x = jnp.tanh(x @ layer["w"] + layer["b"][None])
    return jnp.mean((x - 1.0) ** 2)


def by_name(report):
    return {layer.name: layer for layer in report.layers}


def rms(x):
    return float(np.sqrt(np.mean(np.square(np.asarray(x, np.float64)))))


@pytest.mark.slow
def test_values_and_gradients_of_each_layer_match_a_float64_oracle():
    """By hand: forward, and back through tanh and the weights."""
    params = plain_params()
    report = sg.diagnose(tanh_net, params, X)
    outs, x = [], np.asarray(X, np.float64)
    for i in range(DEPTH):
        outs.append(x @ np.asarray(params[f"layer{i}"]["w"], np.float64))
        x = np.tanh(outs[-1])
    back = 2 * (x - 1) / x.size
    found = by_name(report)
    assert list(found) == [f"layer{i}" for i in range(DEPTH)]
    for i in reversed(range(DEPTH)):
        back = back * (1 - np.tanh(outs[i]) ** 2)
        layer = found[f"layer{i}"]
        np.testing.assert_allclose(layer.rms, rms(outs[i]), rtol=1e-4)
        np.testing.assert_allclose(layer.gradient_rms, rms(back), rtol=1e-4)
        assert layer.activation == ("tanh" if i < DEPTH - 1 else "")
        back = back @ np.asarray(params[f"layer{i}"]["w"], np.float64).T
    assert report.causes == () and "within usual limits" in str(report)
    np.testing.assert_allclose(report.loss, np.mean((x - 1) ** 2), rtol=1e-5)


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(DEPTH - 1):
            x = jnp.tanh(nn.Dense(WIDTH, name=f"layer{i}")(x))
        return jnp.tanh(nn.Dense(WIDTH, name=f"layer{DEPTH - 1}")(x))


class NNXNet(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        for i in range(DEPTH):
            setattr(self, f"layer{i}", nnx.Linear(WIDTH, WIDTH, rngs=rngs))

    def __call__(self, x):
        for i in range(DEPTH):
            x = jnp.tanh(getattr(self, f"layer{i}")(x))
        return x


class EquinoxNet(eqx.Module):
    layer0: eqx.nn.Linear
    layer1: eqx.nn.Linear
    layer2: eqx.nn.Linear
    layer3: eqx.nn.Linear

    def __call__(self, x):
        for i in range(DEPTH):
            x = jnp.tanh(getattr(self, f"layer{i}")(x))
        return x


def in_framework(name):
    """The same network with the weights of `plain_params` in each framework."""
    params = plain_params()
    if name == "linen":
        model = LinenNet()
        named = {k: {"kernel": v["w"], "bias": v["b"]} for k, v in params.items()}
        return lambda p, x: jnp.mean((model.apply(p, x) - 1.0) ** 2), {"params": named}
    if name == "nnx":
        model = NNXNet()
        for key, layer in params.items():
            getattr(model, key).kernel[...] = layer["w"]
        return lambda model, x: jnp.mean((model(x) - 1.0) ** 2), model
    if name == "equinox":
        key = jax.random.key(0)
        linear = lambda w: eqx.tree_at(
            lambda one: (one.weight, one.bias),
            eqx.nn.Linear(WIDTH, WIDTH, key=key),
            (w.T, jnp.zeros(WIDTH)),
        )
        model = EquinoxNet(*(linear(layer["w"]) for layer in params.values()))
        return lambda model, x: jnp.mean((jax.vmap(model)(x) - 1.0) ** 2), model
    return jax.jit(jax.checkpoint(tanh_net)), params


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linen", "nnx", "equinox", "jit and checkpoint"])
def test_all_frameworks_give_the_same_layers_and_numbers(name):
    expected = sg.diagnose(tanh_net, plain_params(), X).layers
    found = sg.diagnose(*in_framework(name), X).layers
    assert [layer.name for layer in found] == [layer.name for layer in expected]
    for one, other in zip(found, expected, strict=True):
        for field in (
            "rms",
            "gradient_rms",
            "output_rms",
            "gain",
            "saturated",
            "alike",
        ):
            ours, theirs = getattr(one, field), getattr(other, field)
            np.testing.assert_allclose(ours, theirs, rtol=1e-3, err_msg=field)


@pytest.mark.slow
def test_a_scan_over_layers_gives_one_layer_an_iteration():
    def scanned(params, x):
        def step(x, layer):
            return jnp.tanh(x @ layer["w"] + layer["b"][None]), None

        x, _ = jax.lax.scan(step, x, params["stack"])
        return jnp.mean((x - 1.0) ** 2)

    stack = jax.tree.map(lambda *xs: jnp.stack(xs), *plain_params().values())
    found = sg.diagnose(scanned, {"stack": stack}, X).layers
    expected = sg.diagnose(tanh_net, plain_params(), X).layers
    assert [layer.name for layer in found] == [f"stack[{i}]" for i in range(DEPTH)]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.rms, other.rms, rtol=1e-4)
        np.testing.assert_allclose(one.gradient_rms, other.gradient_rms, rtol=1e-4)


@pytest.mark.slow
def test_a_recurrent_layer_is_one_layer_with_a_gain_through_time():
    def linear_rnn(params, x):
        cell = lambda h, xt: (h @ params["recurrent"] + xt @ params["inputs"], None)
        h, _ = jax.lax.scan(cell, jnp.zeros((4, 8)), x)
        return jnp.mean(h * jnp.arange(8.0)[None])

    orthogonal = jax.nn.initializers.orthogonal()(jax.random.key(0), (8, 8))
    params = {"inputs": jnp.eye(8), "recurrent": 1.5 * orthogonal}
    report = sg.diagnose(
        linear_rnn, params, jax.random.normal(jax.random.key(1), (24, 4, 8))
    )
    layer = by_name(report)["recurrent"]
    assert layer.times == 24 and layer.recurrent
    np.testing.assert_allclose(layer.time_gain, 1.5, rtol=1e-3)
    (cause,) = report.causes
    assert (cause.rule, cause.layer) == ("through_time", "recurrent")
    np.testing.assert_allclose(
        cause.change["multiply"]["recurrent"], 1 / 1.5, rtol=1e-3
    )


ACTIVATIONS = {
    "relu": (jax.nn.relu, 2**0.5),
    "tanh": (jnp.tanh, 1.5925),
    "gelu": (jax.nn.gelu, 1.5335),
    "silu": (jax.nn.silu, 1.6765),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_chi_is_that_of_mean_field_theory_at_width_512(name):
    """Within 3 % over the network; the reference values are those of the theory."""
    activation, gain = ACTIVATIONS[name]
    width, depth = 512, 8
    keys = jax.random.split(jax.random.key(0), depth + 3)
    params = [
        gain * jax.random.normal(k, (width, width)) / width**0.5 for k in keys[:depth]
    ]
    probe = jax.random.normal(keys[-1], (64, width))  # A gradient without direction.

    def loss_fn(params, batch):
        x, probe = batch
        for w in params[:-1]:
            x = activation(x @ w)
        return jnp.mean(x @ params[-1] * probe)

    report = sg.diagnose(
        loss_fn, params, (jax.random.normal(keys[-2], (64, width)), probe)
    )
    layers = [layer for layer in report.layers[:-2]]
    assert {layer.activation for layer in layers} == {name}
    np.testing.assert_allclose(layers[0].right_gain, gain, rtol=2e-3)
    ratio = [layer.chi / layer.chi_theory for layer in layers]
    assert abs(math.exp(np.mean(np.log(ratio))) - 1) < 0.03
    assert report.causes == ()


@pytest.mark.slow
@pytest.mark.parametrize(
    "factor, rule", [(12.0, "weights_large"), (0.05, "weights_small")]
)
def test_a_layer_of_the_wrong_size_is_named_with_the_factor_that_repairs_it(
    factor, rule
):
    report = sg.diagnose(tanh_net, plain_params(layer1=factor), X)
    (cause,) = report.causes
    assert (cause.rule, cause.layer) == (rule, "layer1")
    assert cause.change["multiply"]["layer1.w"] * factor == pytest.approx(1.0, rel=0.5)
    for verdict in report.verdicts:
        assert verdict.evidence and verdict.threshold and verdict.source
        assert verdict.remedy and verdict.formula and verdict.code
    symptoms = [v for v in report.verdicts if v.follows]
    assert {v.follows for v in symptoms} <= {rule}


@pytest.mark.slow
def test_units_below_zero_for_every_example_are_dead():
    def relu_net(params, x):
        for layer in params.values():
            x = jax.nn.relu(x @ layer["w"] + layer["b"][None])
        return jnp.mean(x[:, 0])

    params = plain_params()
    params["layer1"]["b"] = params["layer1"]["b"].at[: 3 * WIDTH // 4].set(-50.0)
    report = sg.diagnose(relu_net, params, X)
    assert by_name(report)["layer1"].dead == pytest.approx(0.75)
    assert (report.causes[0].rule, report.causes[0].layer) == ("dead_units", "layer1")


@pytest.mark.slow
def test_the_first_bad_tensor_the_last_clean_one_and_the_operation_are_named():
    def loss_fn(params, x):
        for i in range(DEPTH):
            x = jnp.tanh(x @ params[f"layer{i}"]["w"])
            x = jnp.log(x) if i == 1 else x
        return jnp.mean(x)

    report = sg.diagnose(loss_fn, plain_params(), X)
    cause = report.causes[0]
    assert (cause.rule, cause.layer, cause.severity) == (
        "nonfinite_values",
        "layer2",
        "critical",
    )
    assert "layer1 the last clean one" in cause.finding
    assert "`log` at test_diagnose.py:" in cause.finding
    assert "NaN" not in report.to_json()


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_is_told_from_a_value_that_is_not():
    def loss_fn(params, x):
        x = jnp.tanh(x @ params["first"])
        x = jnp.sqrt(0.0 * x) + x @ params["second"]
        return jnp.mean(x @ params["third"])

    params = dict(zip(("first", "second", "third"), weights(), strict=False))
    (cause, *_) = sg.diagnose(loss_fn, params, X).causes
    assert (cause.rule, cause.layer) == ("nonfinite_gradients", "first")
    assert (
        "third is the last clean tensor" in cause.finding or "second" in cause.finding
    )


@pytest.mark.slow
def test_overflow_in_float16_names_the_layer_that_computes_in_it():
    def loss_fn(params, x):
        x = jnp.tanh(x @ params["first"])
        x = (3e4 * x).astype(jnp.float16) @ params["second"].astype(jnp.float16)
        return jnp.mean((x.astype(jnp.float32) / 3e4) @ params["third"])

    params = dict(zip(("first", "second", "third"), weights(gain=3.0), strict=False))
    (cause, *_) = sg.diagnose(loss_fn, params, X).causes
    assert (cause.rule, cause.layer) == ("overflow16", "second")


@pytest.fixture(scope="module")
def attention():
    """Queries, keys and values of one head, with a causal mask."""

    def loss_fn(params, x):
        q, k, v = (x @ params[name] for name in ("query", "key", "value"))
        logits = jnp.einsum("btd,bsd->bts", q, k) / WIDTH**0.5
        logits = jnp.where(jnp.tril(jnp.ones((8, 8), bool))[None], logits, -jnp.inf)
        x = x + jax.nn.softmax(logits) @ v
        return jnp.mean((x @ params["head"] - 1.0) ** 2)

    params = dict(
        zip(("query", "key", "value", "head"), weights(gain=1.0), strict=True)
    )
    return loss_fn, params, jax.random.normal(jax.random.key(1), (4, 8, WIDTH))


@pytest.mark.slow
def test_attention_is_measured_without_its_mask(attention):
    loss_fn, params, x = attention
    report = sg.diagnose(loss_fn, params, x)
    layer = next(layer for layer in report.layers if layer.kind == "attention")
    q, k = (np.asarray(x @ params[name], np.float64) for name in ("query", "key"))
    logits = np.einsum("btd,bsd->bts", q, k) / WIDTH**0.5
    seen = np.tril(np.ones((8, 8), bool))
    assert layer.logit == pytest.approx(np.abs(logits[:, seen]).max(), rel=1e-4)
    p = np.where(seen, np.exp(logits), 0)
    p /= p.sum(-1, keepdims=True)
    entropy = -np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0).sum(-1)[:, 1:]
    share = (entropy / np.log(np.arange(2, 9))).mean()
    assert layer.entropy == pytest.approx(share, rel=1e-3)
    assert report.causes == ()
    params = {**params, "query": 40 * params["query"]}
    (cause, *_) = sg.diagnose(loss_fn, params, x).causes
    assert cause.rule == "attention" and "query" in cause.change["multiply"]
    # A layer after it explains what goes back through it, but not its logits.
    params["head"] = 30 * params["head"]
    found = {v.rule: v.follows for v in sg.diagnose(loss_fn, params, x).verdicts}
    assert found["weights_large"] == "" and found["attention"] == ""


@pytest.mark.slow
def test_constants_of_adam_are_read_off_its_updates():
    tx = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(1e-3, b1=0.8, b2=0.99, eps=1e-6)
    )
    training = sg.diagnose(tanh_net, plain_params(), X, tx).facts.training
    np.testing.assert_allclose(training.b1, 0.8, rtol=1e-4)
    np.testing.assert_allclose(training.b2, 0.99, rtol=1e-4)
    np.testing.assert_allclose(training.epsilon, 1e-6, rtol=0.05)
    sgd = sg.diagnose(tanh_net, plain_params(), X, optax.sgd(0.1)).facts.training
    assert math.isnan(sgd.b2) and sgd.below_epsilon == ()


def rules_found(report):
    return {verdict.rule for verdict in report.causes}


@pytest.mark.slow
def test_an_epsilon_above_the_gradients_and_a_rate_that_is_too_high_are_found():
    params = plain_params()
    large = sg.diagnose(tanh_net, params, X, optax.adam(1e-3, eps=10.0))
    assert rules_found(large) == {"epsilon"}
    healthy = sg.diagnose(tanh_net, params, X, optax.sgd(0.1), steps=20)
    assert healthy.causes == ()
    fast = sg.diagnose(tanh_net, params, X, optax.adam(1.0), steps=20)
    assert rules_found(fast) == {"rate"}
    training = fast.facts.training
    assert training.calm_scale < 1 or min(training.ends) < training.ends[0]


@pytest.mark.slow
def test_the_noise_scale_of_shards_is_that_of_a_known_gradient():
    """A linear loss: the gradient of an example is the example."""
    x = 2.0 + jax.random.normal(jax.random.key(0), (4096, 25))
    report = sg.diagnose(lambda p, x: jnp.mean(x @ p), jnp.zeros(25), x)
    assert report.facts.batch.noise_scale == pytest.approx(25 / (4 * 25), rel=0.5)


@pytest.mark.slow
def test_examples_that_are_bad_or_far_too_large_are_listed():
    bad = X.at[3, 2].set(jnp.nan)
    report = sg.diagnose(tanh_net, plain_params(), bad)
    assert rules_found(report) == {"bad_examples"}
    assert report.causes[0].change == {"drop_examples": [3]}
    odd = X.at[8:12].multiply(300.0)
    cause = sg.diagnose(tanh_net, plain_params(), odd).causes[0]
    assert cause.rule == "odd_rows"
    assert cause.change == {"drop_examples": [8, 9, 10, 11]}


def test_a_rule_of_ones_own_is_asked_and_can_be_explained_by_another():
    def judge(facts):
        yield Verdict(
            "mine",
            "warning",
            "layer0",
            "Something.",
            {"x": 1.0},
            "1",
            "me",
            "Do it.",
            "",
            "",
        )

    rules = (*RULES, Rule("mine", "Is it so?", judge))
    report = sg.diagnose(tanh_net, plain_params(), X, rules=rules)
    assert rules_found(report) == {"mine"} and "Something." in str(report)
    cause = Rule("cause", "Why?", judge, explains=("mine",))
    report = sg.diagnose(tanh_net, plain_params(), X, rules=(cause, rules[-1]))
    assert [v.follows for v in report.verdicts] == ["", "cause"]


@pytest.mark.slow
def test_the_report_is_text_a_page_a_figure_and_json(tmp_path):
    tx = sg.stabilize(optax.adam(1e-3))
    params = plain_params(layer1=12.0)
    state = tx.init(params)
    nan = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), params)
    _, state = tx.update(nan, state, params, value=1.0)
    report = sg.diagnose(tanh_net, params, X, tx, state, events=sg.events(state))
    text = str(report)
    assert max(map(len, text.splitlines())) <= 100
    assert "What happened in the run" in text and "skip (nonfinite gradient)" in text
    page = report.to_html(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text() == page
    assert "http://" not in page and "<script" not in page and "src=" not in page
    assert "weights_large layer1" in page and "<svg" in page
    numbers = json.loads(report.to_json(tmp_path / "report.json"))
    assert numbers["verdicts"][0]["rule"] == "weights_large"
    assert len(numbers["layers"]) == DEPTH and numbers["events"]
    upper, lower = report.figure().axes
    np.testing.assert_allclose(
        upper.lines[0].get_ydata(), [layer.rms for layer in report.layers]
    )
    assert [label.get_text() for label in upper.texts] == ["weights_large"]
    assert len(lower.get_xticklabels()) == DEPTH


def test_the_command_prints_a_report_and_fails_if_it_is_critical(
    monkeypatch, capsys, tmp_path
):
    module = types.ModuleType("a_model_to_diagnose")
    module.fine = lambda: (tanh_net, plain_params(), X)
    module.bad = lambda: dict(
        loss_fn=tanh_net, params=plain_params(layer1=30.0), batch=X
    )
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert main([f"{module.__name__}:fine", "--html", str(tmp_path / "r.html")]) == 0
    assert "within usual limits" in capsys.readouterr().out
    assert (tmp_path / "r.html").is_file()
    assert main([f"{module.__name__}:bad"]) == 1
    with pytest.raises(SystemExit):
        main(["nowhere"])
    assert "must be module:function" in capsys.readouterr().err


@pytest.mark.parametrize(
    "body, message",
    [
        ('params["wrong"]', "KeyError: 'wrong'"),
        ('params["w"] @ jnp.ones(7)', "dot_general requires contracting"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
    ],
)
def test_the_command_names_the_line_of_an_error_in_the_users_file(
    body, message, monkeypatch, tmp_path, capsys
):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "users_training.py").write_text(
        "import jax.numpy as jnp\n"
        "def loss_fn(params, x):\n"
        f"    return jnp.mean({body})\n"
        "def setup():\n"
        '    return loss_fn, {"w": jnp.ones((2, 3))}, jnp.ones((4, 2))\n'
    )
    monkeypatch.delitem(sys.modules, "users_training", raising=False)
    page = tmp_path / "page.html"
    with pytest.raises(SystemExit) as stopped:
        main(["users_training:setup", "--html", str(page)])
    told = capsys.readouterr()
    assert stopped.value.code == 2 and told.out == "" and not page.exists()
    assert message in told.err
    assert f"({tmp_path / 'users_training.py'}, line 3)" in told.err
    with pytest.raises(SystemExit) as stopped:
        main(["users_training:setup", "--html", str(page), "--json", str(page)])
    assert stopped.value.code == 2
    assert "must be different files" in capsys.readouterr().err


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="`steps` must be 0 without `tx`, got 3"):
        sg.diagnose(tanh_net, plain_params(), X, steps=3)
    with pytest.raises(TypeError, match="loss_fn` must return the loss alone"):
        sg.diagnose(lambda p, x: x, plain_params(), X)
    with pytest.raises(TypeError, match="`diagnose` must be given an optax"):
        sg.diagnose(tanh_net, plain_params(), X, 3.0)


@pytest.mark.parametrize(
    "weight", [2.0, jnp.float32(2), jax.random.key(0)], ids=["float", "array", "key"]
)
def test_a_scalar_of_a_batch_belongs_to_every_example(weight):
    def loss_fn(params, batch):
        return jnp.mean((batch["x"] @ params["w"]) ** 2)

    batch = {"x": jnp.ones((8, 3)), "weight": weight}
    found = sg.diagnose(loss_fn, {"w": jnp.ones((3, 1))}, batch, optax.sgd(0.01))
    assert found.facts.batch.examples == len(found.facts.batch.norms) == 8
    assert [layer.name for layer in found.layers] == ["w"]


def test_a_batch_without_a_common_first_axis_is_taken_as_a_whole():
    loss_fn = lambda params, batch: jnp.mean((batch[0] @ params["w"]) ** 2)
    params = {"w": jnp.ones((3, 1))}
    found = sg.diagnose(loss_fn, params, (jnp.ones((8, 3)), jnp.ones(2)))
    assert found.facts.batch.examples == 0 and found.facts.batch.norms == ()


def test_a_loss_without_a_batch_is_read_and_trained():
    loss_fn = lambda params, batch: jnp.sum(params["w"] ** 2)
    params = {"w": jnp.ones(3)}
    found = sg.diagnose(loss_fn, params, None, optax.sgd(0.01), steps=2)
    np.testing.assert_allclose(found.facts.training.untrained, [3.0] * 3)


@pytest.mark.parametrize("more", [[jnp.ones((4, 3))], [{"x": jnp.ones((8, 3))}]])
def test_further_batches_must_be_shaped_as_the_first(more):
    loss_fn = lambda params, x: jnp.mean((x @ params["w"]) ** 2)
    params, x = {"w": jnp.ones((3, 1))}, jnp.ones((8, 3))
    with pytest.raises(ValueError, match="shaped as `batch`"):
        sg.diagnose(loss_fn, params, x, optax.sgd(0.1), steps=2, more_batches=more)
    with pytest.raises(ValueError, match="`more_batches` must be a list, got None"):
        sg.diagnose(loss_fn, params, x, optax.sgd(0.1), steps=2, more_batches=None)
