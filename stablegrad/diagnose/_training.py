"""What the optimizer does with the gradient: its constants, and some real steps."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .. import _trees
from . import _taps
from ._batch import examples_in

NAN = math.nan
SCALES = (1.0, 1 / 4, 1 / 16, 1 / 64)
SHUFFLES = 16
CALM_RISE, CALM_SPREADS = 0.1, 3.0
MOST_EPSILON = 100.0  # Beyond it an update is like SGD's.


@dataclasses.dataclass
class TrainingFacts:
    """An optimizer in numbers; nan or empty where it was not asked."""

    b1: float = NAN
    b2: float = NAN
    epsilon: float = NAN
    # RMS of each leaf's update over its own; nan: zeros.
    updates: tuple[float, ...] = ()
    below_epsilon: tuple[float, ...] = ()  # Share of a leaf's elements, zeros aside.
    staleness: tuple[float, ...] = ()  # sqrt(mean(g^2 / v)) of each leaf, g as in v.
    losses: tuple[float, ...] = ()  # Before each step, and after all of them.
    untrained: tuple[float, ...] = ()  # Of the same batches, without any step.
    ends: tuple[float, ...] = ()  # Mean of the last losses, at each of `SCALES`.
    is_new: bool = True  # Whether the optimizer state is that before the first step.
    calm_scale: float = NAN  # Largest factor on the updates at which the loss is calm.
    # By how many deviations the loss on the labels is below that on shuffled labels.
    labels_seen: float = NAN  # On examples that were trained on.
    labels_unseen: float = NAN  # On other examples.


def moments_in(state) -> Any:
    """Return the node of an optimizer state with Adam's moments, or None."""
    is_adam = lambda node: hasattr(node, "mu") and hasattr(node, "nu")
    found = _trees.nodes(state, is_adam)
    return found[0] if found and jax.tree.leaves(found[0].nu) else None


def constants(tx, params) -> jax.Array:
    """Return b1, b2 and epsilon of an Adam-like optimizer, read off what it does.

    Two steps with the same gradient multiply the moments by 1 + b1 and 1 + b2. The
    update is proportional to g / (|g| + epsilon); two sizes of g give epsilon. Both
    sizes are too small for any clipping. The second step counts, since a warm-up may
    start from a rate of 0; and the leaf with the largest epsilon, since others may be
    frozen.
    """
    zeros = jax.tree.map(jnp.zeros_like, params)
    start = tx.init(zeros)

    def two_steps(size):
        grads = jax.tree.map(lambda p: jnp.full_like(p, size), params)
        _, once = tx.update(grads, start, zeros, value=1.0)
        update, twice = tx.update(grads, once, zeros, value=1.0)
        return firsts(update), moments_in(once), moments_in(twice)

    def firsts(tree):
        own = [x.ravel()[0] for x in jax.tree.leaves(tree) if x.size]
        return jnp.stack([x.astype(jnp.float32) for x in own])

    large, one, two = two_steps(1e-4)
    small, *_ = two_steps(1e-6)
    if one is None:
        return jnp.full(3, jnp.nan)
    grown = lambda after, before: firsts(after)[0] / firsts(before)[0] - 1
    ratio = large / small
    epsilon = jnp.maximum(1e-4 * (ratio - 1) / (100.0 - ratio), 0.0)
    epsilon = jnp.max(jnp.where(epsilon < MOST_EPSILON, epsilon, -1.0))
    epsilon = jnp.where(epsilon < 0, jnp.nan, epsilon)
    return jnp.stack([grown(two.mu, one.mu), grown(two.nu, one.nu), epsilon])


@functools.partial(jax.jit, static_argnames="tx")
def one_update(tx, params, state, grads, value):
    """Return the constants, and for each leaf what an update and the moments are."""
    constant = constants(tx, params)
    updates, after = tx.update(grads, state, params, value=value)
    ratio = lambda u, p: jnp.where(
        _taps.rms(p) > 0, _taps.rms(u) / _taps.rms(p), jnp.nan
    )
    sizes = jax.tree.leaves(jax.tree.map(ratio, updates, params))
    return constant, sizes, *_against_moments(state, after, constant[1], constant[2])


