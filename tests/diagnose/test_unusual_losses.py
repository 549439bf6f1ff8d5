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
def test_a_batch_without_examples_and_a_line_search_are_errors():
    with pytest.raises(ValueError, match="must have examples"):
        sg.diagnose(squared_error, PARAMS, (X[:0], Y[:0]))
    with pytest.raises(ValueError, match="searches along a line"):
        sg.diagnose(squared_error, PARAMS, (X, Y), optax.lbfgs())


@pytest.mark.slow
def test_one_example_beside_a_random_key_does_not_tell_dead_units():
    loss = lambda p, batch: squared_error(p, (batch["x"], batch["y"]))
    batch = {"x": X[:1], "y": Y[:1], "key": jax.random.key(0)}
    assert causes(sg.diagnose(loss, PARAMS, batch)) == []


@pytest.mark.slow
def test_a_head_of_zeros_in_float16_does_not_underflow():
    half = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float16), tree)
    loss = lambda p, batch: squared_error(half(p), half(batch)).astype(jnp.float32)
    *_, head = PARAMS
    params = {**PARAMS, head: jnp.zeros_like(PARAMS[head])}
    assert causes(sg.diagnose(loss, params, (X, Y))) == []
    small = lambda p, batch: 1e-6 * loss(p, batch)
    assert "underflow16" in causes(sg.diagnose(small, PARAMS, (X, Y)))


@pytest.mark.slow
def test_a_single_number_of_an_example_may_be_far_larger_than_others():
    sigma = jnp.exp(-1.2 + 1.2 * jax.random.normal(jax.random.key(2), (256, 1)))
    x = jax.random.normal(jax.random.key(3), (256, 16))
    loss = lambda p, batch: squared_error(p, (batch[0], jnp.log(batch[1])))
    assert float(sigma.max() / jnp.median(sigma)) > 20
    assert causes(sg.diagnose(loss, PARAMS, (x, sigma))) == []


@pytest.mark.slow
def test_a_loss_without_a_layer_says_so():
    report = sg.diagnose(lambda params, _: squared_error(params, (X, Y)), PARAMS, X)
    assert "no layer found" in str(report)


FIVE = lambda: (squared_error, PARAMS, (X, Y), optax.sgd(0.1), 5)
NONE = lambda: None


UNKNOWN = lambda: {"loss_fn": squared_error, "weights": PARAMS}
FINE = lambda: (squared_error, PARAMS, (X, Y))
NO_BATCH = lambda: {"loss_fn": squared_error, "params": PARAMS}
WITH_AUX = lambda: (lambda p, batch: (squared_error(p, batch), 1), PARAMS, (X, Y))


