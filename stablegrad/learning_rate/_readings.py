"""Readings of the schedules and plateaus anywhere in a state."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from .._packing import decode
from ._evaluations import PlateauState, plain
from ._explosion_aware import ScheduleReadings, ScheduleState

TOLD = (
    "plateau_scale",
    "plateau_bad_evaluations",
    "plateau_evaluations",
    "plateau_cuts",
    "plateau_ignored_metrics",
)


def numbers_of_rates(state: Any) -> dict[str, jax.Array]:
    """Return the numbers of every schedule and plateau in a state, as flat scalars.

    A second one of its kind is called `schedule_2_...` or `plateau_2_...`.
    """
    numbers: dict[str, jax.Array] = {}
    counts: dict[str, int] = {}
    for kind, readings in _found(state):
        counts[kind] = counts.get(kind, 0) + 1
        prefix = f"{kind}_{counts[kind]}" if counts[kind] > 1 else kind
        for name, number in readings.items():
            numbers[name.replace(kind, prefix, 1)] = number
    return numbers


def _found(state: Any) -> Iterator[tuple[str, dict[str, jax.Array]]]:
    kinds = (PlateauState, ScheduleState)
    for node in jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kinds)):
        if isinstance(node, PlateauState):
            readings = plain(node).plateau_readings
            told = {name: getattr(readings, name) for name in TOLD}
            best = jnp.where(readings.plateau_judged, readings.plateau_best, jnp.nan)
            yield "plateau", {**told, "plateau_best": best}
        elif isinstance(node, ScheduleState):
            # NNX wraps each array in a variable.
            wrapped = jax.tree.leaves(node.schedule_readings)
            told = ScheduleReadings(*wrapped)._asdict()
            rate = decode(told["schedule_rate"])
            yield "schedule", {**told, "schedule_rate": rate}
