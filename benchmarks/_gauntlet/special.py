"""Small programs for what the main one has not: float16, Adam, accumulation."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

import stablegrad as sg

from . import faults, problem
from .simulate import Seen, compiled

ACCUMULATED = 4
BAD_MICRO_BATCH = 102  # In the middle of an accumulation.
MICRO_BATCHES = 240
HALF_STEPS = 120
ZERO_STEPS = 20
ADAM_STEPS = 300
ADAM_FAULT = 150
SPARSE_FAULT = 150
JUMP_STEPS = 300
STABLE_RATE, JUMP = 0.05, 60.0


def _runs(
    tx, params, several: list, gradient: Callable, moves=True, value_fn=False
) -> list[Seen]:
    """Scan over each of `several`; `gradient(params, x)` gives loss and gradient."""
    tx = optax.with_extra_args_support(tx)

    def step(carry, x):
        params, state = carry
        loss, grads = gradient(params, x)
        extra = {"value_fn": lambda p: gradient(p, x)[0]} if value_fn else {}
        updates, state = tx.update(grads, state, params, value=loss, **extra)
        if moves:
            params = optax.apply_updates(params, updates)
        far, flag = problem.distances(params), jnp.zeros((), bool)
        seen = Seen(problem.norms(grads), problem.norms(updates), far, flag)
        return (params, state), seen

    def whole(params, xs):
        return jax.lax.scan(step, (params, tx.init(params)), xs)[1]

    params = jax.tree.map(jnp.asarray, params)
    program = compiled(whole, params, several[0])
    seen = [program(params, xs) for xs in several]
    return [Seen(*(np.asarray(x, np.float64) for x in one)) for one in seen]


def _prescribed(params, norm):
    """A gradient of the given norm in the parameters' dtype, with an ordinary loss."""
    del params
    return jnp.ones(()), problem.along(norm, jnp.float16)


def _half() -> dict[str, np.ndarray]:
    return {name: leaf.astype(np.float16) for name, leaf in problem.start().items()}


def half_large(make: Callable) -> dict[str, Seen]:
    """float16 gradients whose elements are about 300."""
    norms = np.float32(faults.large_norms(faults.STEPS)[:HALF_STEPS])
    (seen,) = _runs(make(optax.sgd(1.0)), _half(), [norms], _prescribed, moves=False)
    return {"half_large": seen}


def half_zero(make: Callable) -> dict[str, Seen]:
    """float16 Adam: gradients of exactly zero, then healthy ones."""
    norms = np.float32(faults.lognormal(3 * ZERO_STEPS, faults.SIGMA, seed=5))
    norms[:ZERO_STEPS] = 0
    (seen,) = _runs(make(optax.adam(1e-3)), _half(), [norms], _prescribed)
    return {"half_zero": seen}


def accumulated(make: Callable) -> dict[str, Seen]:
    """One nan micro-batch; the method sees every micro-batch."""
    factors = np.ones(MICRO_BATCHES, np.float32)
    factors[BAD_MICRO_BATCH] = np.nan
    inner = optax.MultiSteps(optax.sgd(1e-2), ACCUMULATED).gradient_transformation()
    xs = (problem.batches(MICRO_BATCHES), factors)
    (seen,) = _runs(make(inner), problem.start(), [xs], _spoilt)
    return {"accumulated": seen}


def adam(make: Callable) -> dict[str, Seen]:
    """Adam without a fault, and with one gradient of 1e20."""
    healthy = np.ones(ADAM_STEPS, np.float32)
    spoilt = healthy.copy()
    spoilt[ADAM_FAULT] = 2e21
    several = [(problem.batches(ADAM_STEPS), f) for f in (healthy, spoilt)]
    clean, seen = _runs(make(optax.adam(2e-3)), problem.start(), several, _spoilt)
    return {"adam_clean": clean, "adam_overflow": seen}


def _spoilt(params, x):
    batch, factor = x
    loss, grads = jax.value_and_grad(problem.loss)(params, batch)
    # A nan batch spoils the loss as well; an overflow of the gradient does not.
    bad = jnp.where(jnp.isfinite(factor), 1.0, factor)
    return loss * bad, jax.tree.map(lambda g: g * factor, grads)


