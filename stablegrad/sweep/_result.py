"""The result of a comparison: one row per candidate, as text, figure or data."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from .._text_files import write_whole
from ._curves import divergence, spikes, without_refused
from ._figure import draw
from ._runs import Runs
from ._scores import Mean, Scores, before_training, capped, mean, score
from ._table import table


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """Results of one candidate.

    "At the best rate" means at `scores.best_rate`, as a mean over seeds.
    """

    name: str
    scores: Scores  # Over the rates; nan if they need several rates.
    rates: tuple[float, ...]  # nan if the candidate has its own rate.
    steps: np.ndarray  # (evaluations,): number of steps before each evaluation.
    train: np.ndarray  # (rates, seeds, steps): training losses.
    validation: np.ndarray  # (rates, seeds, evaluations): evaluated losses.
    accuracies: np.ndarray  # (rates, seeds, evaluations), in [0, 1]; nan: not measured.
    loss: Mean  # Final loss at the best rate, at most that before training.
    accuracy: Mean  # At the best rate; nan: not measured.
    skipped: float  # Steps skipped at the best rate; nan: no guard.
    spikes: float  # Losses 7 sigma above the last 1,000, at the best rate.
    rounds: float  # Steps before the evaluation that counts, at the best rate.
    diverged: np.ndarray  # (rates, seeds): step from which a run has diverged, or -1.
    trivial: np.ndarray  # (rates,): whether a constant predictor is as good.
    dead: float  # Share of dead units at the best rate, in [0, 1]; nan: not measured.
    seconds: float  # All runs together, without compilation.
    compile_seconds: float
    step_ms: float  # Milliseconds for one step of one run, while runs share a program.
    at_once: int  # Runs that shared a program.


@dataclasses.dataclass(frozen=True, eq=False)
class Comparison:
    """Result of `compare`; `str()` gives the ranked table."""

    rows: tuple[Row, ...]  # One a candidate, the lowest final loss first.
    failed: dict[str, str]  # Error messages of candidates that did not end.
    steps: int  # Number of steps of each run.
    seeds: tuple[int, ...]
    validated: bool  # Whether losses are those of a validation set.
    interrupted: bool = False  # Whether Ctrl-C ended the comparison early.

    def __str__(self) -> str:
        return table(self)

    def row(self, name: str) -> Row:
        """Return the row of a candidate; raise KeyError if there is none."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"no row {name!r}; there are {[row.name for row in self.rows]}")

    def records(self) -> list[dict[str, Any]]:
        """Return the table as a list of dicts, for a data frame."""
        return [_record(row) for row in self.rows]

    def save(self, path: str | Path) -> None:
        """Write the table and all curves as JSON, with null for nan and inf."""
        result = {
            "steps": self.steps,
            "seeds": self.seeds,
            "validated": self.validated,
            "interrupted": self.interrupted,
            "failed": self.failed,
            "rows": [{**_record(row), **_arrays(row)} for row in self.rows],
        }
        finite = json.loads(json.dumps(result), parse_constant=lambda name: None)
        write_whole(Path(path), json.dumps(finite))

    def figure(self, most: int = 10) -> Any:
        """Draw training curves, and final loss against learning rate.

        Args:
            most: Number of the best candidates to draw, >= 1.

        Returns:
            A `matplotlib.figure.Figure`.

        Raises:
            ImportError: If Matplotlib is not installed.
        """
        return draw(self, most)


def _record(row: Row) -> dict[str, Any]:
    lost = row.diverged[row.diverged >= 0]
    return {
        "candidate": row.name,
        "learning_rate": row.scores.best_rate,
        "loss": row.loss.mean,
        "loss_error": row.loss.error,
        "accuracy": row.accuracy.mean,
        "accuracy_error": row.accuracy.error,
        "sensitivity": row.scores.sensitivity.mean,
        "sensitivity_error": row.scores.sensitivity.error,
        "band_decades": row.scores.band,
        "cliff": row.scores.cliff,
        "skipped": row.skipped,
        "spikes": row.spikes,
        "rounds": row.rounds,
        "runs_diverged": lost.size,
        "first_divergence": int(min(lost, default=-1)),
        "trivial": bool(row.trivial[row.scores.loss.argmin()]),
        "dead": row.dead,
        "seconds": row.seconds,
        "compile_seconds": row.compile_seconds,
        "step_ms": row.step_ms,
    }


def _arrays(row: Row) -> dict[str, Any]:
    names = ("train", "validation", "accuracies", "diverged")
    return {
        "learning_rates": row.rates,
        "evaluated_before_steps": row.steps.tolist(),
        **{name: getattr(row, name).tolist() for name in names},
    }


def make_row(runs: Runs, trivial_loss: float | None) -> Row:
    """Score the runs of a candidate."""
    steps, measured = runs.experiment.evaluations, runs.measured
    take = lambda values, i: np.take_along_axis(values, i[..., None], -1)[..., 0]
    final, accuracy, dead = (
        take(measured[name], runs.best) for name in ("loss", "accuracy", "dead")
    )
    skipped = take(measured["skipped"], runs.ended - 1)
    initial = before_training(measured["loss"], runs.train_loss)
    by_seed = np.stack([initial, final, accuracy, dead]).transpose(2, 0, 1)
    trivial = np.inf if trivial_loss is None else trivial_loss
    scores = score(runs.rates, trivial, by_seed)
    if len(runs.rates) == 1:
        unknown = dict.fromkeys(("sensitivity", "normalised"), Mean(np.nan, np.nan))
        scores = scores._replace(**unknown, band=np.nan, cliff=np.nan)
    best = int(scores.loss.argmin())
    losses = [  # Runs may end early.
        without_refused(runs.train_loss[i][: steps[ended - 1]], float(skipped[i]))
        for i, ended in np.ndenumerate(runs.ended)
    ]
    of_runs = lambda statistic: np.reshape([*map(statistic, losses)], final.shape)
    diverged = of_runs(divergence)
    lost = ~np.isfinite(final) & (diverged < 0)
    diverged = np.where(lost, steps[runs.ended - 1], diverged)
    return Row(
        name=runs.candidate.name,
        scores=scores,
        rates=runs.rates,
        steps=steps,
        train=runs.train_loss,
        validation=measured["loss"],
        accuracies=measured["accuracy"],
        loss=mean(capped(final[best], initial[best])),
        accuracy=mean(accuracy[best]),
        skipped=float(skipped[best].mean()),
        spikes=float(of_runs(spikes)[best].mean()),
        rounds=float(steps[runs.best[best]].mean()),
        diverged=diverged,
        trivial=scores.trivial & (trivial_loss is not None),
        dead=float(scores.dead[best]),
        seconds=runs.run_seconds,
        compile_seconds=runs.compile_seconds,
        step_ms=1000 * runs.step_seconds / max(1, runs.steps_taken),
        at_once=runs.at_once,
    )
