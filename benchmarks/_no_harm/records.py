"""One task's record: what is kept of every run, ready for JSON."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from .methods import BARE
from .paired import gain, judge
from .task import EVALUATIONS, Outcome, Task

MOST_STEPS_LISTED = 40
FIELDS = {"task", "kind", "metric", "higher", "goal", "steps", "seeds", "start"}
FIELDS |= {"gain", "healthy", "methods"}


def steps_where(counter: np.ndarray) -> list[list[int]]:
    """For each seed the steps, from 0, at which a counter rose: the first ones."""
    rose = np.diff(counter, axis=-1, prepend=0) > 0
    return [np.flatnonzero(row)[:MOST_STEPS_LISTED].tolist() for row in rose]


def by_stage(counter: np.ndarray) -> list[float]:
    """What a counter gained between evaluations, on average over seeds."""
    ends = counter.mean(0)[
        counter.shape[1] // EVALUATIONS - 1 :: counter.shape[1] // EVALUATIONS
    ]
    return np.diff(ends, prepend=0.0).round(2).tolist()


def of_method(task: Task, bare: Outcome, seen: Outcome, seconds: float) -> dict:
    """What one method made of a task."""
    verdict = judge(bare.start, bare.results, seen.results, task.higher)
    readings = seen.readings
    total = lambda counter: float(counter[:, -1].sum())
    guarded = total(readings.guarded)
    clipped, skipped = total(readings.clipped), total(readings.skipped)
    return {
        "results": seen.results.tolist(),
        "mean": float(seen.results.mean()),
        "std": float(seen.results.std(ddof=1)) if seen.results.size > 1 else 0.0,
        "curve": seen.curves.mean(0).tolist(),
        **verdict._asdict(),
        "touched": min((clipped + skipped) / guarded, 1.0),
        "skipped": skipped / guarded,
        "cuts": total(readings.backed_off) / len(seen.results),
        "shortened": total(readings.shortened) / guarded,
        "lowest_lr_scale": float(readings.lr_scale.min()),
        "last_lr_scale": float(readings.lr_scale[:, -1].min()),
        "clipped_by_stage": by_stage(readings.clipped),
        "cuts_at": steps_where(readings.backed_off),
        "skips_at": steps_where(readings.skipped),
        "seconds": round(seconds, 1),
    }


def of_task(
    task: Task, seeds: range, steps: int, seen: dict[str, tuple[Outcome, float]]
) -> dict[str, Any]:
    """The whole record; the bare run is there whatever else was asked for."""
    bare = seen[BARE][0]
    return {
        "task": task.name,
        "kind": task.kind,
        "metric": task.metric,
        "higher": task.higher,
        "goal": task.goal,
        "steps": steps,
        "first_seed": seeds.start,
        "seeds": len(seeds),
        "on": (
            f"{jax.default_backend()}, jax {jax.__version__}, optax {optax.__version__}"
        ),
        "start": float(bare.start.mean()),
        "gain": gain(bare.start, bare.results, task.higher),
        "healthy": task.reached(float(bare.results.mean())),
        "methods": {
            name: of_method(task, bare, outcome, seconds)
            for name, (outcome, seconds) in seen.items()
        },
    }


def append(record: dict, path: Path | None) -> None:
    """Adds a line to a file, so that nothing is lost if the run is cut off."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def stored(path: Path) -> list[dict]:
    """The records of a file, the last of each task.

    Raises OSError or ValueError if it cannot be read, and says which line is wrong.
    """
    found = {}
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            missing = sorted(FIELDS - record.keys())
        except (ValueError, AttributeError):
            missing = ["an object of JSON"]
        if missing:
            raise ValueError(f"line {number} is no record: it lacks {missing[0]}")
        found[record["task"]] = record
    if not found:
        raise ValueError("it holds no records")
    return list(found.values())


def about(found: list[dict]) -> str:
    """How many seeds, and where the runs were made; files before had no place."""
    counts = sorted({record["seeds"] for record in found})
    places = sorted({record.get("on", "an unnamed machine") for record in found})
    seeds = " or ".join(map(str, counts))
    return f"{seeds} seeds, on {' and '.join(places)}"
