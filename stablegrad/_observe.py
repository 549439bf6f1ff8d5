"""Reading a guard: metrics for a logger, health for a loop."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import _reading, _trees
from ._halt_message import halt_message
from .clipping._readings import numbers_of_clips
from .engine._record import last_step_of
from .engine._write import newly_broken
from .learning_rate._readings import numbers_of_rates


class TrainingHalted(RuntimeError):
    """Raised by `raise_if_halted`: a run is stuck on bad steps."""


def metrics(state: Any) -> dict[str, jax.Array]:
    """Return what every guard in an optimizer state measured and did, as flat scalars.

    Args:
        state: A state with a guard's state anywhere in it: in a chain, in a wrapper, in
            a Flax train state, in an NNX optimizer.

    Returns:
        Numbers, ready for any logger: rank-0 arrays inside jit, else NumPy's. Of the
        last step:

        - `grad_norm`, `clipped_grad_norm`: of the incoming gradient; after clipping.
        - `clip_scale`: smallest factor on a leaf of gradient or update, 1: no clip.
        - `raw_update_norm`, `update_norm`: of the optimizer's update; as applied. Only
          if a threshold watches "update_norm".
        - `loss_value`: what was passed as `value=`, nan if nothing was.
        - `lr_scale`: factor on the learning rate, in [0, 1].
        - `skipped`, `skip_reason`: whether, and why as a `Reason` (0: taken).
        - `first_bad_leaf`: index of the first floating-point leaf with a nan, inf or
          overflow, else of the first that kept an element out, -1 if none;
          `largest_leaf`: that of the largest gradient norm. `events` has their names.
        - `kept_out_elements`: elements of update and state that were not finite.
        - `halted`: whether the run is stuck; `nonfinite_run`: steps that were not
          finite since one was last taken, if there is a `halt`.
        - `back_off_scale`: the part of `lr_scale` that comes from `back_off`.
        - `trust_radius`, `trust_ratio`, `trust_target`, `trust_scale`, `trust_probes`,
          `trust_cuts`: of a `trust_region`; the radius is inf while it does not bind.
          `trust_mismatch`: 1 if it is off because `value_fn` or the gradients do not
          belong to `value`.
        - `rolled_back`, `roll_backs`, `roll_back_refusal`, `snapshots`, `snapshot_age`:
          of a `roll_back`, which documents them.
        - `layer_health_checks`, `layer_health_excess`, and for each layer
          `layer_health_<signal>/<layer>`: of a `layer_health`.
        - `<response>_<threshold>_<signal>_limit`: each limit in force, inf: none yet;
          of the strictest leaf under per="leaf".

        Since `init`: `guarded_steps`, `clipped_steps`, `skipped_steps`,
        `backed_off_steps`, `shortened_steps`, `kept_out_steps`, `halted_steps`,
        `warned_steps` (of a `layer_health`); and `consecutive_skips` up to now.

        Of several guards the names are prefixed `guard_0_`, `guard_1_`, and so on. Each
        `clip_by_...` of a chain adds `<its name>_raw_norm`, `_clipped_norm`, `_limit`,
        `_scale` (the smallest factor), and since `init` `_clipped_steps` and
        `_dropped_steps` (not finite; zeros unless published); a second one of the same
        name is `<its name>_2_...`. An explosion-aware schedule adds
        `schedule_lr_scale`, `schedule_rate`, `schedule_position`, `schedule_cuts` and
        `schedule_dropped_steps`; a plateau `plateau_scale`, `plateau_best` (nan: none
        yet), `plateau_bad_evaluations`, `plateau_evaluations`, `plateau_cuts` and
        `plateau_ignored_metrics`; a second one is `schedule_2_...`, `plateau_2_...`.

    Raises:
        ValueError: If there is neither a guard nor one of those in the state.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import stablegrad as sg
        >>> tx = optax.chain(sg.guard(optax.sgd(0.1), sg.clip(sg.fixed(1.0))))
        >>> params = {"w": jnp.zeros(2)}
        >>> grads = {"w": jnp.array([3.0, 4.0])}
        >>> _, state = tx.update(grads, tx.init(params), params)
        >>> now = sg.metrics(state)
        >>> now["grad_norm"].item(), round(now["clipped_grad_norm"].item(), 6)
        (5.0, 1.0)
    """
    state = _reading.without_snapshots(_trees.without_variables(state))
    in_chains = {**numbers_of_clips(state), **numbers_of_rates(state)}
    # Without any of those, a state without a guard is an error.
    found = _reading.search(state) if in_chains else _reading.guards(state)
    prefixes = [""] if len(found) == 1 else [f"guard_{i}_" for i in range(len(found))]
    of_guards = {
        prefix + name: number
        for prefix, guard_state in zip(prefixes, found, strict=True)
        for name, number in _reading.numbers(guard_state).items()
    }
    return {**of_guards, **in_chains}


def is_healthy(state: Any, *trees: Any, params: Any = None) -> jax.Array:
    """Return whether a run can go on: no guard halted, and all given trees finite.

    The optimizer state is not looked at: a guard keeps finite what was finite, except
    in some steps of large trees on a CPU, and an optimizer may hold an inf on purpose.

    Args:
        state: A state with a guard's state anywhere in it, as for `metrics`.
        *trees: Parameters, batch statistics and other pytrees to look at.
        params: Another pytree to look at.

    Returns:
        A rank-0 bool, usable inside jit. A single skipped step is healthy.

    Raises:
        ValueError: If there is no guard in the state.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import stablegrad as sg
        >>> params = {"w": jnp.ones(2)}
        >>> bool(sg.is_healthy(sg.stabilize(optax.sgd(0.1)).init(params), params))
        True
    """
    halted = [_reading.last_step(found).halted for found in _reading.guards(state)]
    members = jnp.shape(halted[0])

    def any_bad(leaf):
        own = leaf.shape[: len(members)] == members  # Else all members share it.
        rest = tuple(range(len(members) if own else 0, leaf.ndim))
        return jnp.broadcast_to(jnp.any(~jnp.isfinite(leaf), axis=rest), members)

    bad = [any_bad(leaf) for leaf in _trees.inexact_leaves((*trees, params))]
    return ~jnp.any(jnp.stack([*map(jnp.asarray, halted), *bad]), axis=0)


def keep_if_skipped(state: Any, old: Any, new: Any) -> Any:
    """Return `new`, with `old` where the last step was skipped or an element broke.

        skipped step:   old
        taken step:     new_i,  old_i where new_i is not finite and old_i is

    A guard keeps parameters and optimizer state as they were when it skips a step. This
    does the same for what the step changed besides: batch statistics, an average of the
    parameters, counters of random numbers, a position in the data. A batch with one
    element of 1e20 may pass the guard, since a normalized gradient is small, and its
    variance is inf all the same.

    Args:
        state: The optimizer state after the step, with a guard's state anywhere in it,
            as for `metrics`; of several guards, one that skipped is enough.
        old: A pytree of arrays from before the step. It must not be changed in place
            meanwhile: `nnx.state(model, ...)` refers to the model's own variables, so
            take `jax.tree.map(lambda x: x, nnx.state(model, nnx.BatchStat))`. If all
            arrays of both trees are the same objects, there is a warning.
        new: The same after the step, nan and inf included.

    Returns:
        A pytree like `new`, each element bit for bit that of one or the other; usable
        inside jit. Leaves that are not arrays are those of `new`.

    Raises:
        ValueError: If there is no guard in the state, or if the trees differ in
            structure, shapes or dtypes; for an ensemble, if an array lacks its leading
            axes.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import stablegrad as sg
        >>> params = jnp.ones(2)
        >>> tx = sg.guard(optax.sgd(0.1), sg.skip())
        >>> _, state = tx.update(jnp.full(2, jnp.nan), tx.init(params), params)
        >>> stats = {"mean": jnp.zeros(2)}
        >>> sg.keep_if_skipped(state, stats, {"mean": jnp.full(2, jnp.nan)})["mean"]
        Array([0., 0.], dtype=float32)
    """
    found = _reading.guards(state)
    before, after = map(_trees.shapes_and_dtypes, (old, new))
    if before != after:
        raise ValueError(
            "`old` and `new` must be the same pytree from before and after the step, "
            f"with equal shapes and dtypes; got\n  old: {before}\n  new: {after}"
        )
    pairs = list(zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True))
    if pairs and all(before is after for before, after in pairs):
        warnings.warn(
            "`old` and `new` are the same arrays, so nothing is kept. `nnx.state` "
            "refers to the model's variables: copy them before the forward pass with "
            "`jax.tree.map(lambda x: x, nnx.state(model, nnx.BatchStat))`.",
            stacklevel=2,
        )
    skipped = jnp.asarray(_reading.last_step(found[0]).skipped)
    for other in found[1:]:
        skipped |= _reading.last_step(other).skipped

    def choose(before, after):
        if before is after or not _trees.is_array(after):
            return after
        members, extra = skipped.shape, np.ndim(after) - skipped.ndim
        if np.shape(after)[: len(members)] != members:
            raise ValueError(
                f"an array of shape {np.shape(after)} has no leading axes for the "
                f"members of the ensemble, {members}: what they share cannot be kept "
                "for one of them."
            )
        flag = skipped.reshape(skipped.shape + (1,) * extra)
        return jnp.where(flag | newly_broken(after, before), before, after)

    return jax.tree.map(choose, old, new)


def raise_if_halted(state: Any) -> None:
    """Raise an error on the host if a guard has halted; call it as often as you log.

    Args:
        state: A state with a guard's state anywhere in it, as for `metrics`; also one
            that is stacked over an ensemble.

    Raises:
        TrainingHalted: If `halt` or `roll_back` has raised the flag. The message is an
            account: what happened, since when, in which leaf, what was tried, what to
            try next, and the last events; of an ensemble, that of the first member.
        ValueError: If there is no guard in the state.
        TypeError: Inside jit.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import stablegrad as sg
        >>> tx = sg.guard(optax.sgd(0.1), sg.skip(), sg.halt(after=1))
        >>> params = {"w": jnp.zeros(2)}
        >>> _, state = tx.update({"w": jnp.full(2, jnp.nan)}, tx.init(params), params)
        >>> sg.raise_if_halted(state)
        Traceback (most recent call last):
        ...
        stablegrad._observe.TrainingHalted: training halted at step 0: ...
    """
    _trees.require_host("raise_if_halted", state)
    guards = _reading.guards(state)
    for number, guard_state in enumerate(guards):
        record, _ = _reading.record_of(guard_state)
        which = f"guard {number}: " if len(guards) > 1 else ""
        flags = np.asarray(last_step_of(record).halted)
        if not flags.any():
            continue
        if not flags.ndim:
            raise TrainingHalted(which + halt_message(guard_state))
        members = np.flatnonzero(flags).tolist()
        first = _reading.member(guard_state, tuple(np.argwhere(flags)[0]))
        raise TrainingHalted(
            f"{which}training halted for ensemble members {members}, the first of "
            "them:\n" + halt_message(first)
        )
