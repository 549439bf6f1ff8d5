"""The compiled programs of one candidate: many runs at once, each a step in a loop."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .._observe import metrics
from ..learning_rate._observe_metric import observe_metric
from ._candidates import Candidate
from ._lookahead import LookaheadState
from ._problem import Problem


class Run(NamedTuple):
    """What one run carries from step to step."""

    params: Any
    opt_state: Any


class Judged(NamedTuple):
    """What a run makes of some examples; float32, nan where there is nothing."""

    loss: Any  # (): the mean.
    accuracy: Any  # (): the mean.
    alive: Any  # bool, (hidden units,): whether any example raises it above zero.


def start(problem: Problem, one: Candidate, steps: int, rate, key) -> Run:
    """A run before its first step."""
    params = problem.init(key)
    return Run(params, _extended(one.build(rate, steps)).init(params))


def take_step(
    problem: Problem, one: Candidate, steps: int, rate, run: Run, data, draws, i
) -> tuple[Run, jax.Array]:
    """Takes the step that is number `i` of `draws`; returns run and loss before it."""
    tx = _extended(one.build(rate, steps))
    batch = problem.batch(data, jax.tree.map(lambda x: x[i], draws))
    params, opt_state, loss = _step(problem, one, tx, run, batch)
    return Run(params, opt_state), loss.astype(jnp.float32)


def take_steps(
    problem: Problem, one: Candidate, steps: int, rate, run: Run, data, draws, number
) -> tuple[Run, jax.Array]:
    """Takes the first `number` steps of `draws` in a loop; other losses are nan."""
    length = jax.tree.leaves(draws)[0].shape[0]

    def body(i, carry):
        run, losses = carry
        run, loss = take_step(problem, one, steps, rate, run, data, draws, i)
        return run, losses.at[i].set(loss)

    nothing = jnp.full(length, jnp.nan, jnp.float32)
    return jax.lax.fori_loop(0, number, body, (run, nothing))


def _step(problem: Problem, one: Candidate, tx, run: Run, batch):
    if problem.step is not None:
        return problem.step(_demanding(one, tx), run.params, run.opt_state, batch)
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


def _demanding(one: Candidate, tx):
    """The same, but an error where a training step keeps back what it looks along."""
    if "value_fn" not in one.extra:
        return tx

    def update_fn(updates, state, params=None, **extra):
        if extra.get("value_fn") is None:
            raise ValueError(
                f"{one.name!r} looks along the step: the training step must pass "
                "`value_fn=` to `tx.update`."
            )
        return tx.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(tx.init, update_fn)


def judge(problem: Problem, run: Run, batch) -> Judged:
    """Evaluates a run on some examples of the validation set."""
    params = weights(run)
    found = problem.evaluate(params, batch)
    found = found if isinstance(found, dict) else {"loss": found}
    number = lambda name: jnp.asarray(found.get(name, jnp.nan), jnp.float32)
    alive = [jnp.zeros((0,), bool)]
    if problem.hidden is not None:
        fires = lambda x: jnp.any(x > 0, axis=tuple(range(x.ndim - 1)))
        alive += [fires(x) for x in jax.tree.leaves(problem.hidden(params, batch))]
    return Judged(number("loss"), number("accuracy"), jnp.concatenate(alive))


def observe(one: Candidate, run: Run, loss) -> tuple[Run, jax.Array]:
    """Lets its plateau know of an evaluation; returns how many steps were skipped."""
    state = run.opt_state
    if one.observes:
        state = observe_metric(state, value=loss)
    return run._replace(opt_state=state), _skipped(state)


def weights(run: Run):
    """The parameters to evaluate: averaged by schedule-free, slow ones of Lookahead."""
    for free in _nodes(run.opt_state, optax.contrib.ScheduleFreeState):
        return optax.contrib.schedule_free_eval_params(free, run.params)
    for lookahead in _nodes(run.opt_state, LookaheadState):
        return lookahead.slow_weights
    return run.params


def _nodes(state, kind: type) -> list:
    """All states of one kind within a state."""
    is_one = lambda node: isinstance(node, kind)
    return [node for node in jax.tree.leaves(state, is_leaf=is_one) if is_one(node)]


def _extended(tx) -> optax.GradientTransformationExtraArgs:
    return optax.with_extra_args_support(tx)


def _skipped(state) -> jax.Array:
    """Steps that a guard of ours, or Optax's, has skipped; nan without one."""
    theirs = [node.total_notfinite for node in _nodes(state, optax.ApplyIfFiniteState)]
    try:
        ours = [
            x for name, x in metrics(state).items() if name.endswith("skipped_steps")
        ]
    except ValueError:
        ours = []
    found = [jnp.asarray(x, jnp.float32) for x in (*theirs, *ours)]
    return jnp.sum(jnp.stack(found)) if found else jnp.full((), jnp.nan, jnp.float32)
