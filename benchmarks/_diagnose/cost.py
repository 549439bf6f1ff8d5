"""What a report costs, in gradients of a character GPT of 10.6 million parameters."""

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import stablegrad as sg

from .models import cross_entropy

ROUNDS = 3


class _Block(nnx.Module):
    def __init__(self, width, heads, rngs):
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.norm2 = nnx.LayerNorm(width, rngs=rngs)
        self.attn = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x):
        mask = nnx.make_causal_mask(jnp.ones(x.shape[:2]))
        x = x + self.attn(self.norm1(x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class GPT(nnx.Module):
    """Six layers of width 384 and six heads, context 256, 65 characters."""

    def __init__(self, rngs, width=384, layers=6, heads=6, context=256, alphabet=65):
        """Make it with Flax's own initialisers."""
        self.embed = nnx.Embed(alphabet, width, rngs=rngs)
        self.position = nnx.Embed(context, width, rngs=rngs)
        self.blocks = nnx.List([_Block(width, heads, rngs) for _ in range(layers)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, alphabet, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        """Return logits."""
        x = self.embed(tokens) + self.position(jnp.arange(tokens.shape[1]))[None]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def _loss(model, batch):
    return cross_entropy(model(batch[:, :-1]), batch[:, 1:])


def ratio(batch: int = 4, **shape) -> tuple[float, float, float]:
    """Return seconds of a gradient and of a report, and of the first report.

    Reports and gradients alternate. The first report compiles its programs, which a
    second one of the same loss and shapes shares.
    """
    model = GPT(nnx.Rngs(0), **shape)
    context = model.position.num_embeddings
    tokens = np.random.default_rng(0).integers(0, 65, (batch, context + 1), np.int32)
    graphdef, params = nnx.split(model)
    gradient = jax.jit(
        jax.value_and_grad(lambda p: _loss(nnx.merge(graphdef, p), tokens))
    )
    tx = optax.adamw(1e-3)
    report = lambda: sg.diagnose(_loss, model, tokens, tx)
    first = _seconds(report)
    jax.block_until_ready(gradient(params))
    pairs = [
        (_seconds(lambda: gradient(params)), _seconds(report)) for _ in range(ROUNDS)
    ]
    gradients, reports = (
        statistics.median(column) for column in zip(*pairs, strict=True)
    )
    return gradients, reports, first


def _seconds(run) -> float:
    started = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - started