def sparse(make: Callable) -> dict[str, Seen]:
    """Gradients of one row of each matrix, as of embeddings; one of them is huge."""
    factors = np.ones(ADAM_STEPS, np.float32)
    factors[SPARSE_FAULT] = 1e3
    rows = np.random.default_rng(8).integers(0, 6, ADAM_STEPS).astype(np.int32)

    def gradient(params, x):
        (batch, factor), row = x
        loss, grads = _spoilt(params, (batch, factor))
        own = lambda g: (
            g * (jnp.arange(len(g)) == row)[:, None] if g.ndim > 1 else 0 * g
        )
        return loss, jax.tree.map(own, grads)

    xs = ((problem.batches(ADAM_STEPS), factors), rows)
    (seen,) = _runs(make(optax.sgd(1e-2)), problem.start(), [xs], gradient)
    return {"sparse": seen}


def muon(make: Callable) -> dict[str, Seen]:
    """Muon without a fault, and with one gradient of 5e7 times its size."""
    healthy = np.ones(ADAM_STEPS, np.float32)
    spoilt = healthy.copy()
    spoilt[ADAM_FAULT] = 5e7
    several = [(problem.batches(ADAM_STEPS), f) for f in (healthy, spoilt)]
    tx = make(optax.contrib.muon(5e-3))
    clean, seen = _runs(tx, problem.start(), several, _spoilt)
    return {"muon_clean": clean, "muon_spike": seen}


def rate_jump(make: Callable) -> dict[str, Seen]:
    """SGD at a stable rate that jumps far beyond it."""
    rate = optax.piecewise_constant_schedule(STABLE_RATE, {JUMP_STEPS // 2: JUMP})
    xs = [problem.batches(JUMP_STEPS)]
    tx = make(optax.sgd(rate))
    (seen,) = _runs(tx, problem.start(), xs, _healthy, value_fn=True)
    return {"rate_jump": seen}


def statistics(make: Callable) -> dict[str, Seen]:
    """A network that keeps a running mean of its inputs, and one nan batch."""
    tx = optax.with_extra_args_support(make(optax.sgd(1e-2)))
    factors = np.ones(HALF_STEPS, np.float32)
    factors[HALF_STEPS // 2] = np.nan

    def step(carry, x):
        params, running, state = carry
        batch, factor = x
        batch = {name: values * factor for name, values in batch.items()}
        mean = {name: jnp.mean(values, axis=0) for name, values in batch.items()}
        new = jax.tree.map(lambda old, now: 0.9 * old + 0.1 * now, running, mean)
        loss, grads = jax.value_and_grad(problem.loss)(params, batch)
        updates, state = tx.update(grads, state, params, value=loss)
        params = optax.apply_updates(params, updates)
        running = _kept(state, running, new)
        size = problem.norms(running)
        flag = jnp.zeros((), bool)
        seen = Seen(problem.norms(grads), problem.norms(updates), size, flag)
        return (params, running, state), seen

    def whole(params, xs):
        running = {name: jnp.zeros(x.shape[2:]) for name, x in xs[0].items()}
        return jax.lax.scan(step, (params, running, tx.init(params)), xs)[1]

    params = jax.tree.map(jnp.asarray, problem.start())
    xs = (problem.batches(HALF_STEPS), factors)
    seen = compiled(whole, params, xs)(params, xs)
    return {"statistics": Seen(*(np.asarray(x, np.float64) for x in seen))}


def _kept(state, old, new):
    """Return the statistics after a step, as far as a method tells that it skipped."""
    if isinstance(state, optax.ApplyIfFiniteState):
        return optax.tree.where(state.last_finite, new, old)
    try:
        return sg.keep_if_skipped(state, old, new)
    except ValueError:  # There is no guard.
        return new


def _healthy(params, batch):
    return jax.value_and_grad(problem.loss)(params, batch)


PROGRAMS = {
    "half_large": half_large,
    "half_zero": half_zero,
    "accumulated": accumulated,
    "adam": adam,
    "sparse": sparse,
    "muon": muon,
    "rate_jump": rate_jump,
    "statistics": statistics,
}
