"""All runs of one candidate: grouping, evaluation and early stopping."""

import time
from collections.abc import Iterator

import jax
import numpy as np

from ._candidates import Candidate
from ._compiled import Programs
from ._experiment import Experiment
from ._trainer import Trainer

STUCK = 10  # Skipped steps at the end of a run that break it, as `roll_back(after=10)`.


class Runs:
    """Runs of one candidate at every learning rate from every seed.

    Arrays have the axes (rates, seeds, ...), and are nan where nothing was measured.
    """

    def __init__(self, experiment: Experiment, candidate: Candidate):
        """Allocate the measurements; `train` fills them."""
        self.experiment, self.candidate = experiment, candidate
        self.rates = (np.nan,) if candidate.own_rate else experiment.rates
        rates, seeds = experiment.rates[: len(self.rates)], experiment.seeds
        self._members = [(rate, seed) for rate in rates for seed in seeds]
        grid, evaluations = (len(rates), len(seeds)), len(experiment.evaluations)
        empty = lambda size: np.full((*grid, size), np.nan, np.float32)
        self.train_loss = empty(experiment.steps)  # Before each step.
        names = ("loss", "accuracy", "dead", "skipped")
        self.measured = {name: empty(evaluations) for name in names}
        self.ended = np.zeros(grid, int)  # Number of evaluations.
        self.best = np.zeros(grid, int)  # Index of the evaluation that counts.
        self.compile_seconds = self.run_seconds = self.step_seconds = 0.0
        self.steps_taken = 0
        self.at_once = len(self._members)

    def train(self) -> Iterator[float]:
        """Train all runs, group by group; yield the share that is done."""
        steps, done = self.experiment.steps, 0
        for programs, indices in self._groups():
            for step in self._train_group(programs, indices):
                share = done * steps + step * len(indices)
                yield share / (steps * len(self._members))
            done += len(indices)

    def _groups(self) -> Iterator[tuple[Programs, np.ndarray]]:
        """Yield programs, and the indices of the runs that they train together."""
        indices = np.arange(len(self._members))
        try:
            compiled = [(self._compile(indices), indices)]
        except (jax.errors.JAXTypeError, TypeError):
            # The candidate needs a Python number for its rate: one program per rate.
            compiled = (
                (self._compile(of_rate, self._members[of_rate[0]][0]), of_rate)
                for of_rate in indices.reshape(self.best.shape)
            )
        for programs, indices in compiled:
            for first in range(0, len(indices), programs.size):
                yield programs, indices[first : first + programs.size]

    def _compile(self, indices, rate: float | None = None) -> Programs:
        trainer = Trainer(self.experiment, self.candidate, rate)
        programs = Programs(trainer, [self._members[i] for i in indices])
        self.at_once = min(self.at_once, programs.size)
        self.compile_seconds += programs.compile_seconds
        return programs

    def _train_group(self, programs: Programs, indices) -> Iterator[int]:
        """Train one group; yield the number of steps taken so far."""
        started = time.perf_counter()
        experiment, count = self.experiment, len(indices)
        by_run = lambda values: values.reshape(len(self._members), -1)
        # Programs are compiled for a fixed number of runs: a smaller group is repeated.
        indices = np.resize(indices, programs.size)
        members = [self._members[i] for i in indices]
        runs = programs.init(members)
        alive = np.ones(programs.size, bool)
        lowest = np.full(programs.size, np.inf)
        train_loss = np.full(programs.size, np.nan)
        broken = np.zeros(programs.size, int)  # Losses of the interval not finite.
        for index, step in enumerate(experiment.evaluations.tolist()):
            runs, found = programs.evaluate(runs, train_loss)
            for name, values in found.items():
                values = np.broadcast_to(values, alive.shape)[alive]
                by_run(self.measured[name])[indices[alive], index] = values
            self.ended.flat[indices[alive]] = index + 1
            skipped = self._skipped_all(indices, index, broken)
            if not experiment.slices:  # The loss is the mean of the finite ones.
                lost = alive & (broken > 0) & ~skipped
                by_run(self.measured["loss"])[indices[lost], index] = np.nan
            loss = by_run(self.measured["loss"])[indices, index]  # nan after the end.
            better, lowest = loss < lowest, np.fmin(loss, lowest)
            refused = ~np.isfinite(loss) & skipped
            counts = alive & ~refused if experiment.patience is None else better
            self.best.flat[indices[counts]] = index
            if experiment.patience is not None:
                alive &= index - self.best.flat[indices] < experiment.patience
            if index:  # Before the first step, there may be no loss.
                alive &= np.isfinite(loss) | refused
            number = min(experiment.interval, experiment.steps - step)
            if number == 0 or not alive.any():
                break
            step_started = time.perf_counter()
            runs, losses = programs.advance(runs, members, step, number)
            self.step_seconds += time.perf_counter() - step_started
            self.steps_taken += count * number
            steps = slice(step, step + number)
            by_run(self.train_loss)[indices[alive], steps] = losses[alive]
            broken = np.sum(~np.isfinite(losses), axis=1)
            train_loss = np.ma.masked_invalid(losses).mean(axis=1).filled(np.nan)
            yield step + number
        self.run_seconds += time.perf_counter() - started
        yield experiment.steps

    def _skipped_all(self, indices, index: int, broken) -> np.ndarray:
        """Return whether a guard has skipped all steps whose loss is not finite.

        `broken` counts them since the last evaluation. It is no excuse for a validation
        loss that is not finite, nor for a run that is stuck at its end.
        """
        by_run = lambda values: values.reshape(len(self._members), -1)[indices]
        skipped = by_run(self.measured["skipped"])
        rise = skipped[:, index] - skipped[:, max(index - 1, 0)]
        excused = (broken > 0) & (broken <= rise) & (not self.experiment.slices)
        if index == len(self.experiment.evaluations) - 1:
            last = by_run(self.train_loss)[:, -STUCK:]
            excused &= np.isfinite(last).any(axis=1) | (last.shape[1] < STUCK)
        return excused
