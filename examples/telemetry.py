"""What a run measured, one JSON line a step, and in TensorBoard if it is installed."""

import importlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np


class Telemetry:
    """Writes rows of numbers to `telemetry.jsonl` in a folder, and for TensorBoard.

    TensorBoard's files come from `tensorboardX`, or else from PyTorch's writer;
    `tensorboard` is False where there is neither, or nobody asked.
    """

    def __init__(
        self, folder: Path, *, tensorboard: bool = False, append: bool = False
    ):
        """`append` goes on with the lines of an earlier run."""
        self.path = folder / "telemetry.jsonl"
        self._lines = self.path.open("a" if append else "w")
        self._board = _board(folder) if tensorboard else None

    @property
    def tensorboard(self) -> bool:
        """Whether TensorBoard's files are written, too."""
        return self._board is not None

    def write(self, step: int, row: dict[str, Any]) -> dict[str, Any]:
        """Writes one row of numbers, words or flags; returns it in plain Python."""
        row = {name: plain(value) for name, value in row.items()}
        self._lines.write(to_json({"step": step, **row}))
        if self._board is not None:
            for name, value in row.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(name, value, step)
        return row

    def flush(self) -> None:
        """What was written so far is in the files."""
        self._lines.flush()
        if self._board is not None:
            self._board.flush()

    def __enter__(self) -> "Telemetry":
        """For `with`: the files are closed at its end, whatever happens."""
        return self

    def __exit__(self, *error) -> None:
        self._lines.close()
        if self._board is not None:
            self._board.close()


def plain(value) -> Any:
    """An array of one number as Python's own; anything else as it is."""
    return np.asarray(value).item() if hasattr(value, "dtype") else value


def to_json(row: dict[str, Any]) -> str:
    """One JSON line; JSON has no nan or inf, so they become null."""
    finite = lambda x: None if isinstance(x, float) and not math.isfinite(x) else x
    return json.dumps({name: finite(x) for name, x in row.items()}) + "\n"


def _board(folder: Path) -> Any:
    for module in ("tensorboardX", "torch.utils.tensorboard"):
        try:
            return importlib.import_module(module).SummaryWriter(str(folder))
        except ImportError:
            pass
    return None
