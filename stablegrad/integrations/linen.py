"""Training with Flax Linen's `TrainState`."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.training.train_state import TrainState

from .._observe import keep_if_skipped
from ..engine._apply import apply

FOR_THE_GUARD = {"value", "value_fn", "batch_id"}


def apply_gradients(
    state: TrainState, *, grads: Any, fields: dict[str, Any] | None = None, **extra
) -> TrainState:
    """Take one step of a `TrainState`, with `value=` and what else a guard needs.

    `TrainState.apply_gradients` calls `tx.update(grads, opt_state, params)` alone. This
    passes extra arguments on, and takes the step as `stablegrad.apply` does.

    Args:
        state: A train state whose `tx` is guarded.
        grads: The gradients, a pytree like `state.params`.
        fields: Further fields of the train state after the step, such as
            {"batch_stats": ...}. They go through `keep_if_skipped`: if the guard skips
            the step, they stay as they were.
        **extra: Fields by name, as Flax's own method takes them, and what is passed on
            to the transformation, such as `value=loss`. `value`, `value_fn` and
            `batch_id` are passed on even if the train state has a field of that name,
            which `fields` sets.

    Returns:
        The next train state. Its `step` counts skipped steps, too. What a float8 layer
        keeps in `_overwrite_with_gradient` is treated as fields are.

    Raises:
        TypeError: If `fields` names something else than a further field, or if a name
            in `extra` resembles that of a field.
        ValueError: If there is no guard in the state and fields are given, and whatever
            `tx.update` raises.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from flax.training.train_state import TrainState
        >>> import stablegrad as sg
        >>> from stablegrad.integrations.linen import apply_gradients
        >>> state = TrainState.create(
        ...     apply_fn=None, params=jnp.ones(2), tx=sg.stabilize(optax.sgd(0.5))
        ... )
        >>> state = apply_gradients(state, grads=jnp.ones(2), value=jnp.array(1.0))
        >>> state.params, state.step
        (Array([0.5, 0.5], dtype=float32), 1)
    """
    fields = _told_apart(state, dict(fields or {}), extra)
    overwrites = isinstance(grads, Mapping) and OVERWRITE_WITH_GRADIENT in grads
    trained = lambda tree: tree["params"] if overwrites else tree
    params, opt_state = apply(
        state.tx, trained(grads), state.opt_state, trained(state.params), **extra
    )
    keep = lambda old, new: keep_if_skipped(opt_state, old, new)
    if overwrites:
        name = OVERWRITE_WITH_GRADIENT
        params = {"params": params, name: keep(state.params[name], grads[name])}
    kept = {name: keep(getattr(state, name), new) for name, new in fields.items()}
    return state.replace(
        step=state.step + 1, params=params, opt_state=opt_state, **kept
    )


def _told_apart(state: TrainState, fields: dict[str, Any], extra: dict[str, Any]):
    """Return the fields, with those that are in `extra`, which loses them."""
    own = {field.name for field in dataclasses.fields(TrainState)}
    names = {field.name for field in dataclasses.fields(state)} - own
    fields |= {n: extra.pop(n) for n in (names - FOR_THE_GUARD) & extra.keys()}
    for name in fields:
        if name not in names:
            raise TypeError(
                f"`fields` must be further fields of the train state, {sorted(names)}, "
                f"got {name!r}."
            )
    for name in extra.keys() - FOR_THE_GUARD:
        meant = difflib.get_close_matches(name, names | {"opt_state", "params"}, 1, 0.8)
        if meant:
            raise TypeError(
                f"`apply_gradients` got `{name}=`; the train state has `{meant[0]}`."
            )
    return fields
