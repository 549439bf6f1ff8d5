"""At which rates, from which seeds, for how long."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class Plan(NamedTuple):
    """How long, how often, from which seeds."""

    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    steps: int
    every: int  # Steps between two evaluations.
    patience: int | None  # Evaluations without a better loss until a run is ended.
    at_once: int | None  # Runs in one program at most.
    draws: Callable[[int, int, int], Any]  # seed, first step, number -> what they draw

    @property
    def evaluations(self) -> np.ndarray:
        """The steps before which it is evaluated: the first is 0, the last the end."""
        return np.unique([*range(0, self.steps, self.every), self.steps])
