"""The compiled functions of one candidate, for as many runs at once as fit."""

import functools
import os
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ._candidates import Candidate
from ._plan import Plan
from ._problem import Problem, key_of
from ._run import Judged, Run, judge, observe, start, take_step, take_steps

SHARE = 0.5  # Of the memory there is, for the runs of one candidate.


class Seen(NamedTuple):
    """What an evaluation found; float32, (runs,), nan where there is nothing."""

    loss: np.ndarray
    accuracy: np.ndarray
    dead: np.ndarray  # Share of hidden units that no example raises above zero.
    skipped: np.ndarray  # Steps since the start.


class Programs:
    """The compiled functions of one candidate, for a fixed number of runs at once."""

    def __init__(self, problem: Problem, one: Candidate, plan: Plan, rate):
        """`rate` is a Python number where it cannot be traced, else None."""
        self._problem, self._one, self._plan = problem, one, plan
        self._rate = rate
        self.at_once = 0

    def fit(self, pairs, limit: int | None) -> None:
        """Compiles for all pairs at once, or for as many as memory allows."""
        self.at_once = 1
        step = self._of_candidate(take_step)
        self._loops = not _slow_in_loops(step, self._given(pairs[:1]))
        # Nor are convolutions fast there for the weights of several runs.
        at_once = (len(pairs) if self._loops else 1) if limit is None else limit
        self.at_once = min(len(pairs), at_once)
        while True:
            self._compile(pairs[: self.at_once])
            needed, there = _needed(self._advance), _memory()
            if self.at_once == 1 or needed <= there:
                return
            self.at_once = max(1, int(self.at_once * there / needed))

    def _compile(self, pairs) -> None:
        begin, loop, step = map(self._of_candidate, (start, take_steps, take_step))
        evaluate = functools.partial(judge, self._problem)
        given = self._given(pairs)
        rates, runs, *_ = given
        compiled = lambda function, *given, donate=(): (
            jax.jit(function, donate_argnums=donate).lower(*given).compile()
        )
        advance = self._over(loop if self._loops else step, 0, 0, None, 0, None)
        self._advance = compiled(advance, *given, donate=1)
        self._start = compiled(self._over(begin, 0, 0), *self._rates_and_keys(pairs))
        observed = functools.partial(observe, self._one)
        self._observe = compiled(self._over(observed, 0, 0), runs, rates, donate=0)
        self._judge = {
            size: compiled(self._over(evaluate, 0, None), runs, batch)
            for size, batch in dict(self._problem.slices).items()
        }

    def _over(self, function, *axes):
        """The same for all runs of a group."""
        return jax.vmap(function, in_axes=axes) if self.at_once > 1 else function

    def _given(self, pairs):
        """What some steps are given, as far as shapes go."""
        begin = self._over(self._of_candidate(start), 0, 0)
        rates, keys = self._rates_and_keys(pairs)
        runs = jax.eval_shape(begin, rates, keys)
        draws = self._draws(pairs, 0, self._plan.every)
        # The data are the same for every candidate, so handed over and not built in.
        return rates, runs, self._problem.data, draws, jnp.int32(0)

    def _of_candidate(self, function):
        fixed = functools.partial(function, self._problem, self._one, self._plan.steps)
        if self._rate is None:
            return fixed
        return lambda rate, *args: fixed(self._rate, *args)

    def start(self, pairs) -> Run:
        """The runs before their first step."""
        return self._start(*self._rates_and_keys(pairs))

    def advance(self, runs: Run, pairs, first: int, number: int):
        """Takes `number` steps from `first` on; returns the runs and their losses."""
        rates, _ = self._rates_and_keys(pairs)
        given = (self._problem.data, self._draws(pairs, first, number))
        if self._loops:
            runs, losses = self._advance(rates, runs, *given, jnp.int32(number))
        else:
            each = []
            for i in range(number):
                runs, loss = self._advance(rates, runs, *given, jnp.int32(i))
                each.append(loss)
            losses = jnp.stack(each, axis=-1)
        return runs, np.atleast_2d(np.asarray(losses))[: len(pairs)]

    def look(self, runs: Run, last: np.ndarray) -> tuple[Run, Seen]:
        """Evaluates the runs; `last` are losses of the training batches before."""
        count, none = len(last), np.full_like(last, np.nan)
        found = Judged(last, none, np.zeros((count, 0), bool))
        if self._problem.slices:
            pairs = [(n, self._judge[n](runs, x)) for n, x in self._problem.slices]
            sizes, parts = zip(*jax.device_get(pairs), strict=True)
            found = _joined(sizes, parts, count)
        losses = jnp.asarray(self._filled(list(found.loss)), jnp.float32)
        runs, skipped = self._observe(runs, losses if self.at_once > 1 else losses[0])
        units = found.alive.shape[-1]
        dead = 1 - found.alive.mean(axis=-1) if units else none
        skipped = np.atleast_1d(skipped)[:count]
        return runs, Seen(found.loss, found.accuracy, dead, skipped)

    def _filled(self, items: list) -> list:
        """A last group with fewer runs is filled up with its own first."""
        return items + items[:1] * (self.at_once - len(items))

    def _rates_and_keys(self, pairs):
        rates, seeds = zip(*self._filled(list(pairs)), strict=True)
        keys = jax.vmap(key_of)(jnp.asarray(seeds, jnp.uint32))
        rates = jnp.asarray(rates, jnp.float32)
        return (rates, keys) if self.at_once > 1 else (rates[0], keys[0])

    def _draws(self, pairs, step: int, number: int):
        """What the runs draw; the last chunk is filled up, since shapes are fixed."""
        of_seed = {seed: self._plan.draws(seed, step, number) for _, seed in pairs}
        each = [of_seed[seed] for _, seed in self._filled(list(pairs))]
        missing = self._plan.every - number
        fill = lambda x: jnp.concatenate([x, jnp.repeat(x[:1], missing, axis=0)])
        each = [fill(x) if missing else x for x in each]
        return jnp.stack(each) if self.at_once > 1 else each[0]


def _joined(sizes, parts, count: int) -> Judged:
    """Means over all slices of the first `count` runs, and who fires in any."""
    stacked = lambda name: np.stack([getattr(part, name) for part in parts])
    mean = lambda name: np.atleast_1d(
        np.average(stacked(name).astype(np.float64), axis=0, weights=sizes)
    )[:count]
    alive = np.atleast_2d(stacked("alive").any(axis=0))[:count]
    return Judged(mean("loss"), mean("accuracy"), alive)


def _slow_in_loops(step, given) -> bool:
    """Whether XLA would run a step many times slower inside a loop.

    On a CPU it hands convolutions to a library, but not from within a loop.
    """
    if jax.default_backend() != "cpu":
        return False
    return "conv_general_dilated" in str(jax.make_jaxpr(step)(*given))


def _needed(compiled) -> int:
    """Bytes that a compiled program holds while it runs; 0 where nobody knows."""
    found = compiled.memory_analysis()
    if found is None:
        return 0
    return (
        found.argument_size_in_bytes
        + found.output_size_in_bytes
        + found.temp_size_in_bytes
        - found.alias_size_in_bytes
    )


def _memory() -> float:
    """Bytes that one candidate may take."""
    stats = jax.devices()[0].memory_stats() or {}
    there = stats.get("bytes_limit")
    if there is None:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return SHARE * there
