"""Statistics of one family in one set of arrays, whichever responses they serve.

Five z-scores, each with its own numbers, would be five times as many small kernels as
one z-score of five groups.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..responses._base import Response
from ..thresholds._base import Judgement, Scope, Threshold, learn

Place = tuple[int, int]  # Of a threshold: its response, and its place there.


class Batch(NamedTuple):
    """Thresholds whose groups stand in a row in one state."""

    places: tuple[Place, ...]
    members: tuple[Threshold, ...]


def batches_of(responses: tuple[Response, ...]) -> tuple[Batch, ...]:
    """All thresholds of all responses, those of one family together."""
    found: dict[Any, list[tuple[Place, Threshold]]] = {}
    for i, response in enumerate(responses):
        for j, threshold in enumerate(response.thresholds):
            family = threshold.family
            key = (i, j) if family is None else family.key
            found.setdefault(key, []).append(((i, j), threshold))
    return tuple(Batch(*map(tuple, zip(*own, strict=True))) for own in found.values())


def init_batches(
    batches: tuple[Batch, ...], count: Callable[[Threshold], int]
) -> tuple:
    """One state a batch; `count` says how many groups a threshold has."""
    return tuple(
        batch.members[0].init(sum(count(member) for member in batch.members))
        for batch in batches
    )


def with_limits(
    batches: tuple[Batch, ...],
    states: tuple,
    responses: tuple[Response, ...],
    scopes: list[tuple],
) -> tuple[Response, ...]:
    """The responses with thresholds whose limits in this step are already known."""
    settled = [list(response.thresholds) for response in responses]
    for batch, state in zip(batches, states, strict=True):
        own = [scopes[i][j] for i, j in batch.places]
        counts = [scope.grouping.count for scope in own]
        limits = jnp.broadcast_to(
            _merged(batch, counts).limit(state, own[0]), (sum(counts),)
        )
        parts = _split(limits, counts)
        for (i, j), member, part in zip(
            batch.places, batch.members, parts, strict=True
        ):
            settled[i][j] = member._replace(limit=_constant(part))
    return tuple(
        response._replace(thresholds=tuple(own))
        for response, own in zip(responses, settled, strict=True)
    )


def learned(batches: tuple[Batch, ...], states: tuple, words) -> tuple:
    """The states after a step of which `words` tell."""
    after = []
    for batch, state in zip(batches, states, strict=True):
        said = [words[i][j] for i, j in batch.places]
        counts = [judgement.grouping.count for judgement in said]
        after.append(learn(_merged(batch, counts), state, _joined(said)))
    return tuple(after)


def _merged(batch: Batch, counts: list[int]) -> Threshold:
    """One threshold for all groups of a batch."""
    first, *others = batch.members
    if not others or first.family is None:
        return first
    families = [member.family for member in batch.members if member.family]
    rows = zip(*(family.settings for family in families), strict=True)
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


def _joined(said: list[Judgement]) -> Judgement:
    first, *others = said
    merged = {
        name: jnp.concatenate([getattr(judgement, name) for judgement in said])
        for name in ("signal", "limit", "exceeded", "nonfinite")
    }
    return first._replace(**merged) if others else first


def _split(numbers: jax.Array, counts: list[int]) -> list[jax.Array]:
    parts, start = [], 0
    for count in counts:
        parts.append(numbers[start : start + count])
        start += count
    return parts


def _constant(limit: jax.Array) -> Callable[[Any, Scope], jax.Array]:
    return lambda state, scope: limit
