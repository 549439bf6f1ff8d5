"""`apply`: one optimizer step that returns the new parameters."""

from typing import Any

import optax

from .. import _checks, _missing
from .._extra_args import with_extra_args
from ._guard import APPLY


def apply(
    tx: optax.GradientTransformation, grads, state, params, **extra
) -> tuple[Any, Any]:
    """Take one optimizer step and return the new parameters.

        updates, state' = tx.update(grads, state, params, **extra)
        params' = params + updates

    For a `guard` both lines run under one condition, so a rejected step returns
    parameters and inner state bit for bit as they were. Any other optax transformation
    takes the two lines as they stand.

    Args:
        tx: A transformation, guarded or not.
        grads: Gradients, a pytree like `params`.
        state: The optimizer state, from `tx.init(params)` or the last step.
        params: The parameters, a pytree of arrays. What has None in the gradient, such
            as a function of an Equinox model, stays as it is.
        **extra: Passed on to the transformation, such as `value=loss`.

    Returns:
        The new parameters and the new state. Parameters keep their dtypes.

    Raises:
        ValueError: If `params` is None, and whatever `tx.update` raises.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> import stablegrad as sg
        >>> tx = sg.stabilize(optax.sgd(0.1))
        >>> params = jnp.array([1.0, 2.0])
        >>> state = tx.init(params)
        >>> loss, grads = jax.value_and_grad(lambda p: jnp.sum(p**2))(params)
        >>> params, state = sg.apply(tx, grads, state, params, value=loss)
        >>> params.tolist()
        [0.800000011920929, 1.600000023841858]
    """
    if params is None:
        raise _missing.missing_params("`apply`")
    guarded_apply = getattr(tx.update, APPLY, None)
    if guarded_apply is not None:
        new, state = guarded_apply(grads, state, params, **extra)
    else:
        tx = with_extra_args(tx)
        updates, state = tx.update(grads, state, params, **extra)
        new = optax.apply_updates(_checks.matching_params(params, updates), updates)
    return _checks.completed(new, params), state
