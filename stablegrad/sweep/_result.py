"""What a comparison found: ranked rows, and all curves behind them."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from ._curves import divergence, spikes
from ._figure import draw
from ._running import Runs
from ._scores import Mean, Scores, capped, mean, score
from ._table import table


@dataclasses.dataclass(frozen=True)
class Row:
    """One candidate. Arrays of runs have the axes (learning rates, seeds)."""

    name: str
    scores: Scores  # Over the rates; see `best_rate`, `sensitivity`, `band`, `cliff`.
    rates: tuple[float, ...]  # nan: the candidate's own.
    steps: np.ndarray  # (evaluations,): before which of them it was evaluated.
    train: np.ndarray  # (rates, seeds, steps): training losses.
    validation: np.ndarray  # (rates, seeds, evaluations)
    accuracies: np.ndarray  # (rates, seeds, evaluations), in [0, 1], or nan.
    loss: Mean  # Final, at the best rate, over seeds; at most that before training.
    accuracy: Mean  # There, too; nan if none was measured.
    skipped: float  # Steps skipped at the best rate, mean over seeds; nan: no guard.
    spikes: float  # Training losses 7 sigma above the last 1,000; there, too.
    rounds: float  # Steps up to the evaluation that counts; there, too.
    diverged: np.ndarray  # (rates, seeds): from which step on it was lost, -1: not.
    trivial: np.ndarray  # (rates,): whether a constant predictor is as good, some seed.
    dead: float  # Share of dead units at the best rate, in [0, 1]; nan: not measured.
    seconds: float  # All runs together, without compilation.
    compile_seconds: float
    step_ms: float  # One step of one run, milliseconds; runs share the machine.
    at_once: int  # Runs that shared a program.


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The result of `compare`: `print` it, draw it, save it.

    Attributes:
        rows: One a candidate, the lowest final loss first.
        failed: Candidates that did not run, or not to the end, and why.
        steps: How many steps a run had.
        seeds: From which seeds.
        validated: Whether losses are those of a validation set, or of training.
        interrupted: Whether it was stopped by hand; what was done is there.
    """

    rows: tuple[Row, ...]
    failed: dict[str, str]
    steps: int
    seeds: tuple[int, ...]
    validated: bool
    interrupted: bool = False

    def __str__(self) -> str:
        """The ranked table, and what its columns mean."""
        return table(self)

    def row(self, name: str) -> Row:
        """The row of a candidate; KeyError says which there are."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"no row {name!r}; there are {[row.name for row in self.rows]}")

    def records(self) -> list[dict[str, Any]]:
        """The table as plain dicts, for a data frame or JSON."""
        return [
            {
                "candidate": row.name,
                "learning_rate": row.scores.best_rate,
                "loss": row.loss.mean,
                "loss_error": row.loss.error,
                "accuracy": row.accuracy.mean,
                "sensitivity": row.scores.sensitivity.mean,
                "band_decades": row.scores.band,
                "cliff": row.scores.cliff,
                "skipped": row.skipped,
                "spikes": row.spikes,
                "rounds": row.rounds,
                "runs_diverged": int((row.diverged >= 0).sum()),
                "first_divergence": first_divergence(row),
                "trivial": bool(row.trivial[row.scores.loss.argmin()]),
                "dead": row.dead,
                "seconds": row.seconds,
                "compile_seconds": row.compile_seconds,
                "step_ms": row.step_ms,
            }
            for row in self.rows
        ]

    def save(self, path: str | Path) -> None:
        """Writes all numbers, with the curves, as JSON; null stands for nan and inf."""
        rows = [
            {
                **record,
                "learning_rates": list(row.rates),
                "evaluated_before_steps": row.steps.tolist(),
                "train": row.train.tolist(),
                "validation": row.validation.tolist(),
                "accuracies": row.accuracies.tolist(),
                "diverged": row.diverged.tolist(),
            }
            for record, row in zip(self.records(), self.rows, strict=True)
        ]
        whole = {
            "steps": self.steps,
            "seeds": list(self.seeds),
            "interrupted": self.interrupted,
            "failed": self.failed,
            "rows": rows,
        }
        Path(path).write_text(json.dumps(_without_nan(whole)))

    def figure(self, most: int = 10) -> Any:
        """Draws training curves, and final loss against learning rate.

        Args:
            most: How many of the best candidates to draw, >= 1.

        Returns:
            A `matplotlib.figure.Figure`, for `savefig` or a notebook.

        Raises:
            ImportError: Without Matplotlib.
        """
        return draw(self, most)


def first_divergence(row: Row) -> int:
    """The earliest step at which a run of a row was lost, or -1."""
    lost = row.diverged[row.diverged >= 0]
    return int(lost.min()) if lost.size else -1


def row_of(name: str, runs: Runs, rates, steps, trivial_loss: float | None) -> Row:
    """The row of a candidate whose runs are done."""
    curves = runs.curves
    pick = lambda field: np.take_along_axis(field, curves.best[..., None], -1)[..., 0]
    final, accuracy, dead = map(pick, (curves.loss, curves.accuracy, curves.dead))
    end = curves.ended[..., None] - 1
    skipped = np.take_along_axis(curves.skipped, end, -1)[..., 0]
    first = curves.loss[..., 0]
    initial = np.where(np.isfinite(first), first, curves.train[..., 0])
    bound = np.inf if trivial_loss is None else trivial_loss
    seeds = range(final.shape[1])
    known = np.nan_to_num(np.asarray(rates), nan=1.0)
    per_seed = [(initial[:, i], final[:, i], accuracy[:, i], dead[:, i]) for i in seeds]
    scores = score(known, bound, per_seed)
    at = int(scores.loss.argmin())
    scores = scores._replace(best_rate=float(rates[at]))
    if len(rates) == 1:  # Nothing depends on a rate that is not changed.
        none = Mean(np.nan, np.nan)
        scores = scores._replace(
            sensitivity=none, normalised=none, band=np.nan, cliff=np.nan
        )
    taken = steps[curves.best]
    lengths = steps[curves.ended - 1]  # A run that was ended has no losses after.
    each = lambda function: np.reshape(
        [function(curves.train[i][: lengths[i]]) for i in np.ndindex(lengths.shape)],
        lengths.shape,
    )
    return Row(
        name=name,
        scores=scores,
        rates=tuple(rates),
        steps=steps,
        train=curves.train,
        validation=curves.loss,
        accuracies=curves.accuracy,
        loss=mean(capped(final[at], initial[at])),
        accuracy=mean(accuracy[at]),
        skipped=float(skipped[at].mean()),
        spikes=float(each(spikes)[at].mean()),
        rounds=float(taken[at].mean()),
        diverged=each(divergence),
        trivial=scores.trivial & (trivial_loss is not None),
        dead=float(scores.dead[at]),
        seconds=runs.run_seconds,
        compile_seconds=runs.compile_seconds,
        step_ms=1000 * runs.step_seconds / max(1, runs.steps_run),
        at_once=runs.at_once,
    )


def _without_nan(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {name: _without_nan(value) for name, value in tree.items()}
    if isinstance(tree, list):
        return [_without_nan(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
