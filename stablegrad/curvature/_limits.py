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
    """Return the learning rate eta below which steps contract along an eigenvector.

        eta (curvature k + w) < 2,    k = (1 + 2b if nesterov else 1) / (1 + b)

    `curvature` is the largest eigenvalue, of P^-1 H with a constant preconditioner P; b
    is the momentum, w the decoupled weight decay. `averaged` means m = b m + (1 - b) g,
    as in Adam, which multiplies k by (1 - b). The limit is inf if no rate is unstable.
    """
    ahead = 1 + 2 * momentum if nesterov else 1.0
    gain = ahead / (1 + momentum) * (1 - momentum if averaged else 1.0)
    stiffness = max(curvature, 0.0) * gain + weight_decay
    return 2 / stiffness if stiffness else math.inf
