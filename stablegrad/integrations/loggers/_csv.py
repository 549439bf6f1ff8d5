"""A table of numbers, one row a step."""

import csv
import io
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..._text_files import append_lines, write_whole


class CSV:
    """Write a file of comma-separated values: a column per name, a row per step.

    An existing file is continued. A new name becomes a new column, for which the
    file is written anew; a number that a step does not have is left empty. A step that
    a resumed run takes again has two rows. A row that a killed process left unfinished
    stays as it is, and cells beyond the header are dropped with the next new column.

    Args:
        path: The file.

    Raises:
        ValueError: If the file there has no column "step".
    """

    def __init__(self, path: str | os.PathLike):
        """Read the header of an existing file."""
        self._path = Path(path)
        self._names = self._header()

    def _header(self) -> list[str]:
        """Return the names in the file, to which another writer may have added."""
        if not (self._path.exists() and self._path.stat().st_size):
            return ["step"]
        with self._path.open(newline="", encoding="utf-8") as file:
            names = next(csv.reader(file))
        if names[:1] != ["step"]:
            raise ValueError(
                f"{self._path} is another table, left as it is: its first columns are "
                f"{names[:3]}, not 'step'."
            )
        return names

    def write(self, step: int, numbers: Mapping[str, float | int]) -> None:
        """Append one row."""
        self._names = self._header()
        new = [name for name in numbers if name not in self._names]
        if new or not self._path.exists():
            self._widen(new)
        append_lines(self._path, self._text([{**numbers, "step": step}]))

    def _widen(self, new: list[str]) -> None:
        rows = []
        if self._path.exists():
            with self._path.open(newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
        self._names += new
        header = {name: name for name in self._names}
        write_whole(self._path, self._text([header, *rows]))

    def _text(self, rows: Iterable[dict[str, Any]]) -> str:
        text = io.StringIO(newline="")
        csv.DictWriter(text, self._names, extrasaction="ignore").writerows(rows)
        return text.getvalue()
