"""Reasons why a step was not taken: the codes of states, metrics and events."""

from enum import IntEnum

import jax
import jax.numpy as jnp

from .._norms import OVERFLOW
from ..thresholds._signals import Signal

FIRST_OUTLIER = 10


class Reason(IntEnum):
    """Why a step was skipped. Codes below 10 mean that something was nan or inf.

    - `NONE`: The step was taken.
    - `NONFINITE_GRADIENT`: The norm of the incoming gradient was nan.
    - `NONFINITE_VALUE`: The loss passed as `value=` was nan or inf.
    - `NONFINITE_UPDATE`: No element of the optimizer's update was finite.
    - `NONFINITE_STATE`: The new state was not finite: large trees on a CPU.
    - `NONFINITE_SIGNAL`: A function given as `of=` returned nan or inf.
    - `NONFINITE_PARAMETERS`: The parameters themselves were not finite.
    - `GRADIENT_OVERFLOW`: The gradient norm was 1e18 or more, or inf.
    - `GRADIENT_NORM`: The gradient norm was above its threshold.
    - `VALUE`: The loss was above its threshold.
    - `UPDATE_NORM`: The norm of the update was above its threshold.
    - `SIGNAL`: A function given as `of=` was above its threshold.
    - `PARAMETER_NORM`: Parameters or moments had outgrown a snapshot of `roll_back`.

    Example:
        >>> import stablegrad as sg
        >>> sg.Reason(3).name
        'NONFINITE_UPDATE'
    """

    NONE = 0
    NONFINITE_GRADIENT = 1
    NONFINITE_VALUE = 2
    NONFINITE_UPDATE = 3
    NONFINITE_STATE = 4
    NONFINITE_SIGNAL = 5
    NONFINITE_PARAMETERS = 6
    GRADIENT_OVERFLOW = 7
    GRADIENT_NORM = 10
    VALUE = 11
    UPDATE_NORM = 12
    SIGNAL = 13
    PARAMETER_NORM = 14


_CODES = {
    # The engine itself rejects a gradient that is not finite.
    "grad_norm": (Reason.NONE, Reason.GRADIENT_NORM),
    "value": (Reason.NONFINITE_VALUE, Reason.VALUE),
    "update_norm": (Reason.NONFINITE_UPDATE, Reason.UPDATE_NORM),
}


def gradient_reason(norm) -> jax.Array:
    """Return the int32 code of a gradient of this norm, 0 if it is finite."""
    bad = jnp.where(
        jnp.isnan(norm), int(Reason.NONFINITE_GRADIENT), int(Reason.GRADIENT_OVERFLOW)
    )
    return jnp.where(norm < OVERFLOW, 0, bad).astype(jnp.int32)


def reason_code(of: Signal, nonfinite, outlier) -> jax.Array:
    """Return the int32 code of a signal: not finite, too large, or neither."""
    bad, large = (Reason.NONFINITE_SIGNAL, Reason.SIGNAL)
    if isinstance(of, str):
        bad, large = _CODES[of]
    code = jnp.where(outlier, int(large), int(Reason.NONE))
    return jnp.where(nonfinite, int(bad), code).astype(jnp.int32)


def first_reason(codes) -> jax.Array:
    """Return the smallest of several codes that is not NONE."""
    reason = jnp.zeros((), jnp.int32)
    for code in codes:
        both = (reason > 0) & (code > 0)
        reason = jnp.where(both, jnp.minimum(reason, code), jnp.maximum(reason, code))
    return reason


def is_nonfinite(reason) -> jax.Array:
    """Return whether a code means that something was not finite."""
    return (reason > 0) & (reason < FIRST_OUTLIER)
