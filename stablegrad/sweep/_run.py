"""The compiled programs of one candidate: many runs at once, each a step in a loop."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .._observe import metrics
from ..learning_rate._evaluations import PlateauState
from ..learning_rate._observe_metric import observe_metric
from ._candidates import Candidate
from ._problem import Problem

AT_ONCE = 1000  # Examples of the validation set in one call.


class Run(NamedTuple):
    """What one run carries from step to step."""

    params: Any
    opt_state: Any


class Seen(NamedTuple):
    """What an evaluation found; rank-0, float32, nan where there is none."""

    loss: jax.Array
    accuracy: jax.Array
    dead: jax.Array  # Share of hidden units that are never above zero.
    skipped: jax.Array  # Steps since the start.


def start(problem: Problem, one: Candidate, steps: int, rate, key) -> Run:
    """A run before its first step."""
    params = problem.init(key)
    return Run(params, _extended(one.build(rate, steps)).init(params))


def advance(
    problem: Problem, one: Candidate, steps: int, rate, run: Run, data, draws, number
):
    """Takes the first `number` of the steps that `draws` has; returns run and losses.

    Losses of steps that are not taken are nan.
    """
    tx = _extended(one.build(rate, steps))
    length = jax.tree.leaves(draws)[0].shape[0]

    def body(i, carry):
        run, losses = carry
        batch = problem.batch(data, jax.tree.map(lambda x: x[i], draws))
        params, opt_state, loss = _step(problem, one, tx, run, batch)
        return Run(params, opt_state), losses.at[i].set(loss.astype(jnp.float32))

    nothing = jnp.full(length, jnp.nan, jnp.float32)
    return jax.lax.fori_loop(0, number, body, (run, nothing))


def _step(problem: Problem, one: Candidate, tx, run: Run, batch):
    if problem.step is not None:
        return problem.step(tx, run.params, run.opt_state, batch)
    loss_fn = problem.loss
    assert loss_fn is not None
    loss, grads = jax.value_and_grad(loss_fn)(run.params, batch)
    known = {
        "value": loss,
        "grad": grads,
        "value_fn": lambda params: loss_fn(params, batch),
    }
    extra = {name: known[name] for name in one.extra}
    updates, opt_state = tx.update(grads, run.opt_state, run.params, **extra)
    return optax.apply_updates(run.params, updates), opt_state, loss


def look(problem: Problem, run: Run, validation, loss) -> tuple[Run, Seen]:
    """Evaluates a run, and lets its plateaus know; `loss` stands in for validation."""
    params = weights(run)
    accuracy = dead = jnp.full((), jnp.nan, jnp.float32)
    if validation is not None:
        found = _over(
            validation, lambda batch: _scalars(problem.evaluate, params, batch)
        )
        loss, accuracy = found["loss"], found.get("accuracy", accuracy)
        if problem.hidden is not None:
            dead = _dead(problem.hidden, params, validation)
    state = run.opt_state
    is_plateau = lambda node: isinstance(node, PlateauState)
    if any(map(is_plateau, jax.tree.leaves(state, is_leaf=is_plateau))):
        state = observe_metric(state, value=loss)
    return run._replace(opt_state=state), Seen(loss, accuracy, dead, _skipped(state))


def weights(run: Run):
    """The parameters to evaluate: what schedule-free averages, else as trained."""
    kind = optax.contrib.ScheduleFreeState
    is_free = lambda node: isinstance(node, kind)
    free = [
        node
        for node in jax.tree.leaves(run.opt_state, is_leaf=is_free)
        if is_free(node)
    ]
    if not free:
        return run.params
    return optax.contrib.schedule_free_eval_params(free[0], run.params)


def _extended(tx) -> optax.GradientTransformationExtraArgs:
    return optax.with_extra_args_support(tx)


def _scalars(evaluate, params, batch) -> dict[str, jax.Array]:
    found = evaluate(params, batch)
    found = found if isinstance(found, dict) else {"loss": found}
    return {name: jnp.asarray(x, jnp.float32) for name, x in found.items()}


def _slices(validation):
    """All of it in slices of one size, and what is left over."""
    size = jax.tree.leaves(validation)[0].shape[0]
    whole = size // AT_ONCE
    cut = lambda x: x[: whole * AT_ONCE].reshape(whole, AT_ONCE, *x.shape[1:])
    rest = jax.tree.map(lambda x: x[whole * AT_ONCE :], validation)
    return whole, jax.tree.map(cut, validation), size - whole * AT_ONCE, rest


def _over(validation, function):
    """The mean over the examples of a function that gives means."""
    whole, slices, left, rest = _slices(validation)
    first = jax.tree.map(lambda x: x[:AT_ONCE], validation)
    total = jax.tree.map(jnp.zeros_like, jax.eval_shape(function, first))
    if whole:
        sums = jax.lax.map(function, slices)
        total = jax.tree.map(lambda x: jnp.sum(x, axis=0) * AT_ONCE, sums)
    if left:
        total = jax.tree.map(lambda a, b: a + left * b, total, function(rest))
    return jax.tree.map(lambda x: x / (whole * AT_ONCE + left), total)


def _dead(hidden, params, validation) -> jax.Array:
    """The share of units, along the last axis, that no example raises above zero."""

    def alive(batch):
        fires = lambda x: jnp.any(x > 0, axis=tuple(range(x.ndim - 1)))
        units = [fires(x) for x in jax.tree.leaves(hidden(params, batch))]
        return jnp.concatenate(units)

    whole, slices, left, rest = _slices(validation)
    found = jnp.any(jax.lax.map(alive, slices), axis=0) if whole else False
    found = found | alive(rest) if left else found
    return jnp.mean(jnp.asarray(~found, jnp.float32))


def _skipped(state) -> jax.Array:
    """Steps that a guard of ours, or Optax's, has skipped; nan without one."""
    is_optax = lambda node: isinstance(node, optax.ApplyIfFiniteState)
    theirs = [
        node.total_notfinite
        for node in jax.tree.leaves(state, is_leaf=is_optax)
        if is_optax(node)
    ]
    try:
        ours = [
            x for name, x in metrics(state).items() if name.endswith("skipped_steps")
        ]
    except ValueError:
        ours = []
    found = [jnp.asarray(x, jnp.float32) for x in (*theirs, *ours)]
    return jnp.sum(jnp.stack(found)) if found else jnp.full((), jnp.nan, jnp.float32)
