"""What the parts of a batch say: gradients of its shards, and its rows."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import _taps

MOST_SHARDS = 8
ODD_ROW = 20.0  # Times the median row.
LEAST_ROW = 8  # Numbers; the sizes of single numbers may well differ by so much.
NAN = math.nan


@dataclasses.dataclass
class BatchFacts:
    """A batch in numbers; a shard is a run of consecutive examples."""

    examples: int = 0  # 0: the arrays have no common first axis.
    longest: int = 0  # Longest first axis of an array, random keys aside.
    losses: tuple[float, ...] = ()
    norms: tuple[float, ...] = ()  # Of the shards' gradients.
    noise_scale: float = NAN  # In examples: B_simple of McCandlish et al.
    array_rms: tuple[float, ...] = ()  # Of each array of numbers: inputs, targets.
    bad_rows: tuple[int, ...] = ()  # Examples with a nan or inf.
    odd_rows: tuple[int, ...] = ()  # Examples far larger than the others.
    odd_ratio: float = NAN  # Of the largest row's RMS to the median's.


def examples_in(batch) -> int:
    """Return the length of the first axis that all arrays share, or 0.

    Scalars, such as a random key, belong to every example.
    """
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(batch)]
    lengths = {shape[0] for shape in shapes if shape}
    return lengths.pop() if len(lengths) == 1 else 0


def _longest(batch) -> int:
    arrays = [x for x in jax.tree.leaves(batch) if np.ndim(x)]
    keys = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.extended)
    return max((len(x) for x in arrays if not keys(x)), default=0)


def shards_in(examples: int) -> int:
    """Return the number of equal shards, at most 8; 0 if there are none."""
    counts = [n for n in range(2, MOST_SHARDS + 1) if examples % n == 0]
    return max(counts, default=0) if examples else 0


@functools.partial(jax.jit, static_argnames=("loss", "count"))
def shard_gradients(loss, params, frozen, batch, count: int):
    """Return losses and squared gradient norms of shards, and that of their mean.

    As many operations as one gradient of the whole batch.
    """

    def split(x):
        if not jnp.ndim(x):
            return jnp.broadcast_to(x, (count,))
        return x.reshape(count, x.shape[0] // count, *x.shape[1:])

    def one(total, shard):
        value, grads = jax.value_and_grad(loss)(params, (frozen, shard))
        wide = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        total = jax.tree.map(jnp.add, total, wide)
        return total, (value, _norm(wide))

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
    total, (losses, norms) = jax.lax.scan(one, zeros, jax.tree.map(split, batch))
    return losses, norms, _norm(total) / count


def _norm(tree) -> jax.Array:
    parts = [_taps.rms(x) * math.sqrt(x.size) for x in jax.tree.leaves(tree)]
    return jnp.linalg.norm(jnp.stack(parts))


@jax.jit
def row_sizes(batch) -> list[tuple[jax.Array, jax.Array, int]]:
    """Return RMS, finiteness and length of the rows of every array of numbers.

    The rows of integers, which may be numbers of tokens, are not compared: length 0.
    """
    found = []
    for leaf in jax.tree.leaves(batch):
        if not (np.ndim(leaf) and jnp.issubdtype(leaf.dtype, jnp.number)):
            continue
        rows = jnp.asarray(leaf).reshape(leaf.shape[0], -1)
        finite = jnp.isfinite(_taps.sizes(rows)).all(axis=1)
        compared = 0 if jnp.issubdtype(leaf.dtype, jnp.integer) else rows.shape[1]
        found.append((jax.vmap(_taps.rms)(rows), finite, compared))
    return found


def noise_scale(norms, mean_norm: float, examples: int) -> float:
    """Return B_simple from the gradient norms of shards and of the whole.

    |G|^2 = (B |g_B|^2 - b |g_b|^2) / (B - b), S = (|g_b|^2 - |g_B|^2) / (1/b - 1/B),
    B_simple = S / |G|^2; inf where the shards show no common direction.
    """
    whole, part = examples, examples / len(norms)
    small = float(np.mean(np.square(np.asarray(norms, float))))
    big = float(mean_norm) ** 2
    signal = (whole * big - part * small) / (whole - part)
    noise = (small - big) / (1 / part - 1 / whole)
    if not (math.isfinite(signal) and math.isfinite(noise)):
        return NAN
    return max(noise, 0.0) / signal if signal > 0 else math.inf


def facts(loss, params, frozen, batch) -> BatchFacts:
    """Measure a batch."""
    found = BatchFacts(examples=examples_in(batch), longest=_longest(batch))
    count = shards_in(found.examples)
    _read_rows(found, row_sizes(batch))
    if count:
        try:
            run = shard_gradients(loss, params, frozen, batch, count)
        except Exception:  # However a loss refuses another number of examples.
            return found
        losses, norms, mean = jax.device_get(run)
        found.losses = tuple(map(float, losses))
        found.norms = tuple(map(float, norms))
        found.noise_scale = noise_scale(norms, mean, found.examples)
    return found


def _read_rows(found: BatchFacts, sizes: list[Any]) -> None:
    bad, odd, ratios = set(), set(), [1.0]
    rms_of_all = []
    for size, finite, length in sizes:
        size, finite = np.asarray(size, float), np.asarray(finite)
        bad |= set(np.flatnonzero(~finite).tolist())
        good = size[finite]
        if not len(good):
            continue
        rms_of_all.append(float(np.sqrt(np.mean(good**2))))
        median = float(np.median(good))
        ratio = np.where(finite, size, 0) / max(median, 1e-30)
        if median > 0 and length >= LEAST_ROW:
            ratios.append(float(ratio.max()))
            odd |= set(np.flatnonzero(ratio > ODD_ROW).tolist())
    found.bad_rows, found.odd_rows = tuple(sorted(bad)), tuple(sorted(odd))
    found.odd_ratio, found.array_rms = max(ratios), tuple(rms_of_all)