@pytest.mark.parametrize(
    "name, said",
    [
        ("FIVE", "must return (loss_fn, params, batch)"),
        ("NONE", "must return (loss_fn, params, batch)"),
        ("UNKNOWN", "a dict with weights, which `diagnose` does not take"),
        ("squared_error", "must take no arguments, and needs params, batch"),
        ("NO_BATCH", "missing 1 required positional argument: 'batch'"),
        ("WITH_AUX", "must return the loss alone, a real scalar"),
        ("FINE --steps 2", "`steps` must be 0 without `tx`"),
        ("FINE --figure report.xyz", "--figure must end in one of"),
        ("FINE --json .", "is a folder, not a file"),
    ],
)
def test_the_command_says_in_one_line_what_is_wrong(name, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(f"{__name__}:{name}".split())
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


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


def in_bfloat16(params, tokens, stream):
    """Two residual branches in float32 on a stream of its own dtype."""

    def normed(h):
        return (h - h.mean(-1, keepdims=True)) / (h.std(-1, keepdims=True) + 1e-3)

    h = params["embed"][tokens].astype(stream)
    h = h + normed(h).astype(jnp.float32) @ params["first"]
    h = h + normed(h) @ params["second"]
    return jnp.mean((normed(h) @ params["head"] - 1.0) ** 2)


@pytest.mark.slow
@pytest.mark.parametrize("stream", [jnp.float32, jnp.bfloat16])
def test_a_residual_sum_that_promotes_its_stream_is_one(stream):
    shapes = {"embed": (50, 32), "first": (32, 32), "second": (32, 32), "head": (32, 4)}
    keys = jax.random.split(jax.random.key(2), 4)
    params = {
        name: jax.random.normal(key, shape) / 6
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    params["first"] *= 1000
    tokens = jax.random.randint(jax.random.key(3), (32, 6), 0, 50)
    loss_fn = lambda params, tokens: in_bfloat16(params, tokens, stream)
    report = sg.diagnose(loss_fn, params, tokens)
    sums = [layer.name for layer in report.layers if layer.kind == "sum"]
    assert sums == ["first (sum)", "second (sum)"]
    assert {"weights_large", "residual"} <= {v.rule for v in report.verdicts}


@pytest.mark.slow
def test_a_unit_is_dead_if_no_example_of_any_iteration_reaches_it():
    def net(params, x):
        for name in ("l0", "l1", "l2"):
            x = jax.nn.relu(x @ params[name])
        return x @ params["l3"]

    def by(loop):
        error = lambda params, b: loop(lambda x: net(params, x), b[0]) - b[1]
        return lambda params, batch: jnp.mean(error(params, batch) ** 2)

    dying = {**PARAMS, "l1": PARAMS["l1"].at[:, :8].set(-1.0)}
    dead = []
    for loop in (lambda f, x: jax.vmap(f)(x), jax.lax.map):
        report = sg.diagnose(by(loop), dying, (X, Y))
        dead.append([layer.dead for layer in report.layers[:3]])
    assert dead[0][1] >= 8 / 32
    np.testing.assert_allclose(*dead)


def by_fori(params, x):
    step = lambda i, h: jax.nn.relu(h @ params["stack"][i])
    return jax.lax.fori_loop(0, 3, step, x @ params["first"])


def by_index(params, x):
    step = lambda h, i: (jax.nn.relu(h @ params["stack"][i]), None)
    return jax.lax.scan(step, x @ params["first"], jnp.arange(3))[0]


@pytest.mark.slow
@pytest.mark.parametrize("trunk", [by_fori, by_index])
def test_layers_that_a_loop_picks_from_a_stack_are_seen_one_by_one(trunk):
    stack = jax.random.normal(jax.random.key(4), (3, 32, 32)) / 4
    params = {"first": PARAMS["l0"], "stack": stack.at[1].mul(1e3)}
    params["last"] = PARAMS["l3"]
    loss_fn = lambda params, x: jnp.mean((trunk(params, x) @ params["last"]) ** 2)
    report = sg.diagnose(loss_fn, params, X)
    names = [layer.name for layer in report.layers]
    assert names == ["first", "stack[0]", "stack[1]", "stack[2]", "last"]
    assert report.causes[0].rule == "weights_large"
    assert report.causes[0].layer == "stack[1]"


@pytest.mark.slow
def test_parameters_inside_a_branch_are_named_as_not_seen():
    def loss_fn(params, x):
        h = jax.nn.relu(x @ params["l0"])
        deeper = lambda h: jax.nn.relu(h @ params["l1"])
        h = jax.lax.cond(jnp.sum(x) > 0, deeper, lambda h: h, h)
        return jnp.mean((jax.nn.relu(h @ params["l2"]) @ params["l3"]) ** 2)

    report = sg.diagnose(loss_fn, PARAMS, X)
    assert report.facts.unseen == ("l1",)
    assert "3 layers, within usual limits, 1 parameter not seen" in str(report)
    assert report.to_dict()["unseen"] == ["l1"]
    assert sg.diagnose(squared_error, PARAMS, (X, Y)).facts.unseen == ()
