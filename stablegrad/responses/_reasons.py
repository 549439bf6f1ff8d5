"""Why a step was not taken: the codes that states, metrics and events carry."""

from enum import IntEnum

import jax
import jax.numpy as jnp

from ..thresholds._signals import Signal

FIRST_OUTLIER = 10


class Reason(IntEnum):
    """Why a step was skipped. Codes below 10: something was nan or inf.

    Example:
        >>> import stablegrad as sg
        >>> sg.Reason(3).name
        'NONFINITE_UPDATE'
    """

    NONE = 0  # The step was taken.
    NONFINITE_GRADIENT = 1  # A nan or inf in the incoming gradient.
    NONFINITE_VALUE = 2  # The loss passed as `value=` was nan or inf.
    NONFINITE_UPDATE = 3  # Finite gradient, but the optimizer's update was not.
    NONFINITE_STATE = 4  # Finite update, but the optimizer's new state was not.
    NONFINITE_SIGNAL = 5  # A function given as `of=` returned nan or inf.
    NONFINITE_PARAMETERS = 6  # Finite update, but the parameters after it were not.
    GRADIENT_NORM = 10  # The gradient norm was above its threshold.
    VALUE = 11  # The loss was above its threshold.
    UPDATE_NORM = 12  # The norm of the update was above its threshold.
    SIGNAL = 13  # A function given as `of=` was above its threshold.


_CODES = {
    "grad_norm": (Reason.NONFINITE_GRADIENT, Reason.GRADIENT_NORM),
    "value": (Reason.NONFINITE_VALUE, Reason.VALUE),
    "update_norm": (Reason.NONFINITE_UPDATE, Reason.UPDATE_NORM),
}


def reason_code(of: Signal, nonfinite, outlier) -> jax.Array:
    """The int32 code of a signal that was not finite, or too large, or neither."""
    bad, large = (Reason.NONFINITE_SIGNAL, Reason.SIGNAL)
    if isinstance(of, str):
        bad, large = _CODES[of]
    code = jnp.where(outlier, int(large), int(Reason.NONE))
    return jnp.where(nonfinite, int(bad), code).astype(jnp.int32)


def first_reason(codes) -> jax.Array:
    """The most basic of several codes: the smallest that is not NONE."""
    reason = jnp.zeros((), jnp.int32)
    for code in codes:
        both = (reason > 0) & (code > 0)
        reason = jnp.where(both, jnp.minimum(reason, code), jnp.maximum(reason, code))
    return reason


def is_nonfinite(reason) -> jax.Array:
    """Whether a code says that something was nan or inf."""
    return (reason > 0) & (reason < FIRST_OUTLIER)