def facts(
    loss, tx, params, state, grads, value, data, labels, steps, more, spread
) -> TrainingFacts:
    """Measure an optimizer on a gradient, and on some steps if asked.

    `labels` is the place of the labels among the batch's arrays, None if unknown, and
    `spread` the standard deviation of the losses of parts of the batch.
    """
    found = TrainingFacts(is_new=state is None)
    with jax.numpy_dtype_promotion("standard"):
        state = tx.init(params) if state is None else _trees.without_variables(state)
        measured = jax.device_get(one_update(tx, params, state, grads, value))
        constant, *of_leaves = measured
        found.b1, found.b2, found.epsilon = map(float, constant)
        updates, below, stale = (tuple(map(float, numbers)) for numbers in of_leaves)
        found.updates, found.below_epsilon, found.staleness = updates, below, stale
        if steps:
            run, scale = _take_steps(
                found, loss, tx, params, state, data, steps, more, spread
            )
            if labels is not None and scale:
                _try_labels(found, run, loss, data, labels, scale)
        if len(found.staleness) != len(updates):  # One mask hides several leaves.
            found.staleness = found.below_epsilon = ()
    return found


def _against_moments(before, after, b2, epsilon):
    """Compare the gradient of each leaf with Adam's epsilon and second moment."""
    below = []
    for _, size, known in _sizes(before, after, b2):
        few = known & (size < epsilon)
        below.append(jnp.where(known.size, _share(few, known), jnp.nan))
    return below, _staleness(before, after, b2)


def _staleness(before, after, b2) -> list[jax.Array]:
    """Return sqrt(mean(g^2 / v)) of each leaf, nan if it has no moments."""
    found = []
    for square, size, known in _sizes(before, after, b2):
        ratios = jnp.where(known, square / jnp.square(size), 0.0)
        found.append(jnp.where(known.size, jnp.sqrt(_share(ratios, known)), jnp.nan))
    return found


def _share(numbers, known) -> jax.Array:
    return jnp.sum(numbers) / jnp.maximum(jnp.sum(known), 1)


def _sizes(before, after, b2):
    """Return g^2 as Adam sees it, sqrt(v) and where that is known, for each leaf.

    The change of v gives g^2: what stands before Adam in a chain may have scaled g. The
    arrays of a leaf that has no moments are empty.
    """
    node, last = moments_in(after), moments_in(before)
    if node is None or last is None:
        return []
    masked = lambda x: isinstance(x, optax.MaskedNode)
    nus = [jax.tree.leaves(x.nu, is_leaf=masked) for x in (node, last)]
    count = jnp.asarray(getattr(node, "count", 1), jnp.float32)
    rows = []
    for new, old in zip(*nus, strict=True):
        if masked(new):
            new = old = jnp.zeros(0)
        new, old = new.astype(jnp.float32), old.astype(jnp.float32)
        square = jnp.maximum(new - b2 * old, 0.0) / jnp.maximum(1 - b2, 1e-8)
        nu = new / (1 - b2**count)
        rows.append((square, jnp.where(nu > 0, jnp.sqrt(nu), 1.0), nu > 0))
    return rows


@functools.partial(jax.jit, static_argnames=("loss", "tx", "steps"))
def take_steps(loss, tx, params, state, frozen, b2, stacked, scale, steps: int):
    """Return losses and staleness of steps on stacked batches, and where they end.

    Updates are multiplied by `scale`.
    """
    batches = max((x.shape[0] for x in jax.tree.leaves(stacked)), default=1)
    at = lambda i: (frozen, jax.tree.map(lambda x: x[i], stacked))

    def step(carry, i):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params, at(i % batches))
        updates, after = tx.update(grads, state, params, value=value)
        updates = optax.tree.scale(scale, updates)
        params = optax.apply_updates(params, updates)
        stale = _staleness(state, after, b2)
        return (params, after), (value, jnp.stack(stale) if stale else jnp.zeros(0))

    start = (params, state)
    (after, _), (losses, stale) = jax.lax.scan(step, start, jnp.arange(steps + 1))
    return losses, stale, after


