"""Readings of the schedules and plateaus anywhere in a state."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from .._packing import decode
from .._trees import nodes
from ..clipping._readings import numbered
from ._evaluations import PlateauState
from ._explosion_aware import ScheduleState

PLATEAU = ("scale", "bad_evaluations", "evaluations", "cuts", "ignored_metrics")


def numbers_of_rates(state: Any) -> dict[str, jax.Array]:
    """Return the numbers of every schedule and plateau in a state, as flat scalars."""
    numbers: dict[str, jax.Array] = {}
    for prefix, readings in numbered(_found(state)):
        numbers |= {f"{prefix}_{name}": number for name, number in readings.items()}
    return numbers


def _found(state: Any) -> Iterator[tuple[str, dict[str, jax.Array]]]:
    kinds = (PlateauState, ScheduleState)
    for node in nodes(state, lambda node: isinstance(node, kinds)):
        if isinstance(node, PlateauState):
            readings = node.plateau_readings
            told = {name: getattr(readings, f"plateau_{name}") for name in PLATEAU}
            best = jnp.where(readings.plateau_judged, readings.plateau_best, jnp.nan)
            yield "plateau", {**told, "best": best}
        else:
            fields = node.schedule_readings._asdict().items()
            told = {name.removeprefix("schedule_"): number for name, number in fields}
            yield "schedule", {**told, "rate": decode(told["rate"])}
