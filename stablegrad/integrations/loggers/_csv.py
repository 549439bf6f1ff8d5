"""A table of numbers, one row a step."""

import csv
import os
from collections.abc import Mapping
from pathlib import Path


class CSV:
    """Write a file of comma-separated values: a column a name, a row a step.

    An existing file is gone on with. A new name becomes a new column, for which the
    file is written anew; a number that a step does not have is left empty. A step that
    a resumed run takes again has two rows.

    Args:
        path: The file.

    Raises:
        ValueError: If the file there has no column "step".
    """

    def __init__(self, path: str | os.PathLike):
        """Read the header of an existing file."""
        self._path = Path(path)
        self._names = ["step"]
        if self._path.exists() and self._path.stat().st_size:
            with self._path.open(newline="") as file:
                self._names = next(csv.reader(file))
            if self._names[0] != "step":
                raise ValueError(
                    f"{path} is another table, left as it is: its first columns are "
                    f"{self._names[:3]}, not 'step'."
                )

    def write(self, step: int, numbers: Mapping[str, float | int]) -> None:
        """Append one row."""
        new = [name for name in numbers if name not in self._names]
        if new or not self._path.exists():
            self._widen(new)
        with self._path.open("a", newline="") as file:
            csv.DictWriter(file, self._names).writerow({**numbers, "step": step})

    def _widen(self, new: list[str]) -> None:
        rows = []
        if self._path.exists():
            with self._path.open(newline="") as file:
                rows = list(csv.DictReader(file))
        self._names += new
        draft = self._path.with_name(f"{self._path.name}.{os.getpid()}.tmp")
        try:
            with draft.open("w", newline="") as file:
                table = csv.DictWriter(file, self._names)
                table.writeheader()
                table.writerows(rows)
            os.replace(draft, self._path)
        finally:
            draft.unlink(missing_ok=True)
