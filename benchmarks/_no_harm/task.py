"""What a healthy run is made of, and one optimizer step of it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import stablegrad as sg

Wrap = Callable[[optax.GradientTransformation], optax.GradientTransformation]
# Compiling takes longer than most runs; this halves it, and slows none of them down.
QUICKLY = {"xla_backend_optimization_level": 1}
EVALUATIONS = 20  # In the course of a run; its steps are a multiple.


class World(NamedTuple):
    """What changes from step to step."""

    params: dict[str, Any]  # By the name of their optimizer.
    states: dict[str, Any]
    memory: Any  # Target network, environment, replay: whatever no optimizer moves.


class Start(NamedTuple):
    """What a seed begins with."""

    params: dict[str, Any]
    data: Any = None  # What never changes.
    memory: Any = None


def last_three(scores) -> jax.Array:
    """The usual result: the mean of the last three evaluations."""
    return jnp.mean(scores[-3:])


class Task(NamedTuple):
    """One healthy run.

    `step(world, data, key, t, learn)` returns the next world. It takes optimizer steps
    by `learn(world, loss_of_params, who)`, so it never sees what guards them. `score`
    is evaluated before training and `EVALUATIONS` times in its course; `result` makes
    one number of the latter. Everything random comes from the seed's keys: two methods
    see the same data, initial weights and batches.
    """

    name: str
    kind: str
    metric: str
    higher: bool  # Whether more of it is better.
    goal: float  # What the bare run reaches on average, or it is not healthy.
    steps: int
    optimizers: Callable[[Wrap], dict[str, optax.GradientTransformation]]
    begin: Callable[[jax.Array], Start]
    step: Callable[..., World]
    score: Callable[[World, Any], jax.Array]
    result: Callable[[jax.Array], jax.Array] = last_three
    looks: bool = True  # Whether a step's loss is a function to minimise: `value_fn=`.
    updates: int = 1  # Of each optimizer in a step.

    def reached(self, result: float) -> bool:
        """Whether a bare run is as good as a healthy one."""
        return result >= self.goal if self.higher else result <= self.goal


def single(inner: Callable[[], optax.GradientTransformation]):
    """One optimizer, with the guard around all of it."""
    return lambda wrap: {"model": wrap(inner())}


def supervised(draw: Callable, loss: Callable) -> Callable:
    """The step of a run that is given: batches, and a loss of parameters and batch."""

    def step(world: World, data, key, t, learn) -> World:
        batch = draw(data, key, t)
        return learn(world, lambda params: loss(params, batch))

    return step


class Learner:
    """Takes one optimizer step of one method."""

    def __init__(self, txs: dict[str, optax.GradientTransformation], looks: bool):
        """Remembers the optimizers, and whether `value_fn=` is passed."""
        self.txs = txs
        self.looks = looks

    def __call__(self, world: World, loss: Callable, who="model", scale=1.0) -> World:
        """Moves the parameters of `who`; meanwhile the loss is `scale` times itself."""
        params = world.params[who]
        value, grads = jax.value_and_grad(lambda p: scale * loss(p))(params)
        value = value / scale
        grads = jax.tree.map(lambda g: g / scale, grads)
        extra = {"value": value, **({"value_fn": loss} if self.looks else {})}
        params, state = sg.apply(
            self.txs[who], grads, world.states[who], params, **extra
        )
        return world._replace(
            params={**world.params, who: params}, states={**world.states, who: state}
        )


class Reading(NamedTuple):
    """What the guards of a run have counted so far, after each step."""

    guarded: jax.Array  # Steps, of all guards of the run.
    clipped: jax.Array
    skipped: jax.Array
    backed_off: jax.Array
    shortened: jax.Array
    lr_scale: jax.Array  # The lowest, after this step.


def read(states: dict[str, Any], updates_so_far: jax.Array) -> Reading:
    """Reads all guards and clips in the states, if there are any."""
    totals = {name: jnp.zeros((), jnp.int32) for name in Reading._fields}
    totals["lr_scale"] = jnp.ones(())
    endings = {
        "guarded_steps": "guarded",
        "clipped_steps": "clipped",
        "dropped_steps": "skipped",
        "skipped_steps": "skipped",
        "backed_off_steps": "backed_off",
        "shortened_steps": "shortened",
    }
    for state in states.values():
        try:
            found = sg.metrics(state)
        except ValueError:  # Neither a guard nor a clip.
            found = {}
        for key, number in found.items():
            for ending, name in endings.items():
                if key.endswith(ending):
                    totals[name] = totals[name] + number
        lowest = found.get("lr_scale", jnp.ones(()))
        totals["lr_scale"] = jnp.minimum(totals["lr_scale"], lowest)
        if "guarded_steps" not in found:
            totals["guarded"] = totals["guarded"] + updates_so_far
    return Reading(**totals)


class Outcome(NamedTuple):
    """What a method made of a task; the first axis is the seed."""

    start: np.ndarray
    results: np.ndarray
    curves: np.ndarray  # (seeds, evaluations)
    readings: Reading  # (seeds, steps)


def compiled(function: Callable) -> Callable:
    """The function over all seeds at once, compiled in a hurry where possible."""
    options = QUICKLY if jax.default_backend() == "cpu" else None
    return jax.jit(jax.vmap(function), compiler_options=options)


class Runs:
    """All seeds of one task, begun once for all methods."""

    def __init__(self, task: Task, seeds: range, steps: int | None = None):
        """Draws data and initial weights, and evaluates them."""
        self.task = task
        steps = task.steps if steps is None else steps
        self.chunk = max(1, steps // EVALUATIONS)

        def begin(seed):
            begin_key, run_key = jax.random.split(jax.random.key(seed))
            start = task.begin(begin_key)
            world = World(start.params, {}, start.memory)
            return start, run_key, task.score(world, start.data)

        numbers = jnp.arange(seeds.start, seeds.stop)
        self.starts, self.keys, self.before = compiled(begin)(numbers)

    def run(self, wrap: Wrap, looks: bool = False) -> Outcome:
        """Trains all seeds at once by one method."""
        task = self.task
        txs = task.optimizers(wrap)
        learn = Learner(txs, looks and task.looks)

        def one(start, run_key):
            states = {who: txs[who].init(p) for who, p in start.params.items()}

            def step(world, t):
                key = jax.random.fold_in(run_key, t)
                world = task.step(world, start.data, key, t, learn)
                return world, read(world.states, (t + 1) * task.updates)

            def stage(world, ts):
                world, readings = jax.lax.scan(step, world, ts)
                return world, (task.score(world, start.data), readings)

            world = World(start.params, states, start.memory)
            ts = jnp.arange(EVALUATIONS * self.chunk).reshape(EVALUATIONS, -1)
            _, (scores, readings) = jax.lax.scan(stage, world, ts)
            return task.result(scores), scores, jax.tree.map(jnp.ravel, readings)

        outcome = compiled(one)(self.starts, self.keys)
        results, curves, readings = jax.tree.map(np.asarray, outcome)
        return Outcome(np.asarray(self.before), results, curves, readings)