def _take_steps(
    found, loss, tx, params, state, data, steps: int, more, spread: float
) -> tuple[Callable, float]:
    """Take steps; return the function, and the best of the calm scales, or 0."""
    frozen, batch = data
    batches = [batch, *more]
    stacked = jax.tree.map(
        lambda *xs: jnp.stack([jnp.asarray(x) for x in xs]), *batches
    )
    run = functools.partial(
        take_steps, loss, tx, params, state, frozen, found.b2, steps=steps
    )
    losses_at = lambda scale: np.asarray(run(stacked, scale)[0], float)
    losses, stale, _ = run(stacked, 0.0)
    untrained = np.asarray(losses, float)
    found.untrained = tuple(untrained.tolist())
    # One batch may be a spike: the median of several is what the moments expect.
    found.staleness = tuple(np.median(stale[: len(batches)], axis=0).tolist())
    runs = [losses_at(scale) for scale in SCALES]
    calm = [is_calm(losses, untrained, spread) for losses in runs]
    found.losses = tuple(runs[0].tolist())
    found.ends = tuple(float(losses[-len(batches) :].mean()) for losses in runs)
    found.calm_scale = max(np.multiply(SCALES, calm).tolist())
    risen = found.ends[0] > float(untrained.mean()) * (1 + CALM_RISE)
    if not (found.is_new or risen) and np.isfinite(runs[0]).all():
        found.calm_scale = 1.0  # In a run, a rise that is gone at the end is usual.
    best = np.where(calm, found.ends, math.inf)
    return run, SCALES[int(np.argmin(best))] if np.isfinite(best).any() else 0.0


def is_calm(losses: np.ndarray, untrained: np.ndarray, spread: float) -> bool:
    """Whether no batch's loss rises by more than 10 % and the spread of its parts."""
    allowed = CALM_RISE * float(np.abs(untrained).mean()) + CALM_SPREADS * spread
    return bool(np.isfinite(losses).all() and (losses - untrained).max() <= allowed)


def _try_labels(found, run, loss, data, labels: int, scale: float) -> None:
    """Train on half of the examples, and shuffle the labels of both halves."""
    frozen, batch = data
    leaves, structure = jax.tree.flatten(batch)
    examples = examples_in(batch)
    if examples < 32:
        return
    half = examples // 2
    halves = [[jnp.asarray(x)[k : 2 * half : 2] for x in leaves] for k in (0, 1)]
    trained_on = structure.unflatten([x[None] for x in halves[0]])
    try:
        *_, after = run(trained_on, scale)
    except (TypeError, ValueError, IndexError):  # The loss takes whole batches only.
        return
    chance = np.random.default_rng(0)
    orders = np.stack([chance.permutation(half) for _ in range(SHUFFLES)])
    for pair, name in zip(halves, ("labels_seen", "labels_unseen"), strict=True):
        given = pair[1 - labels], pair[labels], orders
        own, shuffled = _shuffled(loss, after, frozen, structure, labels, *given)
        spread = float(np.std(shuffled))
        if math.isfinite(spread) and spread > 0:
            setattr(found, name, float((np.mean(shuffled) - own) / spread))


@functools.partial(jax.jit, static_argnames=("loss", "structure", "place"))
def _shuffled(loss, params, frozen, structure, place: int, inputs, labels, orders):
    def of(y):
        pair = (inputs, y) if place else (y, inputs)
        return loss(params, (frozen, structure.unflatten(pair)))

    return of(labels), jax.lax.map(lambda order: of(labels[order]), orders)
