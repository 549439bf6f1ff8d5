"""Guarding a run that was never guarded."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import optax

from .. import _trees
from .._checks import require_optimizer, require_steps
from .._packing import Packing, on_host
from .._reading import search
from ..engine._record import Totals, record_structs
from ..engine._step import GuardState
from ..engine._unwrap import unwrap
from ._matching import filled
from ._rebuild import rebuilt, require_finite


def adopt(
    tx: optax.GradientTransformation, params: Any, inner_state: Any, *, step: int = 0
) -> Any:
    """Return a guarded optimizer's state that goes on from an unguarded run's.

    The inner optimizer goes on exactly where it was. The guard's own statistics start
    here: it learns what is usual from the first steps, as at the start of a run.
    `unwrap` is the reverse.

    Args:
        tx: The guarded transformation, around the optimizer of the run as it was.
        params: The parameters now.
        inner_state: The state of the unguarded optimizer: its own, an `nnx.Optimizer`
            or a `TrainState` that holds it, or the dicts and lists that Orbax restores
            without a target. Leaves are matched by name.
        step: Steps that the run has taken, >= 0. `metrics` and `events` count from
            there.

    Returns:
        A state for `tx`. Arrays of the inner optimizer are those given, not copies.
        With NNX, `params` are `nnx.state(model, nnx.Param)`, and what is returned goes
        into a new optimizer by `nnx.update(optimizer.opt_state, nnx.state(state))`.

    Raises:
        TypeError: If `tx` is no optax transformation.
        ValueError: If `tx` holds no guard, if the state is of another optimizer or of
            other parameters, or if a parameter is not finite; it names the leaves.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import stablegrad as sg
        >>> params = {"w": jnp.ones(2)}
        >>> old = optax.adamw(1e-3).init(params)  # ... and many steps.
        >>> tx = sg.stabilize(optax.adamw(1e-3))
        >>> state = sg.adopt(tx, params, old, step=10_000)
        >>> int(sg.metrics(state)["guarded_steps"])
        10000
    """
    require_optimizer("adopt", tx)
    require_steps("step", step, least=0)
    require_finite("adopt", params)
    fresh = tx.init(params)
    if not search(fresh):
        raise ValueError(
            "`adopt` needs a guarded optimizer, such as `stabilize(...)`, and `tx` has "
            "no guard in it."
        )
    inner_state = opt_state_of(inner_state)
    if search(_trees.without_variables(inner_state)):
        warnings.warn(
            "`adopt` got the state of a guard: its counts and events are dropped. "
            "`stablegrad.migrate(tx, params, state)` keeps them.",
            stacklevel=2,
        )
    given = filled(unwrap(fresh), unwrap(inner_state), "adopt")
    begun = lambda guard: _starting_at(guard, jnp.asarray(step).astype(jnp.int32))
    return rebuilt(fresh, given, begun, params)


def opt_state_of(holder: Any) -> Any:
    """Return the state in an NNX optimizer or a train state; else what is given."""
    # A state of Optax may have an `opt_state`, too, but no `tx`.
    return holder.opt_state if hasattr(holder, "tx") else holder


def _starting_at(guard: GuardState, step: jax.Array) -> GuardState:
    """Return a fresh guard as if it had seen that many steps."""
    packing = Packing(record_structs(guard.columns))
    fresh = on_host(guard.numbers)  # They may lie on a mesh that is not in use.
    record = packing.unpack(fresh)
    totals = jnp.asarray(record.totals)
    totals = totals.at[Totals._fields.index("guarded_steps")].set(step)
    begun = packing.pack(record._replace(totals=totals))
    # The record comes first.
    numbers = tuple(
        jnp.concatenate([own, numbers[own.size :]])
        for numbers, own in zip(fresh, begun, strict=True)
    )
    return guard._replace(numbers=numbers)
