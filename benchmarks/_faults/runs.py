"""A run under a schedule of faults, with everything that is judged about it."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import stablegrad as sg
from _faults import problem
from _faults.schedules import Schedule, hits, none, spoilt

NEAR = 1.05  # Of the clean run's loss.
MOVED = 40  # Steps at the end of which some must move the parameters.


class Outcome(NamedTuple):
    """The end of a run; arrays with a leading axis of schedules."""

    finite: np.ndarray  # Parameters and inner state.
    counted: np.ndarray  # Totals are the sums of what each step reported.
    kept: np.ndarray  # Skipped steps left parameters and state bit for bit.
    moves: np.ndarray  # Training goes on at the end.
    loss: np.ndarray  # Mean of the last steps, over all data.
    skipped: np.ndarray  # Steps; 0 without a guard.
    roll_backs: np.ndarray


def bare(inner):
    return inner


def preset(inner):
    return sg.stabilize(inner)


def watching_updates(inner):
    return sg.stabilize(inner, sg.skip(sg.rarity(margin=32, of="update_norm")))


def with_roll_back(inner):
    return sg.stabilize(inner, sg.roll_back())


def optax_pair(inner):
    return optax.apply_if_finite(optax.chain(optax.clip_by_global_norm(1.0), inner), 5)


def olmo(inner):
    return sg.skip_bad_steps(inner, "olmo", published=True)


METHODS: dict[str, Callable] = {
    "bare": bare,
    "stabilize": preset,
    "stabilize, update_norm watched": watching_updates,
    "stabilize + roll_back": with_roll_back,
    "optax clip + apply_if_finite": optax_pair,
    "OLMo's rule": olmo,
}


def faulty(inner):
    """An optimizer whose updates are spoilt by `faults=`."""
    inner = optax.with_extra_args_support(inner)

    def update(updates, state, params=None, *, faults, **extra):
        updates, state = inner.update(updates, state, params, **extra)
        return spoilt(updates, faults), state

    return optax.GradientTransformationExtraArgs(inner.init, update)


def make_run(optimizer: str, dtype: str, method: str):
    """A function of one schedule that trains under it, and judges."""
    tx = METHODS[method](faulty(problem.OPTIMIZERS[optimizer]()))
    guarded = method not in ("bare", "optax clip + apply_if_finite")
    x, y, rows = problem.data()

    def inner_of(state):
        return state.guarded_inner if guarded else state

    def spoil_state(state, faults):
        if not guarded:
            return spoilt(state, faults)
        return state._replace(guarded_inner=spoilt(state.guarded_inner, faults))

    def run(schedule: Schedule):
        params = problem.start(dtype)
        init = (params, tx.init(params), jnp.ones((), bool), jnp.zeros((5,), jnp.int32))

        def step(carry, xs):
            t, batch = xs
            params, state, kept, sums = carry
            at = lambda place: hits(schedule, place, t)
            params = spoilt(params, at("parameters"))
            state = spoil_state(state, at("state"))
            spoil = lambda grads: spoilt(grads, at("gradient"))
            loss, grads = problem.value_and_grad(
                params, x[batch], y[batch], dtype, spoil
            )
            loss = spoilt([loss], at("loss"))[0]
            before = params, inner_of(state)
            params, state = sg.apply(
                tx, grads, state, params, value=loss, faults=at("update")
            )
            if guarded:
                seen = sg.metrics(state)
                rolled = seen.get("rolled_back", jnp.zeros((), bool))
                held = seen["skipped"] & ~rolled
                kept &= ~held | same(before, (params, inner_of(state)))
                told = seen["skipped"], rolled, seen["kept_out_elements"] > 0
                told = (*told, seen["halted"], jnp.ones((), bool))
                sums = sums + jnp.stack(told).astype(jnp.int32)
            moved = ~same(before[0], params)
            full = problem.loss_fn(params, x, y)
            return (params, state, kept, sums), (full, moved)

        xs = jnp.arange(problem.STEPS), rows
        (params, state, kept, sums), (losses, moved) = jax.lax.scan(step, init, xs)
        counted, skipped, backs = jnp.ones((), bool), sums[0], sums[1]
        if guarded:
            seen = sg.metrics(state)
            totals = ("skipped", "kept_out", "halted", "guarded")
            for name, own in zip(totals, sums[jnp.array([0, 2, 3, 4])], strict=True):
                counted &= seen[f"{name}_steps"] == own
            counted &= seen.get("roll_backs", 0) == backs
        finite = all_finite((params, inner_of(state)))
        last = jnp.mean(losses[-problem.JUDGED :])
        moves = jnp.any(moved[-MOVED:])
        return Outcome(finite, counted, kept, moves, last, skipped, backs)

    return run


def same(one, other):
    """Whether two trees are equal bit for bit."""

    def equal(x, y):
        bits = lambda a: (
            a.view(f"uint{8 * a.dtype.itemsize}")
            if a.ndim
            else a[None].view(f"uint{8 * a.dtype.itemsize}")
        )
        return jnp.all(bits(jnp.asarray(x)) == bits(jnp.asarray(y)))

    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return jnp.all(jnp.stack([equal(x, y) for x, y in pairs]))


def all_finite(tree):
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in leaves]))


def run_many(run, schedules: Schedule, *, vmapped: bool) -> Outcome:
    """All schedules, at once or one by one with the same program."""
    if vmapped:
        return jax.device_get(jax.jit(jax.vmap(run))(schedules))
    one, count = jax.jit(run), len(schedules.place)
    found = [one(jax.tree.map(lambda x, i=i: x[i], schedules)) for i in range(count)]
    return jax.tree.map(lambda *xs: np.stack(xs), *jax.device_get(found))


@functools.cache
def clean_loss(optimizer: str, dtype: str) -> float:
    """What the bare optimizer reaches without a fault."""
    return float(jax.jit(make_run(optimizer, dtype, "bare"))(none()).loss)
