"""When to take a snapshot, and when to return to one.

    calm for `hold_steps` ---every `every` steps---> take
    bad for `after` steps, or parameters not finite ---> restore ---> cooldown
    what should be taken is not finite, or has grown ---> restore
    nothing to restore, or restored `limit` times since a snapshot ---> refuse, halt

The machine knows ages and counts alone; `_snapshots` moves the arrays.
"""

from enum import IntEnum
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..._trees import count_if, increment

NOTHING, REPLACE, SHIFT, RESTORE = 0, 1, 2, 3  # RESTORE + i: the snapshot in slot i.
# Largest growth of the norm of the parameters since the last snapshot, and of the norm
# of the moments over that of any snapshot; beyond either, the snapshot is restored.
PARAMETER_GROWTH, MOMENT_GROWTH = 100.0, 1e5


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
    """Where a roll-back stands; rank 0 but for `ages` and `norms`."""

    ages: jax.Array  # int32 (keep,): steps since each was taken, newest first; -1 none.
    # float32 (keep, 2): of parameters, and the largest of moments so far; 0 at `init`.
    norms: jax.Array
    from_init: jax.Array  # bool: all that is held are the parameters given to `init`.
    bad_run: jax.Array  # int32: bad steps in a row.
    steps: jax.Array  # int32: since `init`, saturating.
    calm_run: jax.Array  # int32: steps since the last event, saturating.
    cooldown_left: jax.Array  # int32, >= 0.
    restores: jax.Array  # int32: since the last snapshot, except those of nan and inf.
    roll_backs: jax.Array  # int32: since `init`, saturating.
    rolled_back: jax.Array  # bool: whether the last step rolled back.
    refusal: jax.Array  # int32: a `Refusal`, of the last step.


class StepFlags(NamedTuple):
    """What a roll-back is told of a step; rank-0 bools."""

    bad: jax.Array  # Rejected, above a threshold, or with elements kept out.
    event: jax.Array  # The same, or the learning rate was cut.
    poisoned: jax.Array  # Parameters are not finite.


def init_state(settings: RollBackSettings) -> RollBackState:
    """Return the state before the first step: the parameters of `init` are held."""
    none = jnp.zeros((), jnp.int32)
    ages = jnp.full((settings.keep,), -1, jnp.int32).at[0].set(0)
    return RollBackState(
        ages=ages,
        norms=jnp.zeros((settings.keep, 2), jnp.float32),
        from_init=jnp.ones((), bool),
        bad_run=none,
        steps=none,
        calm_run=none,
        cooldown_left=none,
        restores=none,
        roll_backs=none,
        rolled_back=jnp.zeros((), bool),
        refusal=none,
    )


class Plan(NamedTuple):
    """What a step is to do with the snapshots; rank 0 but for `largest_norms`."""

    action: jax.Array  # int32
    instead: jax.Array  # int32: the action if what should be taken is not sound.
    largest_norms: jax.Array  # float32 (2,): of parameters and moments that are sound.
    lasting: jax.Array  # bool: trouble has lasted, so it restores.


class Exchanged(NamedTuple):
    """What became of a plan; rank 0 but for `norms`."""

    action: jax.Array  # int32: the one that was carried out, or refused.
    refused: jax.Array  # int32: a `Refusal`.
    norms: jax.Array  # float32 (2,): of parameters and moments when one was due.
    grown: jax.Array  # bool: these were too large to take one.
    poisoned: jax.Array  # bool: what should be taken was not finite.
    leaf: jax.Array  # int32: first leaf of the parameters that was not, -1 if none.

    @property
    def restored(self) -> jax.Array:
        return (self.action >= RESTORE) & (self.refused == 0)

    @property
    def took(self) -> jax.Array:
        done = (self.action > NOTHING) & (self.refused == 0)
        return done & (self.action < RESTORE)


