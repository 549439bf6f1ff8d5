"""Statistics of all thresholds of a guard, packed by family.

Thresholds of one family, such as five z-scores, keep their statistics as one state with
a row a group. That costs as many kernels as one z-score.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._packing import Packed, Packing
from ..granularity._groups import group
from ..responses._base import Response
from ..thresholds._base import Judgement, Threshold, learn

Place = tuple[int, int]  # A response, and one of its thresholds.
# For each response, one item a threshold.
PerThreshold = list[tuple]


class Family(NamedTuple):
    """Thresholds whose groups are rows of one state."""

    places: tuple[Place, ...]
    members: tuple[Threshold, ...]
    packing: Packing


class Statistics:
    """The statistics of the thresholds of some responses."""

    def __init__(self, responses: tuple[Response, ...]):
        """Group the thresholds by family."""
        found: dict[Any, list[tuple[Place, Threshold]]] = {}
        for i, response in enumerate(responses):
            for j, threshold in enumerate(response.thresholds):
                family = threshold.family
                key = (i, j) if family is None else family.key
                found.setdefault(key, []).append(((i, j), threshold))
        self._shape = [len(response.thresholds) for response in responses]
        self._families = []
        for own in found.values():
            places, members = zip(*own, strict=True)
            struct = jax.eval_shape(lambda init=members[0].init: init(1))
            self._families.append(Family(places, members, Packing(struct, leading=1)))

    def init(self, params) -> tuple[Packed, ...]:
        """Return the packed statistics before the first step."""
        states = []
        for _, members, packing in self._families:
            groups = sum(group(member.per, params).count for member in members)
            states.append(packing.pack(members[0].init(groups)))
        return tuple(states)

    def limits(self, states: tuple[Packed, ...], scopes: PerThreshold) -> PerThreshold:
        """Return the limit of each threshold, float32 (groups,)."""
        found = [[None] * count for count in self._shape]
        for family, packed in zip(self._families, states, strict=True):
            own = [scopes[i][j] for i, j in family.places]
            counts = [scope.grouping.count for scope in own]
            state = family.packing.unpack(packed)
            # Only families of one member use the norms in a scope.
            limit = _merged(family, counts).limit(state, own[0])
            limit = jnp.broadcast_to(limit, (sum(counts),)).astype(jnp.float32)
            start = 0
            for (i, j), count in zip(family.places, counts, strict=True):
                found[i][j] = limit[start : start + count]
                start += count
        return [tuple(own) for own in found]

    def learn(
        self, states: tuple[Packed, ...], judgements: PerThreshold
    ) -> tuple[Packed, ...]:
        """Return the statistics after a step with these judgements."""
        after = []
        for family, packed in zip(self._families, states, strict=True):
            own = [judgements[i][j] for i, j in family.places]
            counts = [judgement.grouping.count for judgement in own]
            state = family.packing.unpack(packed)
            new = learn(_merged(family, counts), state, _joined(own))
            after.append(family.packing.pack(new))
        return tuple(after)


def _merged(family: Family, counts: list[int]) -> Threshold:
    """Return one threshold for all groups of a family."""
    first, *others = family.members
    if not others or first.family is None:
        return first
    families = [member.family for member in family.members if member.family]
    rows = zip(*(each.settings for each in families), strict=True)
    settings = tuple(
        jnp.concatenate(
            [
                jnp.broadcast_to(jnp.asarray(number, jnp.float32), (count,))
                for number, count in zip(row, counts, strict=True)
            ]
        )
        for row in rows
    )
    init, limit, update = first.family.build(settings)
    return first._replace(init=init, limit=limit, update=update)


def _joined(judgements: list[Judgement]) -> Judgement:
    first, *others = judgements
    if not others:
        return first
    merged = {
        name: jnp.concatenate([getattr(each, name) for each in judgements])
        for name in ("signal", "limit", "exceeded", "nonfinite", "teaches")
    }
    return first._replace(**merged)
