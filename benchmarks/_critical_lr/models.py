"""Three small networks in plain JAX: `init(key)` and `apply(params, inputs, act)`."""

import itertools
import math

import jax
import jax.numpy as jnp

ACTIVATIONS = {"ReLU": jax.nn.relu, "tanh": jnp.tanh, "GELU": jax.nn.gelu}
CLASSES = 10
CONTEXT, WIDTH, HEADS, LAYERS = 32, 32, 2, 2


def _dense(key, *shape):
    """He's initialisation; the last axis is the output."""
    return jax.random.normal(key, shape) * math.sqrt(2 / math.prod(shape[:-1]))


def mlp(key):
    """64 pixels, two hidden layers of 64, ten classes."""
    sizes = (64, 64, 64, CLASSES)
    pairs = list(itertools.pairwise(sizes))
    return [
        {"w": _dense(k, m, n), "b": jnp.zeros(n)}
        for k, (m, n) in zip(jax.random.split(key, len(pairs)), pairs, strict=True)
    ]


def apply_mlp(params, images, act):
    """Logits of flat images."""
    hidden = images
    for layer in params[:-1]:
        hidden = act(hidden @ layer["w"] + layer["b"][None])
    return hidden @ params[-1]["w"] + params[-1]["b"][None]


def cnn(key):
    """Two convolutions of 8 and 16 channels, the second with stride 2, and a layer."""
    one, two, three = jax.random.split(key, 3)
    return {
        "first": _dense(one, 3, 3, 1, 8),
        "second": _dense(two, 3, 3, 8, 16),
        "out": _dense(three, 4 * 4 * 16, CLASSES),
        "b": jnp.zeros(CLASSES),
    }


def _convolve(images, kernel, stride: int):
    """A 3 by 3 convolution as one product, which stays fast under `vmap`."""
    size = images.shape[1]
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifts = [
        padded[:, i : i + size : stride, j : j + size : stride]
        for i in range(3)
        for j in range(3)
    ]
    return jnp.concatenate(shifts, -1) @ kernel.reshape(-1, kernel.shape[-1])


def apply_cnn(params, images, act):
    """Logits of flat images."""
    hidden = images.reshape(-1, 8, 8, 1)
    hidden = act(_convolve(hidden, params["first"], 1))
    hidden = act(_convolve(hidden, params["second"], 2))
    return hidden.reshape(len(hidden), -1) @ params["out"] + params["b"][None]


def transformer(key, symbols: int):
    """Two layers of width 32 with two heads, normalised before each block."""
    embed, place, out, *keys = jax.random.split(key, 3 + 4 * LAYERS)
    spread = 1 / math.sqrt(WIDTH)
    layers = [
        {
            "qkv": _dense(keys[4 * i], WIDTH, 3 * WIDTH) * math.sqrt(0.5),
            "mix": _dense(keys[4 * i + 1], WIDTH, WIDTH) * math.sqrt(0.5),
            "up": _dense(keys[4 * i + 2], WIDTH, 4 * WIDTH),
            "down": _dense(keys[4 * i + 3], 4 * WIDTH, WIDTH) * math.sqrt(0.5),
            "gain": jnp.ones((2, WIDTH)),
        }
        for i in range(LAYERS)
    ]
    return {
        "embed": jax.random.normal(embed, (symbols, WIDTH)),
        "place": jax.random.normal(place, (CONTEXT, WIDTH)) * 0.1,
        "layers": layers,
        "gain": jnp.ones(WIDTH),
        "out": jax.random.normal(out, (WIDTH, symbols)) * spread,
    }


def _normalised(x, gain):
    x = x - jnp.mean(x, -1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-5) * gain


def _attention(x, layer):
    batch, length, _ = x.shape
    heads = (x @ layer["qkv"]).reshape(batch, length, 3, HEADS, -1)
    q, k, v = heads[:, :, 0], heads[:, :, 1], heads[:, :, 2]
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    future = jnp.triu(jnp.ones((length, length), bool), 1)
    weights = jax.nn.softmax(jnp.where(future, -1e9, scores))
    mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
    return mixed.reshape(x.shape) @ layer["mix"]


def apply_transformer(params, symbols, act):
    """Logits of the next symbol at each place."""
    x = params["embed"][symbols] + params["place"]
    for layer in params["layers"]:
        x = x + _attention(_normalised(x, layer["gain"][0]), layer)
        hidden = act(_normalised(x, layer["gain"][1]) @ layer["up"])
        x = x + hidden @ layer["down"]
    return _normalised(x, params["gain"]) @ params["out"]
