"""Rolling back, after the commit: the response plans, the engine moves arrays."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from .. import _missing, _trees
from .._norms import first_true
from .._packing import Packing
from ..responses._base import Response, any_true
from ..responses._reasons import Reason, is_nonfinite, reason_code
from ..responses.roll_back._machine import (
    RollBackSettings,
    StepFlags,
    after_exchange,
    plan,
)
from ..responses.roll_back._snapshots import (
    Snapshot,
    Written,
    exchange,
    init_snapshots,
)
from ..thresholds._base import Judgement
from ._decide import StepContext


class Trouble(NamedTuple):
    """What went wrong in a step; rank 0."""

    reason: jax.Array  # int32: a `Reason`, 0 if the step was taken.
    kept_out: jax.Array  # int32: elements that were kept out.
    poisoned: jax.Array  # bool: rejected, and parameters are not finite.
    leaf: jax.Array  # int32: first leaf with either, -1 if none.


class RollBackResult(NamedTuple):
    """A step after the roll-back, if there was one."""

    written: Written
    snapshots: tuple[Snapshot, ...]
    trouble: Trouble
    states: tuple  # Of the responses.
    rolled_back: jax.Array  # bool


class RollBack:
    """The roll-back of a guard, which at most one of its responses asks for."""

    def __init__(self, responses: tuple[Response, ...]):
        """Find the response; raise ValueError if there are two."""
        found = [i for i, response in enumerate(responses) if response.roll_back]
        if len(found) > 1:
            raise ValueError(
                f"a guard takes one `roll_back`, got {len(found)}: each keeps "
                "snapshots of its own. Give all thresholds to one of them."
            )
        self._place = found[0] if found else -1
        self._response = responses[self._place] if found else None

    def init(self, params, inner_state, statistics) -> tuple[Snapshot, ...]:
        """Return the snapshots before the first step."""
        if self._response is None:
            return ()
        first = Snapshot(params, inner_state, Packing(statistics).pack(statistics))
        settings = self._settings
        return init_snapshots(first, settings.keep, settings.memory)

    def after_commit(
        self,
        written: Written,
        snapshots: tuple[Snapshot, ...],
        step: StepContext,
        trouble: Trouble,
        cut: jax.Array,
        states: tuple,
        judgements: list[tuple[Judgement, ...]],
        writes_params: bool,
    ) -> RollBackResult:
        """Take a snapshot, or restore one, if either is due.

        `cut` tells whether `back_off` cut the learning rate, and `writes_params`
        whether what is written are the parameters, or their updates.
        """
        if self._response is None:
            no = jnp.zeros((), bool)
            return RollBackResult(written, snapshots, trouble, states, no)
        if step.params is None:
            raise _missing.missing_params("`roll_back`")
        own = judgements[self._place]
        above = any_true(own, "exceeded") | any_true(own, "nonfinite")
        reason = trouble.reason
        bad = (reason > 0) | above | (trouble.kept_out > 0)
        flags = StepFlags(bad, bad | cut, trouble.poisoned)
        settings = self._settings
        planned, before = plan(settings, states[self._place], flags)
        packing = Packing(written.statistics)
        packed = written._replace(statistics=packing.pack(written.statistics))
        params = None if writes_params else step.params
        moved, snapshots, done = exchange(
            planned, packed, snapshots, params, settings.memory, step.axes
        )
        after = after_exchange(settings, before, planned, done)
        why = jnp.where(reason > 0, reason, self._reason(own))
        why = jnp.where(done.grown, int(Reason.PARAMETER_NORM), why)
        why = jnp.where(done.poisoned, int(Reason.NONFINITE_PARAMETERS), why)
        trouble = trouble._replace(
            reason=jnp.where(done.restored, why, reason),
            leaf=jnp.where(done.poisoned, done.leaf, trouble.leaf),
        )
        states = (*states[: self._place], after, *states[self._place + 1 :])
        statistics = packing.unpack(moved.statistics)
        return RollBackResult(
            moved._replace(statistics=statistics),
            snapshots,
            trouble,
            states,
            done.restored,
        )

    @property
    def _settings(self) -> RollBackSettings:
        assert self._response is not None and self._response.roll_back is not None
        return self._response.roll_back

    def _reason(self, judgements: tuple[Judgement, ...]) -> jax.Array:
        """Return why a step that was taken is given up."""
        assert self._response is not None
        # With no threshold exceeded, elements were kept out.
        reason = jnp.asarray(int(Reason.NONFINITE_UPDATE), jnp.int32)
        for threshold, judged in zip(
            self._response.thresholds, judgements, strict=True
        ):
            code = reason_code(
                threshold.of, jnp.any(judged.nonfinite), jnp.any(judged.exceeded)
            )
            reason = jnp.where(code > 0, code, reason)
        return reason


def trouble_of(step: StepContext, reason: jax.Array, kept_out: jax.Array) -> Trouble:
    """Return what went wrong, by the reason and what this device has kept out."""
    counts = step.axes.total(kept_out)
    total, taken = jnp.sum(counts), reason == 0
    size = sum(leaf.size for leaf in _trees.inexact_leaves(step.like))
    moves = jnp.sum(kept_out[:-1]) < size
    nothing_moves = step.axes.total(moves.astype(jnp.int32)) == 0
    stuck = taken & nothing_moves & (size > 0)
    poisoned = is_nonfinite(reason) & (total > 0)
    reason = jnp.where(stuck, int(Reason.NONFINITE_UPDATE), reason)
    reason = jnp.where(poisoned, int(Reason.NONFINITE_PARAMETERS), reason)
    leaf = jnp.where(taken | poisoned, first_true(counts[:-1] > 0), -1)
    return Trouble(reason, jnp.where(taken, total, 0), poisoned, leaf)
