"""Networks that people train as they are: a diagnosis of them raises no alarm."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn, nnx

import stablegrad as sg

KEYS = jax.random.split(jax.random.key(0), 20)
X = jax.random.normal(KEYS[0], (32, 16))
Y = X[:, :1]
CONDITION = jax.random.normal(KEYS[1], (32, 4))


def dense(i, fan_in, fan_out, gain=1.0):
    return gain * jax.random.normal(KEYS[i], (fan_in, fan_out)) / fan_in**0.5


def trunk(**more):
    return {
        "w": dense(2, 16, 32, 1.4),
        "w2": dense(3, 32, 32, 1.4),
        "w3": dense(4, 32, 32, 1.4),
        "out": dense(5, 32, 1),
        **more,
    }


def after(p, h):
    return jax.nn.relu(jax.nn.relu(h @ p["w2"]) @ p["w3"])


def squares(p, h, batch):
    return jnp.mean((h @ p["out"] - batch[1]) ** 2)


def temperature():
    params = {
        "image": dense(2, 16, 32),
        "image2": dense(3, 32, 8),
        "text": dense(4, 16, 32),
        "text2": dense(5, 32, 8),
        "scale": jnp.float32(1 / 0.07),
    }

    def loss(p, batch):
        def unit(name):
            h = jax.nn.gelu(batch[0] @ p[name]) @ p[f"{name}2"]
            return h / jnp.linalg.norm(h, axis=-1, keepdims=True)

        logits = p["scale"] * unit("image") @ unit("text").T
        labels = jnp.arange(len(batch[0]))
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return loss, params


def low_rank_adapters():
    params = trunk(
        a=dense(6, 16, 4),
        b=jnp.zeros((4, 32)),
        a2=dense(7, 32, 4),
        b2=jnp.zeros((4, 32)),
    )

    def loss(p, batch):
        h = jnp.tanh(batch[0] @ p["a"] @ p["b"] + batch[0] @ p["w"])
        h = jnp.tanh(h @ p["a2"] @ p["b2"] + h @ p["w2"])
        return squares(p, jnp.tanh(h @ p["w3"]), batch)

    return loss, params


def modulation_of_zeros():
    params = trunk(scale=jnp.zeros((4, 32)), shift=jnp.zeros((4, 32)))

    def loss(p, batch):
        h = jax.nn.relu(batch[0] @ p["w"]) * (1 + batch[2] @ p["scale"])
        return squares(p, after(p, h + batch[2] @ p["shift"]), batch)

    return loss, params


def control_of_zeros():
    params = trunk(control=dense(6, 4, 32, 1.4), zero=jnp.zeros((32, 32)))

    def loss(p, batch):
        control = jax.nn.relu(batch[2] @ p["control"]) @ p["zero"]
        return squares(p, after(p, jax.nn.relu(batch[0] @ p["w"]) + control), batch)

    return loss, params


def small_heads():
    params = trunk(
        policy=dense(6, 32, 4, 0.01), aux=dense(7, 32, 3), aux2=dense(8, 3, 1)
    )

    def loss(p, batch):
        h = after(p, jax.nn.relu(batch[0] @ p["w"]))
        policy = jax.nn.log_softmax(h @ p["policy"])[:, 0].mean()
        aux = jnp.mean((h @ p["aux"] @ p["aux2"] - batch[1]) ** 2)
        return squares(p, h, batch) - policy + 1e-3 * aux

    return loss, params


def one_hot_tokens():
    params = {
        "embed": jax.random.normal(KEYS[2], (16, 16)),
        "h": dense(3, 16, 16),
        "h2": dense(4, 16, 16),
        "out": dense(5, 16, 1),
    }

    def loss(p, batch):
        tokens = jnp.argmax(batch[0], axis=-1)
        h = jnp.tanh(jax.nn.one_hot(tokens, 16) @ p["embed"] @ p["h"])
        return squares(p, jnp.tanh(h @ p["h2"]), batch)

    return loss, params


def batch_norm_and_relu6():
    def loss(p, batch):
        h = batch[0] @ p["w"]
        h = jax.nn.standardize(h, axis=0) * p["norm"][None]
        return squares(p, jax.nn.relu6(jax.nn.relu6(h) @ p["w2"]), batch)

    return loss, trunk(norm=jnp.ones(32))


def derivative_in_the_loss():
    sizes = (1, 32, 32, 32, 1)
    layers = [dense(2 + i, *pair) for i, pair in enumerate(itertools.pairwise(sizes))]

    def loss(p, batch):
        def u(t):
            h = t[None]
            for w in p[:-1]:
                h = jnp.tanh(h @ w)
            return (h @ p[-1])[0]

        residual = jax.vmap(lambda t: jax.grad(jax.grad(u))(t) + u(t))(batch[0][:, 0])
        return jnp.mean(residual**2) + (u(jnp.float32(0)) - 1) ** 2

    return loss, layers


def squeeze_and_excite():
    params = trunk(squeeze=dense(6, 32, 8), excite=dense(7, 8, 32))

    def loss(p, batch):
        h = jax.nn.relu(batch[0] @ p["w"])
        pooled = jax.nn.relu(jnp.mean(h, axis=0, keepdims=True) + 0.01 * h)
        gate = jax.nn.sigmoid(jax.nn.relu(pooled @ p["squeeze"]) @ p["excite"])
        return squares(p, after(p, h * gate), batch)

    return loss, params


def additive_mask():
    params = {name: dense(2 + i, 16, 16) for i, name in enumerate("qkvo")}
    bias = -1e4 * (1 - jnp.tril(jnp.ones((1, 8, 8))))

    def loss(p, batch):
        h = batch[0].reshape(4, 8, 16)
        q, k, v = (h @ p[name] for name in "qkv")
        weights = jax.nn.softmax(jnp.einsum("btd,bsd->bts", q, k) / 4.0 + bias)
        return jnp.mean((h + weights @ v @ p["o"] - 1) ** 2)

    return loss, params


def probe_of_a_stopped_trunk():
    params = trunk(probe=dense(6, 32, 32, 1.4))

    def loss(p, batch):
        h = jax.lax.stop_gradient(after(p, jax.nn.relu(batch[0] @ p["w"])))
        return squares(p, jax.nn.relu(h @ p["probe"]), batch)

    return loss, params


def diagonal_state_space():
    params = {
        "in": dense(2, 16, 32),
        "A_log": jnp.log(jnp.arange(1.0, 17)),
        "dt": dense(3, 32, 1),
        "B": dense(4, 32, 16),
        "out": dense(5, 16, 1),
    }

    def loss(p, batch):
        u = jax.nn.silu(batch[0] @ p["in"])
        kept = jnp.exp(jax.nn.softplus(u @ p["dt"]) * -jnp.exp(p["A_log"])[None])
        return squares(p, (1 - kept) * (u @ p["B"]), batch)

    return loss, params


def pooling_over_positions():
    params = {
        "in": dense(2, 1, 32, 1.4),
        "score": dense(3, 32, 4),
        "out": dense(4, 128, 1),
    }

    def loss(p, batch):
        h = jax.nn.gelu(batch[0].reshape(32, 16, 1) @ p["in"])
        weights = jax.nn.softmax(h @ p["score"], axis=1)
        pooled = jnp.einsum("bth,btd->bhd", weights, h).reshape(32, -1)
        return squares(p, pooled, batch)

    return loss, params


def dice():
    params = trunk(out=dense(5, 32, 4, 3.0))
    one_hot = jax.nn.one_hot(jnp.zeros(32, int).at[0].set(1), 4)

    def loss(p, batch):
        h = after(p, jax.nn.relu(batch[0] @ p["w"]))
        p_class = jax.nn.softmax(h @ p["out"] + jnp.array([[9.0, 0, 0, 0]]))
        both = jnp.sum(p_class * (one_hot + 0 * batch[1]), axis=0)
        return 1 - jnp.mean(2 * both / (1 + jnp.sum(p_class + one_hot, axis=0)))

    return loss, params


def sampling_offsets_of_zeros():
    params = trunk(locate=dense(6, 16, 16, 1.4), offset=jnp.zeros((16, 16)))

    def loss(p, batch):
        x = batch[0]
        offset = jax.nn.relu(x @ p["locate"]) @ p["offset"]
        at = jnp.clip(jnp.arange(16.0)[None] + offset, 0, 14.99)
        low = jnp.floor(at).astype(int)
        part = at - low
        take = lambda i: jnp.take_along_axis(x, i, axis=1)
        h = take(low) * (1 - part) + take(low + 1) * part
        return squares(p, after(p, jax.nn.relu(h @ p["w"])), batch)

    return loss, params


def tied_embedding():
    params = {"embedding": jax.random.normal(KEYS[2], (50, 64))}
    params |= {f"w{i}": dense(3 + i, 64, 64) for i in range(3)}

    def loss(p, batch):
        tokens = jnp.argsort(batch[0], axis=1) % 50
        h = p["embedding"][tokens]
        for i in range(3):
            unit = h / jnp.sqrt(jnp.mean(h**2, axis=-1, keepdims=True) + 1e-6)
            h = h + jax.nn.gelu(unit @ p[f"w{i}"])
        unit = h / jnp.sqrt(jnp.mean(h**2, axis=-1, keepdims=True) + 1e-6)
        logits = unit * 64**-0.5 @ p["embedding"].T
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens).mean()

    return loss, params


def two_streams():
    names = [f"{side}{i}" for side in ("encode", "decode") for i in range(3)]
    params = {name: dense(2 + i, 16, 16) for i, name in enumerate(names)}
    params |= {"cross": dense(9, 16, 16), "out": dense(10, 16, 1)}

    def loss(p, batch):
        streams = [0.1 * batch[0], 0.1 * batch[0][::-1]]
        for side, h in zip(("encode", "decode"), streams, strict=True):
            for i in range(3):
                unit = h / jnp.sqrt(jnp.mean(h**2, axis=-1, keepdims=True) + 1e-6)
                h = h + jnp.tanh(1.5 * unit @ p[f"{side}{i}"])
            streams[side == "decode"] = h
        return squares(p, streams[1] + streams[0] @ p["cross"], batch)

    return loss, params


NETWORKS = (
    temperature,
    probe_of_a_stopped_trunk,
    diagonal_state_space,
    pooling_over_positions,
    dice,
    sampling_offsets_of_zeros,
    tied_embedding,
    two_streams,
    low_rank_adapters,
    modulation_of_zeros,
    control_of_zeros,
    small_heads,
    one_hot_tokens,
    batch_norm_and_relu6,
    derivative_in_the_loss,
    squeeze_and_excite,
    additive_mask,
)


@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS, ids=lambda one: one.__name__)
def test_no_alarm_is_raised_on(network):
    loss, params = network()
    report = sg.diagnose(loss, params, (X, Y, CONDITION))
    assert report.causes == (), report


@pytest.mark.slow
@pytest.mark.parametrize("radius", [0.7, 1.6])
def test_a_recurrence_is_judged_in_the_order_of_its_scan(radius):
    xs = jax.random.normal(KEYS[11], (40, 16, 8))
    orthogonal = jax.nn.initializers.orthogonal(radius)(KEYS[12], (32, 32))
    params = {"in": dense(2, 8, 32), "hidden": orthogonal, "out": dense(3, 32, 1)}

    def loss(p, batch):
        step = lambda h, x: (x @ p["in"] + h @ p["hidden"], None)
        h, _ = jax.lax.scan(step, jnp.zeros((16, 32)), batch, reverse=True)
        return jnp.mean((h @ p["out"]) ** 2)

    causes = sg.diagnose(loss, params, xs).causes
    expected = [("through_time", "hidden")] if radius > 1 else []
    assert [(v.rule, v.layer) for v in causes] == expected


@pytest.mark.slow
def test_no_alarm_is_raised_on_low_rank_adapters_of_nnx():
    class Tuned(nnx.Module):
        def __init__(self, rngs):
            base = lambda fan_in: nnx.Linear(fan_in, 32, rngs=rngs)
            self.a = nnx.LoRA(16, 4, 32, base_module=base(16), rngs=rngs)
            self.b = nnx.LoRA(32, 4, 32, base_module=base(32), rngs=rngs)
            self.c = nnx.Linear(32, 1, rngs=rngs)

        def __call__(self, x):
            return self.c(nnx.relu(self.b(nnx.relu(self.a(x)))))

    loss = lambda model, batch: jnp.mean((model(batch[0]) - batch[1]) ** 2)
    assert sg.diagnose(loss, Tuned(nnx.Rngs(0)), (X, Y)).causes == ()


@pytest.mark.slow
def test_layers_behind_a_dead_one_are_no_causes_of_their_own():
    loss = lambda p, batch: squares(
        p, after(p, jax.nn.relu(batch[0] @ p["w"] - p["bias"][None])), batch
    )
    report = sg.diagnose(loss, trunk(bias=jnp.full(32, 50.0)), (X, Y))
    assert [(v.rule, v.layer) for v in report.causes] == [("dead_units", "w")], report


@pytest.mark.slow
def test_a_relu6_beyond_its_usual_flat_half_is_saturated():
    loss, params = batch_norm_and_relu6()
    shifted = lambda p, batch: loss({**p, "w2": p["w2"] - 1.0}, batch)
    found = sg.diagnose(shifted, params, (X, Y, CONDITION)).verdicts
    assert ("saturated", "w2") in [(v.rule, v.layer) for v in found]


@pytest.mark.slow
def test_a_layer_of_zeros_that_cuts_the_network_is_named():
    params = trunk()
    params["w3"] = jnp.zeros((32, 32))
    loss = lambda p, batch: squares(p, after(p, jnp.tanh(batch[0] @ p["w"])), batch)
    (cause,) = sg.diagnose(loss, params, (X, Y)).causes
    assert (cause.rule, cause.layer) == ("weights_small", "w3")
    std = cause.change["initialise"]["w3"]
    assert std == pytest.approx(np.sqrt(2 / 32), rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
def test_sharp_attention_of_linen_is_found_in(dtype):
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.LayerNorm(dtype=dtype)(x)
            x = x + nn.MultiHeadDotProductAttention(4, dtype=dtype)(h)
            return nn.Dense(1, dtype=dtype)(x)

    x = X.reshape(4, 8, 16)
    params = Block().init(jax.random.key(0), x)
    attention = params["params"]["MultiHeadDotProductAttention_0"]
    for name in ("query", "key"):
        attention[name]["kernel"] *= 12
    loss = lambda p, x: jnp.mean((Block().apply(p, x).astype(jnp.float32) - 1) ** 2)
    (cause,) = sg.diagnose(loss, params, x).causes
    assert cause.rule == "attention"
    leaf = "params.MultiHeadDotProductAttention_0.query.kernel"
    assert leaf in cause.change["multiply"]


@pytest.mark.slow
def test_attention_is_found_behind_a_mask_that_the_batch_holds():
    params = {name: dense(2 + i, 16, 16, 5.0) for i, name in enumerate("qk")}
    params |= {"v": dense(4, 16, 16), "o": dense(5, 16, 16)}
    padding = jnp.arange(8)[None] < jnp.array([8, 6, 5, 4])[:, None]

    def loss(p, batch):
        h, padding = batch
        q, k, v = (h @ p[name] for name in "qkv")
        bias = jnp.where(padding, 0.0, -1e9)[:, None]
        weights = jax.nn.softmax(jnp.einsum("btd,bsd->bts", q, k) / 4.0 + bias)
        return jnp.mean((h + weights @ v @ p["o"] - 1) ** 2)

    h = X.reshape(4, 8, 16)
    report = sg.diagnose(loss, params, (h, padding))
    (layer,) = (layer for layer in report.layers if layer.kind == "attention")
    logits = np.einsum("btd,bsd->bts", h @ params["q"], h @ params["k"]) / 4.0
    seen = np.broadcast_to(np.asarray(padding)[:, None], logits.shape)
    assert layer.logit == pytest.approx(np.abs(logits[seen]).max(), rel=1e-4)
    assert report.causes[0].rule == "attention"
