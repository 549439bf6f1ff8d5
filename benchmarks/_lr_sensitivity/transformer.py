"""A character transformer in plain JAX: pre-norm, learned positions, no dropout.

Initialised as Flax does by default: embeddings and kernels of variance 1 / fan-in.
"""

import jax
import jax.numpy as jnp

LAYERS, WIDTH, HEADS, CONTEXT = 2, 64, 4, 64


def init(
    key,
    characters: int,
    layers: int = LAYERS,
    width: int = WIDTH,
    context: int = CONTEXT,
):
    """Parameters, of which LayerNorm scales start at one."""
    keys = iter(jax.random.split(key, 3 + 4 * layers))
    lecun = jax.nn.initializers.lecun_normal()
    embed = jax.nn.initializers.normal(width**-0.5)

    def kernel(*shape):
        return lecun(next(keys), shape)

    return {
        "characters": embed(next(keys), (characters, width)),
        "positions": embed(next(keys), (context, width)),
        "layers": [
            {
                "norm": jnp.ones((2, width)),
                "queries_keys_values": kernel(width, 3 * width),
                "out": kernel(width, width),
                "up": kernel(width, 4 * width),
                "down": kernel(4 * width, width),
            }
            for _ in range(layers)
        ],
        "norm": jnp.ones(width),
        "head": kernel(width, characters),
    }


def _normalised(x, scale):
    x = x - x.mean(-1, keepdims=True)
    return scale * x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)


def _attended(x, layer):
    batch, length, width = x.shape
    projected = x @ layer["queries_keys_values"]
    shape = (batch, length, 3, HEADS, width // HEADS)
    queries, keys, values = jnp.moveaxis(projected.reshape(shape), 2, 0)
    scores = jnp.einsum("bthd,bshd->bhts", queries, keys) * (width // HEADS) ** -0.5
    past = jnp.tril(jnp.ones((length, length), bool))
    weights = jax.nn.softmax(jnp.where(past, scores, -1e30), axis=-1)
    mixed = jnp.einsum("bhts,bshd->bthd", weights, values)
    return mixed.reshape(batch, length, width) @ layer["out"]


def logits(params, text):
    """Scores of the next character, (batch, length, characters)."""
    x = params["characters"][text] + params["positions"][: text.shape[1]]
    for layer in params["layers"]:
        x = x + _attended(_normalised(x, layer["norm"][0]), layer)
        hidden = jax.nn.gelu(_normalised(x, layer["norm"][1]) @ layer["up"])
        x = x + hidden @ layer["down"]
    return _normalised(x, params["norm"]) @ params["head"]
