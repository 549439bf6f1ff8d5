"""The compiled functions of one candidate, for as many runs at once as fit."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np

from ._candidates import Candidate
from ._plan import Plan
from ._problem import Problem
from ._run import Run, Seen, advance, look, start

SHARE = 0.5  # Of the memory there is, for the runs of one candidate.


class Programs:
    """The compiled functions of one candidate, for a fixed number of runs at once."""

    def __init__(self, problem: Problem, one: Candidate, plan: Plan, rate):
        """`rate` is a Python number where it cannot be traced, else None."""
        self._problem, self._plan, self._rate = problem, plan, rate
        fixed = lambda function: functools.partial(function, problem, one, plan.steps)
        self._functions = fixed(start), fixed(advance), functools.partial(look, problem)
        self.at_once = 0

    def fit(self, pairs, limit: int | None) -> None:
        """Compiles for all pairs at once, or for as many as memory allows."""
        self.at_once = min(len(pairs), limit or len(pairs))
        while True:
            self._compile(pairs[: self.at_once])
            needed, there = _needed(self._advance), _memory()
            if self.at_once == 1 or needed <= there:
                return
            self.at_once = max(1, int(self.at_once * there / needed))

    def _compile(self, pairs) -> None:
        begin, forward, evaluate = self._functions
        if self._rate is not None:
            bind = lambda f: lambda rate, *args: f(self._rate, *args)
            begin, forward = bind(begin), bind(forward)
        if self.at_once > 1:
            begin = jax.vmap(begin)
            forward = jax.vmap(forward, in_axes=(0, 0, None, 0, None))
            evaluate = jax.vmap(evaluate, in_axes=(0, None, 0))
        rates, keys = self._rates_and_keys(pairs)
        runs = jax.eval_shape(begin, rates, keys)
        draws = self._draws(pairs, 0, self._plan.every)
        data, validation = self._problem.data, self._problem.validation
        # The same for every candidate, and so handed over, not built in.
        self._advance = (
            jax.jit(forward, donate_argnums=1)
            .lower(rates, runs, data, draws, jnp.int32(0))
            .compile()
        )
        self._start = jax.jit(begin).lower(rates, keys).compile()
        self._look = (
            jax.jit(evaluate, donate_argnums=0).lower(runs, validation, rates).compile()
        )

    def start(self, pairs) -> Run:
        """The runs before their first step."""
        return self._start(*self._rates_and_keys(pairs))

    def advance(self, runs: Run, pairs, step: int, number: int):
        """Takes `number` steps from `step` on; returns the runs and their losses."""
        rates, _ = self._rates_and_keys(pairs)
        draws = self._draws(pairs, step, number)
        runs, losses = self._advance(
            rates, runs, self._problem.data, draws, jnp.int32(number)
        )
        return runs, np.atleast_2d(np.asarray(losses))[: len(pairs)]

    def look(self, runs: Run, last: np.ndarray) -> tuple[Run, Seen]:
        """Evaluates the runs; `last` are losses of the training batches before."""
        losses = jnp.asarray(self._filled(list(last)), jnp.float32)
        losses = losses if self.at_once > 1 else losses[0]
        runs, seen = self._look(runs, self._problem.validation, losses)
        cut = lambda x: np.atleast_1d(x)[: len(last)]
        return runs, jax.tree.map(cut, jax.device_get(seen))

    def _filled(self, items: list) -> list:
        """A last group with fewer runs is filled up with its own first."""
        return items + items[:1] * (self.at_once - len(items))

    def _rates_and_keys(self, pairs):
        rates, seeds = zip(*self._filled(list(pairs)), strict=True)
        keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))
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
