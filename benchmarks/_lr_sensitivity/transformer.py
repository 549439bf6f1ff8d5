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
    deviation: float | None = None,
):
    """Parameters, of which LayerNorm scales start at one.

    With `deviation`, all others are normal as in GPT-2: those that write to the
    residual stream are smaller by sqrt(2 layers).
    """
    keys = iter(jax.random.split(key, 3 + 4 * layers))
    lecun = jax.nn.initializers.lecun_normal()
    embed = jax.nn.initializers.normal(deviation or width**-0.5)

    def kernel(*shape, residual=False):
        if deviation is None:
            return lecun(next(keys), shape)
        scale = deviation / (2 * layers) ** 0.5 if residual else deviation
        return scale * jax.random.normal(next(keys), shape)

    return {
        "characters": embed(next(keys), (characters, width)),
        "positions": embed(next(keys), (context, width)),
        "layers": [
            {
                "norm": jnp.ones((2, width)),
                "queries_keys_values": kernel(width, 3 * width),
                "out": kernel(width, width, residual=True),
                "up": kernel(width, 4 * width),
                "down": kernel(4 * width, width, residual=True),
            }
            for _ in range(layers)
        ],
        "norm": jnp.ones(width),
        "head": kernel(width, characters),
    }


def _normalised(x, scale):
    wide = x.astype(jnp.float32)
    wide = wide - wide.mean(-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + 1e-6)
    return scale * wide.astype(x.dtype)


def _attended(x, layer, heads):
    batch, length, width = x.shape
    projected = x @ layer["queries_keys_values"]
    shape = (batch, length, 3, heads, width // heads)
    queries, keys, values = jnp.moveaxis(projected.reshape(shape), 2, 0)
    mixed = jax.nn.dot_product_attention(queries, keys, values, is_causal=True)
    return mixed.reshape(batch, length, width) @ layer["out"]


def logits(params, text, heads: int = HEADS, dtype=jnp.float32):
    """Scores of the next character, (batch, length, characters), computed in dtype."""
    # Looked up before the cast: the gradient of this is slow in bfloat16 on a GPU.
    x = params["characters"][text] + params["positions"][: text.shape[1]]
    x, params = jax.tree.map(lambda array: array.astype(dtype), (x, params))
    for layer in params["layers"]:
        x = x + _attended(_normalised(x, layer["norm"][0]), layer, heads)
        hidden = jax.nn.gelu(_normalised(x, layer["norm"][1]) @ layer["up"])
        x = x + hidden @ layer["down"]
    return _normalised(x, params["norm"]) @ params["head"]
