"""Numbers as JSON lines, one object a step."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

from ..._text_files import append_lines


class JSONLines:
    """Append one JSON object a step to a file; null stands for nan and inf.

    Args:
        path: The file. An existing one is continued, on a new line if a killed
            process left the last one unfinished.
    """

    def __init__(self, path: str | os.PathLike):
        """Take the path."""
        self._path = Path(path)

    def write(self, step: int, numbers: Mapping[str, float | int]) -> None:
        """Append one line."""
        finite = {k: x if math.isfinite(x) else None for k, x in numbers.items()}
        finite.pop("step", None)
        append_lines(self._path, json.dumps({"step": step, **finite}) + "\n")
