"""Statistics of all thresholds of a guard, joined by family.

Thresholds of one family, such as five z-scores, keep their statistics as one state with
one row per group. That costs as many kernels as one z-score.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp

from ..granularity._groups import group
from ..responses._base import Response
from ..thresholds._base import Judgement, Threshold, learn

Place = tuple[int, int]  # A response, and one of its thresholds.
# For each response, one item per threshold.
PerThreshold = list[tuple]


class JoinedThresholds(NamedTuple):
    """Thresholds whose groups are rows of one state."""

    places: tuple[Place, ...]
    members: tuple[Threshold, ...]


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
            self._families.append(JoinedThresholds(*zip(*own, strict=True)))

    @property
    def members(self) -> list[tuple[Threshold, ...]]:
        """The thresholds of each family, in the order of their rows."""
        return [family.members for family in self._families]

    def init(self, params) -> tuple:
        """Return the statistics of each family before the first step."""
        return tuple(
            members[0].init(sum(group(t.per, params).count for t in members))
            for _, members in self._families
        )

    def limits(self, states: tuple, scopes: PerThreshold) -> PerThreshold:
        """Return the limit of each threshold, float32 (groups,)."""
        found = [[None] * count for count in self._shape]
        for family, state in zip(self._families, states, strict=True):
            own = [scopes[i][j] for i, j in family.places]
            counts = [scope.grouping.count for scope in own]
            # Only families of one member use the norms in a scope.
            limit = _merged(family, counts).limit(state, own[0])
            limit = jnp.broadcast_to(limit, (sum(counts),)).astype(jnp.float32)
            start = 0
            for (i, j), count in zip(family.places, counts, strict=True):
                found[i][j] = limit[start : start + count]
                start += count
        return [tuple(own) for own in found]

    def learn(self, states: tuple, judgements: PerThreshold) -> tuple:
        """Return the statistics after a step with these judgements."""
        after = []
        for family, state in zip(self._families, states, strict=True):
            own = [judgements[i][j] for i, j in family.places]
            counts = [judgement.grouping.count for judgement in own]
            after.append(learn(_merged(family, counts), state, _joined(own)))
        return tuple(after)


def _merged(family: JoinedThresholds, counts: list[int]) -> Threshold:
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
