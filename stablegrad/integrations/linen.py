"""Training with Flax Linen's `TrainState`."""

from typing import Any

from flax.training.train_state import TrainState

from .._observe import keep_if_skipped
from ..engine._apply import apply


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
            {"batch_stats": ...}. If the guard skips the step, they stay as they were.
        **extra: Passed on to the transformation, such as `value=loss`.

    Returns:
        The next train state. Its `step` counts skipped steps, too.

    Raises:
        ValueError: If there is no guard in the state and `fields` are given, and
            whatever `tx.update` raises.

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
    params, opt_state = apply(state.tx, grads, state.opt_state, state.params, **extra)
    kept = {
        name: keep_if_skipped(opt_state, getattr(state, name), new)
        for name, new in (fields or {}).items()
    }
    return state.replace(
        step=state.step + 1, params=params, opt_state=opt_state, **kept
    )
