"""The training of one run as pure functions, to be compiled and vectorized."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from .._extra_args import with_extra_args
from .._observe import metrics
from .._trees import nodes
from ..learning_rate._observe_metric import observe_metric
from ._candidates import Candidate
from ._experiment import Experiment
from ._lookahead import LookaheadState

Run = tuple[Any, Any]  # Parameters and optimizer state.


@dataclasses.dataclass(frozen=True)
class Trainer:
    """The training of a candidate; `rate`, if given, replaces traced rates."""

    experiment: Experiment
    candidate: Candidate
    rate: float | None = None

    def init(self, rate, key) -> Run:
        params = self.experiment.init(key)
        return params, self._optimizer(rate).init(params)

    def step(self, rate, run: Run, data, draws, i) -> tuple[Run, jax.Array]:
        """Take a step with `draws[i]`; return the run and the loss before the step."""
        batch = self.experiment.batch(data, draws[i])
        step = self.experiment.step or self._default_step
        params, opt_state, loss = step(self._optimizer(rate), *run, batch)
        return (params, opt_state), loss.astype(jnp.float32)

    def steps(self, rate, run: Run, data, draws, number) -> tuple[Run, jax.Array]:
        """Take steps with the first `number` draws; later losses are nan."""

        def body(i, carry):
            run, losses = carry
            run, loss = self.step(rate, run, data, draws, i)
            return run, losses.at[i].set(loss)

        losses = jnp.full(self.experiment.interval, jnp.nan, jnp.float32)
        return jax.lax.fori_loop(0, number, body, (run, losses))

    def evaluate(self, run: Run, batch) -> dict[str, jax.Array]:
        """Return the mean loss, the mean accuracy and which hidden units are active."""
        params = _evaluation_params(*run)
        found = self.experiment.evaluate(params, batch)
        found = found if isinstance(found, dict) else {"loss": found}
        active = [jnp.zeros((0,), bool)]
        if self.experiment.hidden is not None:
            for x in jax.tree.leaves(self.experiment.hidden(params, batch)):
                active.append(jnp.any(x > 0, axis=tuple(range(x.ndim - 1))))
        scalar = lambda name: jnp.asarray(found.get(name, jnp.nan), jnp.float32)
        means = {name: scalar(name) for name in ("loss", "accuracy")}
        return {**means, "active": jnp.concatenate(active)}

    def observe(self, run: Run, loss) -> tuple[Run, jax.Array]:
        """Pass an evaluated loss to the optimizer; return the run and skipped steps."""
        params, state = run
        if self.candidate.observes:
            state = observe_metric(state, value=loss)
        return (params, state), _skipped_steps(state)

    def _optimizer(self, rate) -> optax.GradientTransformationExtraArgs:
        rate = rate if self.rate is None else self.rate
        tx = self.candidate.build(rate, self.experiment.steps)
        tx = with_extra_args(tx)
        if "value_fn" not in self.candidate.extra:
            return tx

        def update_fn(updates, state, params=None, **extra):
            if extra.get("value_fn") is None:
                raise ValueError(
                    f"{self.candidate.name!r} probes the loss along the update: the "
                    "training step must pass `value_fn=` to `tx.update`."
                )
            return tx.update(updates, state, params, **extra)

        return optax.GradientTransformationExtraArgs(tx.init, update_fn)

    def _default_step(self, tx, params, opt_state, batch):
        value_fn = lambda params: self.experiment.loss(params, batch)
        value, grad = jax.value_and_grad(value_fn)(params)
        available = {"value": value, "grad": grad, "value_fn": value_fn}
        extra = {name: available[name] for name in self.candidate.extra}
        updates, opt_state = tx.update(grad, opt_state, params, **extra)
        return optax.apply_updates(params, updates), opt_state, value


def _evaluation_params(params, opt_state):
    """Return the averaged or slow weights of optimizers that keep them."""
    for state in _find_states(opt_state, optax.contrib.ScheduleFreeState):
        return optax.contrib.schedule_free_eval_params(state, params)
    for state in _find_states(opt_state, LookaheadState):
        return state.slow_weights
    return params


def _skipped_steps(opt_state) -> jax.Array:
    """Return the number of steps that guards have skipped; nan without a guard."""
    guards = _find_states(opt_state, optax.ApplyIfFiniteState)
    skipped = [guard.total_notfinite for guard in guards]
    try:
        found = metrics(opt_state)
    except ValueError:
        found = {}
    skipped += [x for name, x in found.items() if name.endswith("skipped_steps")]
    return jnp.asarray(sum(skipped) if skipped else jnp.nan, jnp.float32)


def _find_states(opt_state, kind: type) -> list:
    return nodes(opt_state, lambda node: isinstance(node, kind))
