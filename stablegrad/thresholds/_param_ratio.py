"""A share of the parameters' own norm: the idea of adaptive gradient clipping."""

import jax
import jax.numpy as jnp
import numpy as np

from .._checks import require
from .._groups import Granularity
from .._signals import Signal, check_signal, is_norm
from ._core import Scope, Threshold


def param_ratio(
    ratio: float | jax.Array,
    *,
    eps: float | jax.Array = 1e-2,
    of: Signal = "grad_norm",
    per: Granularity = "unit",
) -> Threshold:
    """Calls a norm normal up to a share of the norm of the parameters it changes.

    With ||w|| the norm of a group of n parameters:

        limit = ratio * max(||w||, eps * sqrt(n))

    Args:
        ratio: Tolerated share of the parameters' norm. Dimensionless, > 0.
        eps: What the root mean square of a group's parameters counts as at least, > 0:
            a group that starts at zero must be free to leave it.
        of: "grad_norm" or "update_norm".
        per: For what: by default for each output neuron; else as for `fixed`.

    Returns:
        A threshold for a response, which needs `params` at every step. It has no
        state. A nan or inf is never normal.

    Raises:
        ValueError: If a concrete argument is out of range; when the optimizer is
            initialised, if a layout is unknown; at a step without `params`.

    Example:
        >>> import optax
        >>> import stablegrad as sg
        >>> tx = sg.guard(optax.sgd(0.1), sg.clip(sg.param_ratio(0.01)))

    Reference:
        Brock et al., High-performance large-scale image recognition without
        normalization (2021), https://arxiv.org/abs/2102.06171, where a unit of norm
        below 1e-3 counts as 1e-3 whatever its size, and a zero layer hardly moves.
    """
    check_signal(of, per)
    if not is_norm(of):
        raise ValueError(
            f"`of` must be 'grad_norm' or 'update_norm' for `param_ratio`, got {of!r}."
        )
    require("ratio", ratio, "> 0", lambda x: 0 < x < float("inf"))
    require("eps", eps, "> 0", lambda x: 0 < x < float("inf"))

    def limit(state, scope: Scope) -> jax.Array:
        del state
        least = eps * np.sqrt(np.array(scope.grouping.sizes, np.float32))
        return ratio * jnp.maximum(scope.param_norms, least)

    return Threshold(
        "param_ratio",
        of,
        per,
        init=lambda groups: (),
        limit=limit,
        update=lambda state, signal, exceeded: state,
        of_params=True,
    )
