"""When to take a snapshot, and when to return to one.

    calm for `hold_steps` ---every `every` steps---> take
    bad for `after` steps, or parameters not finite ---> restore ---> cooldown
    what should be taken is not finite ---> restore
    nothing to restore, or restored `limit` times since a snapshot ---> refuse, halt

The machine knows ages and counts alone; `_snapshots` moves the arrays.
"""

from enum import IntEnum
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..._trees import count_if, increment

NOTHING, REPLACE, SHIFT, RESTORE = 0, 1, 2, 3  # RESTORE + i: the snapshot in slot i.


class Refusal(IntEnum):
    """Why a guard does not roll back though it should."""

    NONE = 0
    NO_SNAPSHOT = 1  # None is held, or the one that is held is not finite.
    LIMIT = 2  # It has rolled back too often since it took a snapshot.
    NEEDS_APPLY = 3  # Updates cannot bring these parameters back.


class RollBackSettings(NamedTuple):
    """`roll_back` documents each."""

    after: int | jax.Array
    every: int | jax.Array
    keep: int
    hold_steps: int | jax.Array
    cooldown_steps: int | jax.Array
    limit: int | jax.Array
    memory: str


class RollBackState(NamedTuple):
    """Where a roll-back stands; rank 0 but for `ages`."""

    ages: jax.Array  # int32 (keep,): steps since each was taken, newest first; -1 none.
    from_init: jax.Array  # bool: all that is held are the parameters given to `init`.
    bad_run: jax.Array  # int32: bad steps in a row.
    calm_run: jax.Array  # int32: steps since the last event, saturating.
    cooldown_left: jax.Array  # int32, >= 0.
    restores: jax.Array  # int32: since one was taken, but for nan and inf.
    roll_backs: jax.Array  # int32: since `init`, saturating.
    rolled_back: jax.Array  # bool: whether the last step rolled back.
    refusal: jax.Array  # int32: a `Refusal`, of the last step.


class Seen(NamedTuple):
    """What a roll-back is told of a step; rank-0 bools."""

    bad: jax.Array  # Rejected, above a threshold, or with elements kept out.
    event: jax.Array  # The same, or the learning rate was cut.
    poisoned: jax.Array  # Parameters are not finite.


def init_state(settings: RollBackSettings) -> RollBackState:
    """Return the state before the first step: the parameters of `init` are held."""
    none = jnp.zeros((), jnp.int32)
    ages = jnp.full((settings.keep,), -1, jnp.int32).at[0].set(0)
    yes, no = jnp.ones((), bool), jnp.zeros((), bool)
    return RollBackState(ages, yes, none, none, none, none, none, no, none)


def plan(
    settings: RollBackSettings, state: RollBackState, seen: Seen
) -> tuple[jax.Array, jax.Array, RollBackState]:
    """Return the action of a step, another, and the state before its outcome.

    The other action, int32 () as well, is for a snapshot that turns out not to be
    finite: it restores the newest one instead.
    """
    ages = jnp.where(state.ages >= 0, increment(state.ages), state.ages)
    # A snapshot so soon before an event may already hold what led to it.
    doubtful = seen.event & (ages <= settings.hold_steps) & ~state.from_init
    ages = jnp.where(doubtful, -1, ages)
    held = ages >= 0
    bad_run = jnp.where(seen.bad, increment(state.bad_run), 0)
    calm_run = jnp.where(seen.event, 0, increment(state.calm_run))
    lasting = (bad_run >= settings.after) & (state.cooldown_left == 0)
    wanted = lasting | seen.poisoned
    limited = (state.restores >= settings.limit) & ~seen.poisoned
    refusal = jnp.where(limited, int(Refusal.LIMIT), 0)
    refusal = jnp.where(jnp.any(held), refusal, int(Refusal.NO_SNAPSHOT))
    # Poison says nothing against the newest snapshot; what comes again after a
    # roll-back does.
    nth = jnp.where(seen.poisoned, 0, jnp.minimum(state.restores, jnp.sum(held) - 1))
    slot = jnp.argmax(jnp.cumsum(held) == nth + 1)
    old = state.from_init | (ages[0] < 0) | (ages[0] >= settings.every)
    due = (calm_run > settings.hold_steps) & old
    take = jnp.where(held[0], SHIFT, REPLACE)
    action = jnp.where(
        wanted,
        jnp.where(refusal == 0, RESTORE + slot, NOTHING),
        jnp.where(due & ~seen.event, take, NOTHING),
    )
    instead = jnp.where(jnp.any(held), RESTORE + jnp.argmax(held), NOTHING)
    actions = action.astype(jnp.int32), instead.astype(jnp.int32)
    return *actions, state._replace(
        ages=ages,
        bad_run=bad_run,
        calm_run=calm_run,
        cooldown_left=jnp.maximum(state.cooldown_left - 1, 0),
        refusal=jnp.where(wanted, refusal, 0).astype(jnp.int32),
    )


def after_action(
    settings: RollBackSettings, planned: RollBackState, action, refused, counts
) -> RollBackState:
    """Return the state after the action that was carried out, or met a `Refusal`.

    `counts`, bool (), tells whether a restored snapshot counts towards the limit.
    """
    done = (action > NOTHING) & (refused == 0)
    took, restored = done & (action < RESTORE), done & (action >= RESTORE)
    shifted = jnp.concatenate([jnp.zeros((1,), jnp.int32), planned.ages[:-1]])
    replaced = planned.ages.at[0].set(0)
    newer = jnp.where(action == SHIFT, shifted, replaced)
    cooldown = jnp.asarray(settings.cooldown_steps).astype(jnp.int32)
    return planned._replace(
        ages=jnp.where(took, newer, planned.ages),
        from_init=planned.from_init & ~took,
        bad_run=jnp.where(restored, 0, planned.bad_run),
        cooldown_left=jnp.where(restored, cooldown, planned.cooldown_left),
        restores=jnp.where(took, 0, count_if(restored & counts, planned.restores)),
        roll_backs=count_if(restored, planned.roll_backs),
        rolled_back=restored,
        refusal=jnp.maximum(refused, planned.refusal),
    )
