"""Extra arguments of a step: who takes them, and numbers of the host among them."""

import inspect
from typing import Any

import numpy as np
import optax

MOST = 3.4e38  # Just below the largest float32, which stands for inf in a state.


def with_extra_args(tx: Any) -> optax.GradientTransformationExtraArgs:
    """Return a transformation that ignores extra arguments which it does not take.

    Optax's own function drops those of `optax.MultiSteps`, which is no
    `GradientTransformationExtraArgs`, and takes them all the same.
    """
    if not isinstance(tx, optax.GradientTransformation) and takes_all(tx.update):
        return optax.GradientTransformationExtraArgs(tx.init, tx.update)
    return optax.with_extra_args_support(tx)


def takes_all(update: Any) -> bool:
    """Return whether a function takes keywords of any name."""
    parameters = inspect.signature(update).parameters.values()
    return any(p.kind is p.VAR_KEYWORD for p in parameters)


def host_float32(number: Any) -> Any:
    """Return a number of the host as float32; one beyond its range stays finite.

    What is on a device, or no real number, is returned as it is.
    """
    if isinstance(number, bool) or not isinstance(
        number, int | float | np.ndarray | np.generic
    ):
        return number
    if isinstance(number, int):  # It may be beyond any array.
        number = float(max(min(number, int(MOST)), -int(MOST)))
    host = np.asarray(number)
    if host.dtype.kind not in "iuf":
        return number
    bounded = np.where(np.isfinite(host), np.clip(host, -MOST, MOST), host)
    return bounded.astype(np.float32)
