"""Runs one candidate at every rate and seed, and keeps what is measured."""

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from ._candidates import Candidate
from ._compiled import Programs
from ._plan import Plan
from ._problem import Problem


class Curves(NamedTuple):
    """What became of all runs of a candidate; the first axes are rates and seeds."""

    train: np.ndarray  # (..., steps): the loss before every step, nan where none was.
    loss: np.ndarray  # (..., evaluations)
    accuracy: np.ndarray  # (..., evaluations)
    dead: np.ndarray  # (..., evaluations)
    skipped: np.ndarray  # (..., evaluations)
    ended: np.ndarray  # (...): evaluations that were made.
    best: np.ndarray  # (...): the evaluation that counts.


class Runs:
    """The runs of one candidate; `train()` yields the share done after each chunk."""

    def __init__(self, problem: Problem, one: Candidate, plan: Plan):
        self._problem, self._one, self._plan = problem, one, plan
        rates = plan.rates[:1] if one.own_rate else plan.rates
        self._members = [(rate, seed) for rate in rates for seed in plan.seeds]
        shape, looks = (len(self._members),), len(plan.evaluations)
        empty = lambda *size: np.full((*shape, *size), np.nan, np.float32)
        none = np.zeros(shape, int)
        self._flat = Curves(
            train=empty(plan.steps),
            loss=empty(looks),
            accuracy=empty(looks),
            dead=empty(looks),
            skipped=empty(looks),
            ended=none,
            best=none.copy(),
        )
        self._grid = (len(rates), len(plan.seeds))
        self.compile_seconds = self.run_seconds = self.step_seconds = 0.0
        self.steps_run = 0
        self.at_once = len(self._members)

    @property
    def curves(self) -> Curves:
        """What has been measured so far."""
        return Curves(*(x.reshape(*self._grid, *x.shape[1:]) for x in self._flat))

    def train(self) -> Iterator[float]:
        """Takes all steps of all runs, group by group."""
        groups = self._groups()
        total = self._plan.steps * len(self._members)
        for done, (programs, members) in _counted(groups):
            for step in self._train_group(programs, members):
                yield (done * self._plan.steps + step * len(members)) / total

    def _groups(self):
        """Programs, and the members that share each call of them."""
        members = np.arange(len(self._members))
        try:
            programs = self._programs(members, None)
        except (jax.errors.JAXTypeError, TypeError) as traced:
            # A transformation that looks at its rate in Python: a program a rate.
            rates = [rate for rate, _ in self._members]
            for rate in sorted(set(rates)):
                same = members[np.equal(rates, rate)]
                try:
                    programs = self._programs(same, rate)
                except (jax.errors.JAXTypeError, TypeError) as concrete:
                    raise concrete from traced
                yield from self._split(programs, same)
        else:
            yield from self._split(programs, members)

    def _split(self, programs, members):
        for first in range(0, len(members), programs.at_once):
            yield programs, members[first : first + programs.at_once]

    def _programs(self, members, rate) -> "Programs":
        began = time.perf_counter()
        programs = Programs(self._problem, self._one, self._plan, rate)
        first = [self._members[i] for i in members]
        programs.fit(first, self._plan.at_once)
        self.at_once = min(self.at_once, programs.at_once)
        self.compile_seconds += time.perf_counter() - began
        return programs

    def _train_group(self, programs: "Programs", members) -> Iterator[int]:
        plan, flat = self._plan, self._flat
        pairs = [self._members[i] for i in members]
        began = time.perf_counter()
        runs = programs.start(pairs)
        last = np.full(len(members), np.nan, np.float32)
        alive = np.ones(len(members), bool)
        lowest, bad = np.full(len(members), np.inf), np.zeros(len(members), int)
        for index, step in enumerate(plan.evaluations):
            runs, seen = programs.look(runs, last)
            for name, values in seen._asdict().items():
                field = getattr(flat, name)
                field[members[alive], index] = np.asarray(values)[alive]
            flat.ended[members[alive]] = index + 1
            loss = flat.loss[members, index]
            better = alive & (loss < lowest)
            lowest[better], bad = loss[better], np.where(better, 0, bad + 1)
            keep = better if plan.patience is not None else alive
            flat.best[members[keep]] = index
            if plan.patience is not None and index:
                alive &= bad < plan.patience
            if index:  # Before the first step there may be no loss to look at.
                alive &= np.isfinite(loss)
            number = min(plan.every, plan.steps - step)
            if number <= 0 or not alive.any():
                break
            started = time.perf_counter()
            runs, losses = programs.advance(runs, pairs, int(step), int(number))
            self.step_seconds += time.perf_counter() - started
            losses = np.asarray(losses)[:, :number]
            flat.train[members[alive], step : step + number] = losses[alive]
            last = _mean_of_finite(losses)
            self.steps_run += len(members) * int(number)
            yield int(step + number)
        self.run_seconds += time.perf_counter() - began
        yield plan.steps


def _mean_of_finite(losses: np.ndarray) -> np.ndarray:
    """Of each run; nan without one. A guard may have survived the others."""
    finite = np.isfinite(losses)
    total = np.where(finite, losses, 0.0).sum(axis=1)
    count = finite.sum(axis=1)
    return np.where(count, total / np.maximum(count, 1), np.nan).astype(np.float32)


def _counted(groups) -> Iterator[tuple[int, Any]]:
    """Each group, and how many runs came before it."""
    done = 0
    for programs, members in groups:
        yield done, (programs, members)
        done += len(members)
