"""Eight small architectures in Flax NNX, Flax Linen, Equinox and plain JAX.

Every builder takes `Options`, so that a fault in the structure can be planted and its
remedy applied, and returns `(loss_fn, model)` for a batch `(inputs, labels)`.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn, nnx

CLASSES, WIDTH, CONTEXT = 10, 48, 32
ALPHABET = 96


@dataclasses.dataclass(frozen=True)
class Options:
    """What can be wrong with, or right about, the structure."""

    depth: int = 8
    activation: str = "relu"
    norm: bool = False  # Before the activations of plain networks.
    branches: tuple[float, ...] = ()  # Factors on residual branches; 1 where short.
    half: int = -1  # The layer that computes in float16.
    half_scale: float = 1.0  # Factor inside that layer, taken out again after it.
    centred: bool = True  # Whether normalisations exist where the design has them.

    def branch(self, i: int) -> float:
        """The factor on the i-th residual branch."""
        return self.branches[i] if i < len(self.branches) else 1.0


FUNCTIONS = {
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "gelu": jax.nn.gelu,
    "linear": lambda x: x,
}
GAINS = {"relu": 2**0.5, "tanh": 1.3, "sigmoid": 1.0, "gelu": 1.5, "linear": 1.0}


def cross_entropy(logits, labels):
    """Mean over everything."""
    losses = optax.softmax_cross_entropy_with_integer_labels
    return losses(logits.astype(jnp.float32), labels).mean()


def _halved(x, w, options: Options, i: int):
    """X @ w; in float16, where asked, times a factor that is taken out again."""
    if i != options.half:
        return x @ w
    scaled = (x * options.half_scale).astype(jnp.float16) @ w.astype(jnp.float16)
    return scaled.astype(jnp.float32) / options.half_scale


def _normalised(x, options: Options):
    return jax.nn.standardize(x, axis=-1) if options.norm else x


def mlp_tanh(key, options: Options):
    """Plain JAX: a list of dicts."""
    sizes = [64, *[WIDTH] * options.depth]
    gain = GAINS[options.activation]
    keys = jax.random.split(key, options.depth + 1)
    normal = lambda i, a, b, g: g * jax.random.normal(keys[i], (a, b)) / math.sqrt(a)
    layers = [
        {"w": normal(i, a, b, gain), "b": jnp.zeros(b)}
        for i, (a, b) in enumerate(itertools.pairwise(sizes))
    ]
    head = {"w": normal(-1, WIDTH, CLASSES, 1.0), "b": jnp.zeros(CLASSES)}

    def loss_fn(params, batch):
        x, labels = batch
        for i, layer in enumerate(params["layers"]):
            z = _halved(x, layer["w"], options, i) + layer["b"]
            x = FUNCTIONS[options.activation](_normalised(z, options))
        return cross_entropy(x @ params["head"]["w"] + params["head"]["b"], labels)

    return loss_fn, {"layers": layers, "head": head}


class _EquinoxMLP(eqx.Module):
    layers: list
    head: eqx.nn.Linear
    options: Options = eqx.field(static=True)

    def __init__(self, key, options: Options):
        keys = jax.random.split(key, options.depth + 1)
        sizes = [64, *[WIDTH] * options.depth]
        self.layers = [
            _he(eqx.nn.Linear(a, b, key=k), k, GAINS[options.activation])
            for a, b, k in zip(sizes, sizes[1:], keys, strict=False)
        ]
        self.head = eqx.nn.Linear(WIDTH, CLASSES, key=keys[-1])
        self.options = options

    def __call__(self, x):
        for layer in self.layers:
            z = _normalised(layer(x), self.options)
            x = FUNCTIONS[self.options.activation](z)
        return self.head(x)


def _he(linear, key, gain):
    shape = linear.weight.shape
    weight = gain * jax.random.normal(key, shape) / math.sqrt(shape[1])
    where = lambda one: (one.weight, one.bias)
    return eqx.tree_at(where, linear, (weight, jnp.zeros(shape[0])))


def mlp_relu(key, options: Options):
    """Equinox, under `jax.vmap`."""

    def loss_fn(model, batch):
        return cross_entropy(jax.vmap(model)(batch[0]), batch[1])

    return loss_fn, _EquinoxMLP(key, options)


class _ConvNet(nn.Module):
    options: Options

    @nn.compact
    def __call__(self, x):
        x = x.reshape(-1, 8, 8, 1)
        for i in range(4):
            half = i == self.options.half
            scale = self.options.half_scale if half else 1.0
            dtype = jnp.float16 if half else jnp.float32
            init = nn.initializers.he_normal()
            x = nn.Conv(16, (3, 3), kernel_init=init, dtype=dtype)(scale * x)
            x = x.astype(jnp.float32) / scale
            if self.options.norm:
                x = nn.LayerNorm()(x)
            x = nn.relu(x)
            if i == 1:
                x = nn.max_pool(x, (2, 2), (2, 2))
        return nn.Dense(CLASSES)(x.reshape(x.shape[0], -1))


def conv_net(key, options: Options):
    """Flax Linen."""
    model = _ConvNet(options)
    variables = model.init(key, jnp.zeros((1, 64)))

    def loss_fn(params, batch):
        return cross_entropy(model.apply(params, batch[0]), batch[1])

    return loss_fn, variables


class _ResBlock(nnx.Module):
    def __init__(self, width, rngs):
        conv = functools.partial(nnx.Conv, width, width, (3, 3), use_bias=False)
        self.conv1, self.conv2 = conv(rngs=rngs), conv(rngs=rngs)
        self.bn1, self.bn2 = (
            nnx.BatchNorm(width, rngs=rngs),
            nnx.BatchNorm(width, rngs=rngs),
        )

    def __call__(self, x, scale):
        h = nnx.relu(self.bn1(self.conv1(x)))
        return nnx.relu(x + scale * self.bn2(self.conv2(h)))


class _ResNet(nnx.Module):
    def __init__(self, rngs, options: Options):
        self.stem = nnx.Conv(1, 16, (3, 3), rngs=rngs)
        self.bn = nnx.BatchNorm(16, rngs=rngs)
        self.blocks = nnx.List([_ResBlock(16, rngs) for _ in range(4)])
        self.head = nnx.Linear(16, CLASSES, rngs=rngs)
        self.options = options

    def __call__(self, x):
        x = nnx.relu(self.bn(self.stem(x.reshape(-1, 8, 8, 1))))
        for i, block in enumerate(self.blocks):
            x = block(x, self.options.branch(i))
            if i == 1:
                x = nnx.max_pool(x, (2, 2), (2, 2))
        return self.head(x.mean(axis=(1, 2)))


def _of_module(model, batch):
    return cross_entropy(model(batch[0]), batch[1])


def resnet(key, options: Options):
    """Flax NNX, with BatchNorm."""
    return _of_module, _ResNet(nnx.Rngs(params=key), options)


class _Block(nnx.Module):
    def __init__(self, width, rngs):
        self.norm1, self.norm2 = (
            nnx.LayerNorm(width, rngs=rngs),
            nnx.LayerNorm(width, rngs=rngs),
        )
        self.attn = nnx.MultiHeadAttention(
            4, width, decode=False, use_bias=False, rngs=rngs
        )
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x, options: Options, i):
        norm = lambda layer, y: layer(y) if options.centred else y
        mask = nnx.make_causal_mask(jnp.ones(x.shape[:2]))
        x = x + options.branch(2 * i) * self.attn(norm(self.norm1, x), mask=mask)
        h = nnx.gelu(self.up(norm(self.norm2, x)))
        return x + options.branch(2 * i + 1) * self.down(h)


class _GPT(nnx.Module):
    def __init__(self, rngs, options: Options):
        self.embed = nnx.Embed(ALPHABET, WIDTH, rngs=rngs)
        self.position = nnx.Param(
            0.02 * jax.random.normal(rngs.params(), (CONTEXT, WIDTH))
        )
        self.blocks = nnx.List([_Block(WIDTH, rngs) for _ in range(3)])
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, ALPHABET, use_bias=False, rngs=rngs)
        self.options = options

    def __call__(self, tokens):
        x = self.embed(tokens) + self.position[...]
        for i, block in enumerate(self.blocks):
            x = block(x, self.options, i)
        return self.head(self.norm(x) if self.options.centred else x)


def gpt(key, options: Options):
    """Flax NNX: a pre-norm transformer on characters."""
    return _of_module, _GPT(nnx.Rngs(params=key), options)


class _PostBlock(nn.Module):
    options: Options
    i: int

    @nn.compact
    def __call__(self, x):
        options = self.options
        norm = nn.LayerNorm if options.centred else (lambda name: lambda y: y)
        mask = nn.make_causal_mask(jnp.ones(x.shape[:2]))
        h = nn.MultiHeadDotProductAttention(4, name="attn")(x, x, mask=mask)
        x = norm(name="norm1")(x + options.branch(2 * self.i) * h)
        half = self.i == options.half
        scale = options.half_scale if half else 1.0
        dtype = jnp.float16 if half else jnp.float32
        h = nn.Dense(4 * WIDTH, name="up", dtype=dtype)(scale * x)
        h = nn.gelu(h.astype(jnp.float32) / scale)
        h = nn.Dense(WIDTH, name="down")(h)
        return norm(name="norm2")(x + options.branch(2 * self.i + 1) * h)


class _PostNorm(nn.Module):
    options: Options

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(
            ALPHABET, WIDTH, name="embed", embedding_init=nn.initializers.normal(0.5)
        )(tokens)
        for i in range(3):
            x = _PostBlock(self.options, i, name=f"block{i}")(x)
        return nn.Dense(ALPHABET, name="head")(x)


def post_norm(key, options: Options):
    """Flax Linen: a post-norm transformer on characters."""
    model = _PostNorm(options)
    variables = model.init(key, jnp.zeros((1, CONTEXT), jnp.int32))

    def loss_fn(variables, batch):
        return cross_entropy(model.apply(variables, batch[0]), batch[1])

    return loss_fn, variables


def rnn(key, options: Options):
    """Plain JAX: an Elman network over 32 pairs of pixels, under `jax.lax.scan`."""
    keys = jax.random.split(key, 3)
    orthogonal = jax.nn.initializers.orthogonal()(keys[1], (WIDTH, WIDTH))
    params = {
        "inputs": jax.random.normal(keys[0], (2, WIDTH)) / math.sqrt(2),
        "recurrent": orthogonal,
        "bias": jnp.zeros(WIDTH),
        "head": jax.random.normal(keys[2], (WIDTH, CLASSES)) / math.sqrt(WIDTH),
    }

    def loss_fn(params, batch):
        images, labels = batch
        pairs = images.reshape(-1, 32, 2).swapaxes(0, 1)

        def cell(hidden, x):
            z = x @ params["inputs"] + hidden @ params["recurrent"] + params["bias"]
            return FUNCTIONS[options.activation](z), None

        start = jnp.zeros((images.shape[0], WIDTH))
        hidden, _ = jax.lax.scan(cell, start, pairs)
        return cross_entropy(hidden @ params["head"], labels)

    return loss_fn, params


class _Expert(eqx.Module):
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __call__(self, x):
        return self.down(jax.nn.relu(self.up(x)))


class _Mixture(eqx.Module):
    stem: eqx.nn.Linear
    routers: list
    experts: list
    head: eqx.nn.Linear
    options: Options = eqx.field(static=True)

    def __init__(self, key, options: Options):
        keys = iter(jax.random.split(key, 64))
        linear = lambda a, b, gain: _he(
            eqx.nn.Linear(a, b, key=next(keys)), next(keys), gain
        )
        self.stem = linear(64, WIDTH, 1.0)
        self.routers = [linear(WIDTH, 4, 0.3) for _ in range(2)]
        self.experts = [
            [
                _Expert(linear(WIDTH, WIDTH, 2**0.5), linear(WIDTH, WIDTH, 1.0))
                for _ in range(4)
            ]
            for _ in range(2)
        ]
        self.head = linear(WIDTH, CLASSES, 1.0)
        self.options = options

    def __call__(self, x):
        x = self.stem(x)
        for i, (router, experts) in enumerate(
            zip(self.routers, self.experts, strict=True)
        ):
            share = jax.nn.softmax(router(x))
            given = jnp.stack([expert(x) for expert in experts])
            x = x + self.options.branch(i) * share @ given
        return self.head(x)


def mixture(key, options: Options):
    """Equinox: a soft mixture of four experts, twice."""

    def loss_fn(model, batch):
        return cross_entropy(jax.vmap(model)(batch[0]), batch[1])

    return loss_fn, _Mixture(key, options)


BUILDERS: dict[str, tuple[Callable, Options, str]] = {
    "mlp_tanh": (mlp_tanh, Options(activation="tanh"), "plain"),
    "mlp_relu": (mlp_relu, Options(depth=6), "Equinox"),
    "conv_net": (conv_net, Options(), "Linen"),
    "resnet": (resnet, Options(), "NNX"),
    "gpt": (gpt, Options(), "NNX"),
    "post_norm": (post_norm, Options(), "Linen"),
    "rnn": (rnn, Options(activation="tanh"), "plain"),
    "mixture": (mixture, Options(), "Equinox"),
}
TEXT = ("gpt", "post_norm")  # Those that read characters.


@functools.cache
def build(name: str, seed: int, options: Options) -> tuple[Callable, Any]:
    """Make loss and model; the loss is one object for all seeds of the same options."""
    builder, _, _ = BUILDERS[name]
    loss_fn, model = builder(jax.random.key(seed), options)
    return _loss_of(name, options, loss_fn), model


@functools.cache
def scaled(loss_fn: Callable, factor: float) -> Callable:
    """Return the loss times a factor."""
    return lambda model, batch: factor * loss_fn(model, batch)


_losses: dict[Any, Callable] = {}


def _loss_of(name, options, loss_fn):
    return _losses.setdefault((name, options), loss_fn)


def edited(model, changes: dict[str, Callable[[np.ndarray], Any]]):
    """Return a copy of a model with some leaves changed, by dotted name.

    Linen's collection, "params", may be left out.
    """
    if isinstance(model, nnx.Module):
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        return nnx.merge(graphdef, edited(params, changes), rest, copy=True)
    changes = {name.removeprefix("params."): f for name, f in changes.items()}
    used = set()

    def change(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        name = name.removeprefix("params.").removesuffix(".value")
        if name in changes:
            used.add(name)
            return jnp.asarray(changes[name](np.asarray(leaf)), leaf.dtype)
        return leaf

    done = jax.tree_util.tree_map_with_path(change, model)
    if missing := set(changes) - used:
        raise KeyError(f"no leaf is called {missing}")
    return done
