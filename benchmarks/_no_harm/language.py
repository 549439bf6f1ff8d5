"""A small transformer, and text that nobody wrote: a chain of second order."""

import jax
import jax.numpy as jnp
import optax

from .networks import affine, cross_entropy, dense, normalized

SYMBOLS, CONTEXT, WIDTH, HEADS = 16, 16, 32, 2
TEXT, BATCH = 8192, 16


def chain(key, sharpness: float = 2.5):
    """Logits of the next symbol, given the last two."""
    return sharpness * jax.random.normal(key, (SYMBOLS, SYMBOLS, SYMBOLS))


def text(key, logits, length: int = TEXT):
    """Symbols drawn from a chain: 64 strands, one after the other."""
    strands = 64

    def step(last, key):
        older, newer = last
        drawn = jax.random.categorical(key, logits[older, newer])
        return (newer, drawn), drawn

    first, *keys = jax.random.split(key, 2)
    begun = jax.random.randint(first, (2, strands), 0, SYMBOLS)
    keys = jax.random.split(keys[0], length // strands)
    _, drawn = jax.lax.scan(step, (begun[0], begun[1]), keys)
    return drawn.T.ravel()


def windows(symbols, key, size: int = BATCH):
    """Pieces of a text, one symbol longer than the context."""
    starts = jax.random.randint(key, (size, 1), 0, symbols.shape[0] - CONTEXT - 1)
    return symbols[starts + jnp.arange(CONTEXT + 1)[None]]


def draw_text(data, key, t):
    """A batch of training text."""
    return windows(data["text"], key)


def network(key):
    """One block of attention and one of two dense layers."""
    keys = jax.random.split(key, 7)
    return {
        "embedding": 0.5 * jax.random.normal(keys[0], (SYMBOLS, WIDTH)),
        "position": 0.5 * jax.random.normal(keys[1], (CONTEXT, WIDTH)),
        "qkv": dense(keys[2], WIDTH, 3 * WIDTH, 1.0),
        "out": dense(keys[3], WIDTH, WIDTH, 0.5),
        "up": dense(keys[4], WIDTH, 2 * WIDTH),
        "down": dense(keys[5], 2 * WIDTH, WIDTH, 0.5),
        "head": dense(keys[6], WIDTH, SYMBOLS, 0.1),
    }


def logits(params, symbols):
    """Of the symbol after each one."""
    length = symbols.shape[-1]
    x = params["embedding"][symbols] + params["position"][:length]
    q, k, v = jnp.split(affine(params["qkv"], normalized(x)), 3, -1)
    heads = lambda a: a.reshape(*a.shape[:-1], HEADS, WIDTH // HEADS)
    scores = jnp.einsum("...qhd,...khd->...hqk", heads(q), heads(k))
    scores = scores / (WIDTH // HEADS) ** 0.5
    seen = jnp.tril(jnp.ones((length, length), bool))
    weights = jax.nn.softmax(jnp.where(seen, scores, -1e9), -1)
    mixed = jnp.einsum("...hqk,...khd->...qhd", weights, heads(v))
    x = x + affine(params["out"], mixed.reshape(x.shape))
    x = x + affine(params["down"], jax.nn.gelu(affine(params["up"], normalized(x))))
    return affine(params["head"], normalized(x))


def loss(params, batch):
    """Cross-entropy in nats a symbol."""
    return cross_entropy(logits(params, batch[:, :-1]), batch[:, 1:])


def checkpoint(key, steps: int = 400):
    """A network trained on a chain of its own, and that chain."""
    chain_key, text_key, init_key, run_key = jax.random.split(key, 4)
    table = chain(chain_key)
    symbols = text(text_key, table)
    tx = optax.adam(3e-3)
    params = network(init_key)

    def step(carry, key):
        params, state = carry
        grads = jax.grad(loss)(params, windows(symbols, key))
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(run_key, steps)
    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), keys)
    return params, table
