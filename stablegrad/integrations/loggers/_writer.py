"""The protocol of all writers."""

from collections.abc import Mapping
from typing import Protocol


class Writer(Protocol):
    """Anything that takes the numbers of a step; `Late` feeds it."""

    def write(self, step: int, numbers: Mapping[str, float | int]) -> None:
        """Write the numbers of one step, which may be nan or inf."""
