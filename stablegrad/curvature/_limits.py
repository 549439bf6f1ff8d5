"""The largest learning rate at which an optimizer is stable on a quadratic."""

import math


def stable_limit(
    curvature: float,
    momentum: float = 0.0,
    *,
    nesterov: bool = False,
    averaged: bool = False,
    weight_decay: float = 0.0,
) -> float:
    """The rate eta below which the step contracts along an eigenvalue `curvature`.

        eta (curvature k + w) < 2,    k = (1 + 2b if nesterov else 1) / (1 + b)

    with k times (1 - b) where the momentum is an average, as in Adam with its
    preconditioner frozen. w is decoupled weight decay, which the rate multiplies.
    Gives 2, 2 + 2b, (2 + 2b) / (1 + 2b) and (2 + 2b) / (1 - b) over the curvature.

    Args:
        curvature: The largest eigenvalue, of P^-1 H where there is a preconditioner.
        momentum: b, in [0, 1).
        nesterov: Whether the step looks ahead.
        averaged: Whether m = b m + (1 - b) g, not m = b m + g.
        weight_decay: w, >= 0.

    Returns:
        inf where nothing limits the rate.
    """
    ahead = 1 + 2 * momentum if nesterov else 1.0
    gain = ahead / (1 + momentum) * (1 - momentum if averaged else 1.0)
    stiffness = max(curvature, 0.0) * gain + weight_decay
    return 2 / stiffness if stiffness else math.inf
