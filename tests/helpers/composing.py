"""A small regression with faults, for tests of what a guard composes with."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

import stablegrad as sg
from helpers.training import stack

STEPS = 120
NAN_STEP, SPIKE_STEP = 31, 63  # The spike after 25 steps of warm-up.
FAULTS = np.ones(STEPS, np.float32)
FAULTS[[NAN_STEP, SPIKE_STEP]] = np.nan, 1e4
CLEAN = np.ones(STEPS, np.float32)
LOW = 0.1  # Of a loss that starts above 1.
X = jax.random.normal(jax.random.key(1), (STEPS, 16, 3))
Y = X[..., :1] - 0.5 * X[..., 1:2]


class Run(NamedTuple):
    """What a run left behind; leaves of `history` have a leading axis: step."""

    params: Any
    state: Any
    losses: np.ndarray
    history: tuple[Any, Any]  # Parameters and state after each step.

    @property
    def last(self):
        """The loss of the final parameters, over all batches without a fault."""
        return clean_loss(self.params)

    def at(self, step):
        """Parameters and state after a step."""
        return jax.tree.map(lambda leaf: leaf[step], self.history)


def start():
    """Parameters of two layers: a tree of two levels, matrices and vectors."""
    first, last = jax.random.split(jax.random.key(0))
    return {
        "first": {
            "bias": jnp.zeros(8),
            "kernel": 0.5 * jax.random.normal(first, (3, 8)),
        },
        "last": {
            "bias": jnp.zeros(1),
            "kernel": 0.3 * jax.random.normal(last, (8, 1)),
        },
    }


def loss_fn(params, batch):
    """Mean squared error of a tanh network."""
    x, y = batch
    first, last = params["first"], params["last"]
    hidden = jnp.tanh(x @ first["kernel"] + first["bias"][None])
    return jnp.mean((hidden @ last["kernel"] + last["bias"][None] - y) ** 2)


@jax.jit
def clean_loss(params):
    """The loss over all batches, without a fault."""
    return loss_fn(params, (X.reshape(-1, 3), Y.reshape(-1, 1)))


def guarded(inner):
    """A guard that needs no loss and compiles in half the time of `stabilize`."""
    return sg.guard(inner, sg.skip(sg.nonfinite(), sg.zscore(6.0)))


def on_targets(grad_fn, params, batch, fault):
    """A fault of the data: targets times 1, nan, or 1e4."""
    x, y = batch
    return grad_fn(params, (x, y * fault))


def train(tx, faults=FAULTS, *, params=None, spoil=on_targets, extra=None, fast=None):
    """Runs `tx` under `sg.apply` over one batch a step.

    `spoil` takes value and gradient of a batch with its fault; `extra(batch, loss,
    grads)` gives the arguments of a step, by default `value=`; `fast` picks from the
    parameters what the network takes.
    """
    pick = fast or (lambda params: params)
    grad_fn = jax.value_and_grad(loss_fn)

    @jax.jit
    def step(params, state, x, y, fault):
        loss, grads = spoil(grad_fn, pick(params), (x, y), fault)
        spoilt = (x, y * fault)
        more = {"value": loss} if extra is None else extra(spoilt, loss, grads)
        return *sg.apply(tx, grads, state, params, **more), loss

    params = start() if params is None else params
    state, rows = jax.jit(tx.init)(params), []
    for x, y, fault in zip(np.asarray(X), np.asarray(Y), faults, strict=False):
        params, state, loss = step(params, state, x, y, fault)
        rows.append(jax.device_get((loss, (params, state))))
    losses, history = stack(rows)
    return Run(params, state, losses, history)


def without_loss(batch, loss, grads):
    """For a wrapper that passes nothing on."""
    del batch, loss, grads
    return {}


def dies(tx, **settings):
    """Whether the same faults end the bare optimizer's run."""
    params = train(tx, **settings).params
    return not all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(params))


def assert_survived(run, skipped=2, low=LOW):
    """Trained, finite, with the exact number of skipped steps."""
    chex.assert_tree_all_finite((run.params, run.state))
    assert sg.metrics(run.state)["skipped_steps"] == skipped
    assert run.last < low


def assert_untouched(run, step):
    """A rejected step left parameters and inner state bit for bit as they were."""
    before, after = run.at(step - 1), run.at(step)
    chex.assert_trees_all_equal(after[0], before[0])
    chex.assert_trees_all_equal(after[1].guarded_inner, before[1].guarded_inner)


def moved(run):
    """For each step after the first, whether any parameter changed."""
    rows = [np.asarray(leaf).reshape(STEPS, -1) for leaf in jax.tree.leaves(run[3][0])]
    return (np.diff(np.concatenate(rows, axis=1), axis=0) != 0).any(axis=1)


def open_to_extra(wrapper):
    """A wrapper such as `optax.MultiSteps` as a transformation that passes `value=`."""
    return optax.GradientTransformationExtraArgs(wrapper.init, wrapper.update)
