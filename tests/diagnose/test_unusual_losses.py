"""Losses and networks that are easily misread."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import stablegrad as sg
from stablegrad.diagnose.__main__ import main
from stablegrad.structure.nnx import ScaledResidual

X = jax.random.normal(jax.random.key(0), (32, 16))
Y = jnp.sum(X[:, :4], axis=1, keepdims=True) / 2
HE = jax.nn.initializers.he_normal()


def network(*sizes, init=HE):
    keys = jax.random.split(jax.random.key(1), len(sizes))
    pairs = zip(keys, sizes[:-1], sizes[1:], strict=False)
    return {f"l{i}": init(key, (a, b)) for i, (key, a, b) in enumerate(pairs)}


PARAMS = network(16, 32, 32, 32, 1)


def squared_error(params, batch, act=jax.nn.relu):
    x, y = batch
    *hidden, last = params.values()
    for w in hidden:
        x = act(x @ w)
    return jnp.mean((x @ last - y) ** 2)


def causes(report):
    return [verdict.rule for verdict in report.causes if verdict.severity != "note"]


@pytest.mark.slow
@pytest.mark.parametrize("rate", [1.0, 100.0])
def test_a_rate_that_is_too_high_at_every_scale_is_critical(rate):
    report = sg.diagnose(
        squared_error, PARAMS, (X, Y), tx=optax.adam(100 * rate), steps=20
    )
    assert report.facts.training.calm_scale == 0
    assert "rate" in causes(report) and report.severity == "critical"


@pytest.mark.slow
def test_a_scale_behind_a_layer_is_not_taken_for_its_weight():
    rngs = nnx.Rngs(0)
    linear = lambda a, b: nnx.Linear(a, b, kernel_init=HE, rngs=rngs)
    branch = nnx.Sequential(linear(64, 64), jax.nn.relu, linear(64, 64))
    model = nnx.Sequential(linear(16, 64), ScaledResidual(branch, scale_init=1.0))
    loss_fn = lambda model, x: jnp.mean(model(x) ** 2)
    report = sg.diagnose(loss_fn, model, X)
    (end,) = [x for x in report.layers if x.leaf.endswith("branch.layers.2.kernel")]
    kernel = branch.layers[2].kernel[...]
    np.testing.assert_allclose(end.weight_rms, jnp.std(kernel), rtol=0.02)
    assert "weights_large" not in causes(report)


@pytest.mark.slow
def test_a_loss_that_takes_whole_batches_only_is_diagnosed_without_its_parts():
    def contrastive(params, x):
        z = x @ params["w"]
        labels = jnp.arange(32)
        losses = optax.softmax_cross_entropy_with_integer_labels(z @ z.T, labels)
        return losses.mean()

    params = {"w": jnp.eye(16) / 4}
    report = sg.diagnose(contrastive, params, X, tx=optax.sgd(0.1), steps=3)
    assert report.facts.batch.norms == () and len(report.layers) > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "loss_fn",
    [
        lambda params, batch: jax.nn.relu(squared_error(params, batch) - 1e3),
        lambda params, batch: jax.lax.stop_gradient(squared_error(params, batch)),
    ],
    ids=["clamped", "stopped"],
)
def test_a_gradient_of_zeros_is_critical(loss_fn):
    report = sg.diagnose(loss_fn, PARAMS, (X, Y))
    assert causes(report) == ["no_gradient"] and report.severity == "critical"


@pytest.mark.slow
def test_targets_are_no_inputs():
    large = sg.diagnose(squared_error, PARAMS, (X, 1000 * Y))
    assert "input_size" not in causes(large)
    large = sg.diagnose(squared_error, PARAMS, (1000 * X, Y))
    assert "input_size" in causes(large)


@pytest.mark.slow
def test_a_loss_without_a_layer_says_so():
    report = sg.diagnose(lambda params, _: squared_error(params, (X, Y)), PARAMS, X)
    assert "no layer found" in str(report)


FIVE = lambda: (squared_error, PARAMS, (X, Y), optax.sgd(0.1), 5)
NONE = lambda: None


@pytest.mark.parametrize("name", ["FIVE", "NONE"])
def test_the_command_takes_three_or_four_arguments_or_a_dict(name):
    with pytest.raises(TypeError, match=r"must return \(loss_fn, params, batch\)"):
        main([f"{__name__}:{name}"])


def test_published_clip_by_max_counts_beside_a_leaf_without_a_gradient():
    tx = sg.clip_by_max(published=True)
    params = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
    state = tx.init(params)
    for size in (1.0, 1.0, 100.0):
        grads = {"a": jnp.full(2, size), "b": jnp.zeros(2)}
        clipped, state = tx.update(grads, state, params)
    seen = sg.metrics(state)
    assert seen["clip_by_max_clipped_steps"] == 1
    np.testing.assert_allclose(seen["clip_by_max_scale"], clipped["a"][0] / 100)


@pytest.mark.slow
def test_lsuv_keeps_a_kernel_whose_bias_makes_the_spread():
    bias = 3 * jax.random.normal(jax.random.key(2), (16,))
    params = {"w": jnp.eye(16)}
    outputs = lambda params: {"w": X @ params["w"] + bias[None]}
    after = sg.structure.lsuv(outputs, params)
    chex.assert_trees_all_equal(after, params)


@pytest.mark.slow
def test_an_optimizer_is_read_beside_a_leaf_without_elements():
    params = {"empty": jnp.zeros((0, 3)), **PARAMS}
    loss_fn = lambda params, batch: squared_error(
        {k: w for k, w in params.items() if k != "empty"}, batch
    )
    found = sg.diagnose(loss_fn, params, (X, Y), tx=optax.adam(1e-3)).facts.training
    np.testing.assert_allclose((found.b1, found.b2), (0.9, 0.999), rtol=1e-3)


@pytest.mark.slow
def test_a_page_is_written_as_the_encoding_that_it_declares(tmp_path):
    report = sg.diagnose(squared_error, PARAMS, (X, Y))
    page = report.to_html(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == page
    assert 'charset="utf-8"' in page.lower()
