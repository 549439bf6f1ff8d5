"""Random schedules of faults: when, where, and what they put there."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

PLACES = ("gradient", "loss", "update", "parameters", "state")
GUARDED = PLACES[:3]  # What the preset is meant for.
KINDS = {
    "nan": np.nan,
    "inf": np.inf,
    "huge": 1e20,
    "denormal": 1e-40,
    "16-bit overflow": 7e4,
}
EPISODES = 3  # At most, in one schedule.
LONGEST = 50  # Steps of one episode.
FIRST, LAST = 60, 300  # Steps between which an episode begins.


class Schedule(NamedTuple):
    """Episodes of one schedule; arrays (EPISODES,), with a leading axis of many."""

    place: np.ndarray  # int32: index in PLACES, -1 if there is no such episode.
    kind: np.ndarray  # int32: index in KINDS.
    start: np.ndarray  # int32
    length: np.ndarray  # int32, in 1 to LONGEST.
    leaf: np.ndarray  # int32: which leaf, modulo how many there are.
    element: np.ndarray  # int32: which element, modulo the leaf's size; -1 all of them.
    sign: np.ndarray  # float32: -1 or 1.


class Hit(NamedTuple):
    """One fault in one step; rank 0."""

    active: jax.Array
    value: jax.Array
    leaf: jax.Array
    element: jax.Array


def draw(count: int, places: tuple[str, ...], seed: int) -> Schedule:
    """Draws schedules of faults in some places, all kinds and lengths alike."""
    rng = np.random.default_rng([seed, len(places)])
    shape = (count, EPISODES)
    episodes = rng.integers(1, EPISODES + 1, count)[:, None]
    here = np.arange(EPISODES)[None] < episodes
    place = rng.integers(0, len(places), shape)
    length = np.exp(rng.uniform(0, np.log(LONGEST + 1), shape)).astype(int)
    element = np.where(rng.random(shape) < 0.5, -1, rng.integers(0, 1 << 16, shape))
    return Schedule(
        np.where(here, place, -1).astype(np.int32),
        rng.integers(0, len(KINDS), shape).astype(np.int32),
        rng.integers(FIRST, LAST, shape).astype(np.int32),
        np.clip(length, 1, LONGEST).astype(np.int32),
        rng.integers(0, 1 << 16, shape).astype(np.int32),
        element.astype(np.int32),
        rng.choice([-1.0, 1.0], shape).astype(np.float32),
    )


def none() -> Schedule:
    """A schedule without a fault."""
    zeros = np.zeros(EPISODES, np.int32)
    ones = np.ones(EPISODES, np.float32)
    return Schedule(zeros - 1, zeros, zeros, zeros, zeros, zeros, ones)


def hits(schedule: Schedule, place: str, step) -> list[Hit]:
    """The faults of one place in one step."""
    values = jnp.asarray(list(KINDS.values()), jnp.float32)
    index, found = PLACES.index(place), []
    for i in range(EPISODES):
        own = jax.tree.map(lambda x, i=i: x[i], schedule)
        now = (step >= own.start) & (step < own.start + own.length)
        active = (own.place == index) & now
        value = own.sign * values[own.kind]
        found.append(Hit(active, value, own.leaf, own.element))
    return found


def spoilt(tree, faults: list[Hit]):
    """A tree with the faults in its floating-point leaves."""
    leaves, structure = jax.tree.flatten(tree)
    places = [i for i, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.floating)]
    for fault in faults:
        for nth, i in enumerate(places):
            leaf = leaves[i]
            at = jnp.arange(leaf.size).reshape(leaf.shape)
            chosen = (fault.element < 0) | (at == fault.element % leaf.size)
            hit = fault.active & (fault.leaf % len(places) == nth) & chosen
            leaves[i] = jnp.where(hit, fault.value.astype(leaf.dtype), leaf)
    return structure.unflatten(leaves)
