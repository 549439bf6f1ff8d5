"""What a diagnosis reads off an optimizer, and off steps with it."""

import jax
import jax.numpy as jnp
import optax
import pytest

import stablegrad as sg

pytestmark = pytest.mark.slow

KEYS = jax.random.split(jax.random.key(0), 8)
X = jax.random.normal(KEYS[0], (64, 8))
Y = X[:, :1] * X[:, 1:2]
HE = jax.nn.initializers.he_normal()
PARAMS = {
    "a": HE(KEYS[1], (8, 32)),
    "b": HE(KEYS[2], (32, 32)),
    "c": HE(KEYS[3], (32, 32)),
    "out": HE(KEYS[4], (32, 1)),
}


def network(p, x):
    for name in ("a", "b", "c"):
        x = jax.nn.relu(x @ p[name])
    return x @ p["out"]


def squared_error(p, batch):
    return jnp.mean((network(p, batch[0]) - batch[1]) ** 2)


def causes(report):
    return [verdict.rule for verdict in report.causes if verdict.severity != "note"]


def test_a_clip_before_adam_makes_no_moment_stale():
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    report = sg.diagnose(squared_error, PARAMS, (X, 1e3 * Y), tx)
    assert causes(report) == []
    assert report.facts.training.staleness == pytest.approx([1.0] * 4, rel=1e-3)


def test_a_moment_of_smaller_gradients_is_stale():
    tx = optax.chain(optax.scale(0.1), optax.adam(1e-3, b2=0.9999))
    state = tx.init(PARAMS)
    small = jax.tree.map(lambda p: jnp.full_like(p, 1e-4), PARAMS)
    for _ in range(20):
        _, state = tx.update(small, state, PARAMS)
    report = sg.diagnose(squared_error, PARAMS, (X, Y), tx, state)
    assert causes(report) == ["stale_moment"]


WARM = optax.warmup_cosine_decay_schedule(0.0, 1e-3, 10, 100)
FROZEN = {"a": "frozen", "b": "trained", "c": "trained", "out": "trained"}


def frozen(tx):
    return optax.multi_transform({"trained": tx, "frozen": optax.set_to_zero()}, FROZEN)


@pytest.mark.parametrize(
    "make",
    [
        lambda eps: optax.adam(1e-3, eps=eps),
        lambda eps: optax.adam(WARM, eps=eps),
        lambda eps: frozen(optax.adam(1e-3, eps=eps)),
        lambda eps: optax.chain(optax.clip(1.0), optax.adam(1e-3, eps=eps)),
    ],
    ids=["constant", "warm-up from zero", "first leaf frozen", "clipped"],
)
def test_an_epsilon_that_is_too_large_is_read_off_every_rate(make):
    large = sg.diagnose(squared_error, PARAMS, (X, Y), make(1.0))
    assert causes(large) == ["epsilon"]
    training = large.facts.training
    read = (training.epsilon, training.b1, training.b2)
    assert read == pytest.approx((1.0, 0.9, 0.999), rel=1e-2)
    usual = sg.diagnose(squared_error, PARAMS, (X, Y), make(1e-8))
    assert causes(usual) == []
    assert usual.facts.training.epsilon == pytest.approx(1e-8, rel=0.1)


def test_plain_sgd_has_no_epsilon():
    report = sg.diagnose(squared_error, PARAMS, (X, Y), optax.sgd(1e-2))
    assert jnp.isnan(report.facts.training.epsilon)


def test_parts_of_a_batch_without_valid_examples_do_not_blame_the_rate():
    def masked(p, batch):
        errors = (network(p, batch["x"]) - batch["y"])[:, 0] ** 2
        return jnp.sum(batch["mask"] * errors) / jnp.sum(batch["mask"])

    batch = {"x": X, "y": Y, "mask": (jnp.arange(64) < 40).astype(jnp.float32)}
    report = sg.diagnose(masked, PARAMS, batch, optax.adam(1e-3), steps=10)
    assert causes(report) == [] and report.facts.training.calm_scale == 1


def test_noise_that_enters_the_network_is_no_label():
    def denoise(p, batch):
        x, noise = batch
        return jnp.mean((network(p, x + noise) - noise[:, :1]) ** 2)

    noise = jax.random.normal(KEYS[5], X.shape)
    report = sg.diagnose(denoise, PARAMS, (X, noise), optax.adam(3e-3), steps=20)
    assert causes(report) == [] and jnp.isnan(report.facts.training.labels_seen)


@pytest.mark.parametrize("labels_first", [False, True])
def test_labels_that_are_shuffled_are_found_at_either_place(labels_first):
    scores = {**PARAMS, "out": HE(KEYS[4], (32, 4))}
    classes = jax.random.permutation(KEYS[6], jnp.argmax(X[:, :4], axis=1))

    def loss(p, batch):
        y, x = batch if labels_first else batch[::-1]
        logits = network(p, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    batch = (classes, X) if labels_first else (X, classes)
    report = sg.diagnose(loss, scores, batch, optax.adam(1e-2), steps=40)
    assert causes(report) == ["labels"]
