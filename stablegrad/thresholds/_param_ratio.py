"""A share of the parameters' own norm: the idea of adaptive gradient clipping."""

import jax
import jax.numpy as jnp

from .._checks import require
from ..granularity._groups import Granularity
from ._base import Scope, Threshold
from ._signals import Signal, check_signal, is_norm


def param_ratio(
    ratio: float | jax.Array,
    *,
    eps: float | jax.Array = 1.0,
    of: Signal = "grad_norm",
    per: Granularity = "unit",
) -> Threshold:
    """Call a norm normal up to a share of the norm of the parameters it changes.

    With ||w|| the norm of a group of parameters:

        limit = ratio * max(||w||, eps)

    Args:
        ratio: Tolerated share of the parameters' norm. Dimensionless, > 0.
        eps: What ||w|| counts as at least, > 0. 1 is what an output neuron has under
            the usual initialisations, whatever its fan-in, so that neurons that
            start at zero can grow as fast as others.
        of: "grad_norm" or "update_norm".
        per: The granularity: by default each output neuron; else as for `fixed`.

    Returns:
        A threshold for a response, which needs `params` at every step. It has no
        state. A nan or inf is never normal, and a group whose parameters are not
        finite has no limit.

    Raises:
        ValueError: If a concrete argument is out of range; when the optimizer is
            initialised, if a layout is unknown; at a step without `params`.

    Example:
        >>> import optax
        >>> import stablegrad as sg
        >>> tx = sg.guard(optax.sgd(0.1), sg.clip(sg.param_ratio(0.01)))

    Reference:
        Brock et al., High-performance large-scale image recognition without
        normalization (2021), https://arxiv.org/abs/2102.06171, with eps = 1e-3,
        so that a layer of zeros hardly moves.
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
        known = jnp.isfinite(scope.param_norms)
        return jnp.where(known, ratio * jnp.maximum(scope.param_norms, eps), jnp.inf)

    return Threshold(
        "param_ratio",
        of,
        per,
        init=lambda groups: (),
        limit=limit,
        update=lambda state, signal, exceeded: state,
        of_params=True,
    )