def plan(
    settings: RollBackSettings, state: RollBackState, flags: StepFlags
) -> tuple[Plan, RollBackState]:
    """Return the plan of a step, and the state before its outcome."""
    ages = jnp.where(state.ages >= 0, increment(state.ages), state.ages)
    # A snapshot so soon before an event may already hold what led to it.
    doubtful = flags.event & (ages <= settings.hold_steps) & ~state.from_init
    ages = jnp.where(doubtful, -1, ages)
    held = ages >= 0
    bad_run = jnp.where(flags.bad, increment(state.bad_run), 0)
    calm_run = jnp.where(flags.event, 0, increment(state.calm_run))
    lasting = (bad_run >= settings.after) & (state.cooldown_left == 0)
    wanted = lasting | flags.poisoned
    limited = (state.restores >= settings.limit) & ~flags.poisoned
    refusal = jnp.where(limited, int(Refusal.LIMIT), 0)
    refusal = jnp.where(jnp.any(held), refusal, int(Refusal.NO_SNAPSHOT))
    # Parameters that are not finite do not discredit the newest snapshot; trouble that
    # comes back after a roll-back does.
    nth = jnp.where(flags.poisoned, 0, jnp.minimum(state.restores, jnp.sum(held) - 1))
    slot = jnp.argmax(jnp.cumsum(held) == nth + 1)
    old = state.from_init | (ages[0] < 0) | (ages[0] >= settings.every)
    due = (calm_run > settings.hold_steps) & old
    take = jnp.where(held[0], SHIFT, REPLACE)
    action = jnp.where(
        wanted,
        jnp.where(refusal == 0, RESTORE + slot, NOTHING),
        jnp.where(due & ~flags.event, take, NOTHING),
    )
    newest = jnp.argmax(held)
    instead = jnp.where(jnp.any(held), RESTORE + newest, NOTHING)
    # Growth that has come back after `limit` roll-backs is accepted.
    before = state.norms[newest]
    judged = (before > 0) & jnp.any(held) & (state.restores < settings.limit)
    # A warm-up takes parameters away from zero with the square of time.
    steps = increment(state.steps)
    later = jnp.maximum(steps - ages[newest], 1).astype(jnp.float32)
    later = steps.astype(jnp.float32) / later
    growth = jnp.stack([PARAMETER_GROWTH * jnp.square(later), MOMENT_GROWTH])
    largest = jnp.where(judged, growth * before, jnp.inf)
    planned = Plan(
        action.astype(jnp.int32),
        instead.astype(jnp.int32),
        largest,
        (action >= RESTORE) & ~flags.poisoned,
    )
    return planned, state._replace(
        ages=ages,
        bad_run=bad_run,
        steps=steps,
        calm_run=calm_run,
        cooldown_left=jnp.maximum(state.cooldown_left - 1, 0),
        refusal=jnp.where(wanted, refusal, 0).astype(jnp.int32),
    )


def after_exchange(
    settings: RollBackSettings, before: RollBackState, planned: Plan, done: Exchanged
) -> RollBackState:
    """Return the state after a plan was carried out or refused."""
    shifts = done.action == SHIFT

    def with_newest(values, newest):
        first = jnp.asarray(newest)[None].astype(values.dtype)
        kept = jnp.where(shifts, values[:-1], values[1:])
        return jnp.where(done.took, jnp.concatenate([first, kept]), values)

    # Moments decay in quiet times, so growth is measured from their largest norm.
    largest = jnp.array([0.0, 1.0]) * before.norms[jnp.argmax(before.ages >= 0)]
    norms = jnp.maximum(done.norms, largest)
    cooldown = jnp.asarray(settings.cooldown_steps).astype(jnp.int32)
    restored = done.restored
    counts = (restored & planned.lasting) | done.grown
    return before._replace(
        ages=with_newest(before.ages, 0),
        norms=with_newest(before.norms, norms),
        from_init=before.from_init & ~done.took,
        bad_run=jnp.where(restored, 0, before.bad_run),
        calm_run=jnp.where(done.grown, 0, before.calm_run),
        cooldown_left=jnp.where(restored, cooldown, before.cooldown_left),
        restores=jnp.where(done.took, 0, count_if(counts, before.restores)),
        roll_backs=count_if(restored, before.roll_backs),
        rolled_back=restored,
        refusal=jnp.maximum(done.refused, before.refusal),
    )
