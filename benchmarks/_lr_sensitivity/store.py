"""Results on disk, each as soon as it is there, so that a run can be taken up again.

A result belongs to a program: its digest covers the task, its steps and rates, and the
method's settings and code. Under another digest it is as if it were not there.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from .running import Curve
from .timing import Times


def _plain(value: Any) -> Any:
    """For JSON, which has no nan."""
    if isinstance(value, np.ndarray):
        return [_plain(x) for x in value.tolist()]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def place(folder: Path, task: str, method: str) -> Path:
    """Where the results of one method on one task are, if there are any."""
    return folder / "results" / task / re.sub(r"[^\w.]+", "-", method).strip("-")


class Store:
    """The results of one method on one task."""

    def __init__(self, folder: Path, digest: str):
        """Writes nothing yet."""
        self.folder, self.digest = folder, digest

    def curve(self, seed: int) -> Curve | None:
        """A seed's curve, if it is there."""
        fields = self._load(f"seed-{seed}")
        if fields is None:
            return None
        return Curve(*(np.array(fields[name], np.float64) for name in Curve._fields))

    def keep_curve(self, seed: int, curve: Curve, about: dict[str, Any]) -> None:
        """Keeps a seed's curve, and what is good to know about it."""
        self._save(f"seed-{seed}", {**about, **curve._asdict()})

    def times(self) -> Times | None:
        """Step times, if they are there."""
        fields = self._load("step_time")
        return fields and Times(*(fields[name] for name in Times._fields))

    def keep_times(self, times: Times, about: dict[str, Any]) -> None:
        """Keeps step times."""
        self._save("step_time", {**about, **times._asdict()})

    def discard(self) -> None:
        """Forgets every result of this method on this task."""
        for path in self.folder.glob("*.json"):
            path.unlink()

    def _load(self, name: str) -> dict[str, Any] | None:
        try:
            fields = json.loads((self.folder / f"{name}.json").read_text("utf-8"))
        except (OSError, ValueError):
            return None
        return fields if fields.get("digest") == self.digest else None

    def _save(self, name: str, fields: dict[str, Any]) -> None:
        """All or nothing: an interruption leaves no half of a file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        whole = {"digest": self.digest} | {k: _plain(v) for k, v in fields.items()}
        new = self.folder / f"{name}.tmp"
        new.write_text(json.dumps(whole, indent=1, allow_nan=False) + "\n", "utf-8")
        os.replace(new, self.folder / f"{name}.json")
