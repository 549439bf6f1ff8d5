"""What the optimizer does with the gradient: its constants, and some real steps."""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .. import _trees
from ..recovery._adopt import opt_state_of
from . import _taps
from ._batch import examples_in
from ._moments import against_moments, constants, staleness

NAN = math.nan
SCALES = (1.0, 1 / 4, 1 / 16, 1 / 64)
SHUFFLES = 16
CALM_RISE, CALM_SPREADS = 0.1, 3.0


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


@functools.partial(jax.jit, static_argnames="tx")
def one_update(tx, params, state, grads, value):
    """Return the constants, and for each leaf what an update and the moments are."""
    constant = constants(tx, params)
    updates, after = tx.update(grads, state, params, value=value)
    ratio = lambda u, p: jnp.where(
        _taps.rms(p) > 0, _taps.rms(u) / _taps.rms(p), jnp.nan
    )
    sizes = jax.tree.leaves(jax.tree.map(ratio, updates, params))
    return constant, sizes, *against_moments(state, after, constant[1], constant[2])


def facts(
    loss, tx, params, state, grads, value, data, labels, steps, more, spread
) -> TrainingFacts:
    """Measure an optimizer on a gradient, and on some steps if asked.

    `labels` is the place of the labels among the batch's arrays, None if unknown, and
    `spread` the standard deviation of the losses of parts of the batch.
    """
    found = TrainingFacts(is_new=state is None)
    with jax.numpy_dtype_promotion("standard"):
        state = _started(tx, params, state)
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
        # One mask hides several leaves; or the moments are not Adam's.
        if len(found.staleness) != len(updates) or math.isnan(found.b2):
            found.staleness = found.below_epsilon = ()
    return found


def _started(tx, params, state):
    """Return an optimizer's state: a new one, or that given, alone or in a trainer."""
    new = jax.eval_shape(tx.init, params)
    if state is None:
        return tx.init(params)
    state = _trees.without_variables(opt_state_of(state))
    shapes = lambda tree: list(map(np.shape, jax.tree.leaves(tree)))
    if shapes(state) != shapes(new):
        raise ValueError(
            "`opt_state` must be that of `tx` for the floating-point leaves of `params`"
            f", with {len(shapes(new))} arrays of their shapes, got "
            f"{len(shapes(state))} arrays."
        )
    return state


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
        still = lambda u: jnp.where(scale > 0, (scale * u).astype(u.dtype), 0)
        updates = jax.tree.map(still, updates)  # Updates may be nan.
        params = optax.apply_updates(params, updates)
        stale = staleness(state, after, b2)
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
    if examples < 32 or not all(map(np.ndim, leaves)):
        return
    half = examples // 2
    halves = [[jnp.asarray(x)[k : 2 * half : 2] for x in leaves] for k in (0, 1)]
    trained_on = structure.unflatten([x[None] for x in halves[0]])
    try:
        *_, after = run(trained_on, scale)
    except Exception:  # However a loss refuses another number of examples.
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
