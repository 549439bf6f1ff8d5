"""Thresholds without a memory: a fixed limit, and finiteness alone."""

import jax
import jax.numpy as jnp

from .._checks import require
from ..granularity._groups import Granularity
from ._base import Threshold, as_float32
from ._signals import Signal, check_signal, is_norm


def _stateless(name, of, per, limit) -> Threshold:
    (limit,) = as_float32((limit,))
    return Threshold(
        name,
        of,
        per,
        init=lambda groups: (),
        limit=lambda state, scope: jnp.asarray(limit, jnp.float32),
        update=lambda state, signal, exceeded: state,
    )


def fixed(
    limit: float | jax.Array, *, of: Signal = "grad_norm", per: Granularity = "global"
) -> Threshold:
    """Call a signal normal up to a fixed limit.

        exceeded_t = not (x_t <= limit)

    Args:
        limit: Largest normal value, in the signal's unit. Finite; >= 0 for a norm.
        of: What is measured: "grad_norm", "value" (the loss), "update_norm", or a
            function `(updates, params, extra) -> scalar`.
        per: The granularity: "global" for one number a step, "leaf" for one per leaf,
            "unit" or `units(...)` for one an output neuron, or a function
            `(path, leaf)` that gives leaves of a group the same label, and None to
            those left out. Norms only, but for "global".

    Returns:
        A threshold for a response. It has no state, so nothing can poison it. A nan
        or inf signal is never normal.

    Raises:
        ValueError: If a concrete argument is out of range.

    Example:
        >>> import optax
        >>> import stablegrad as sg
        >>> tx = sg.guard(optax.sgd(0.1), sg.clip(sg.fixed(1.0)))

    Reference:
        Pascanu et al., On the difficulty of training recurrent neural networks (2013),
        https://arxiv.org/abs/1211.5063.
    """
    check_signal(of, per)
    norm = is_norm(of)
    require(
        "limit",
        limit,
        "a finite number >= 0" if norm else "a finite number",
        lambda x: abs(x) < float("inf") and (x >= 0 or not norm),
    )
    return _stateless("fixed", of, per, limit)


def nonfinite(*, of: Signal = "grad_norm", per: Granularity = "global") -> Threshold:
    """Call every finite signal normal, and no nan or inf.

        exceeded_t = not isfinite(x_t)

    Args:
        of: What is measured, as for `fixed`.
        per: The granularity, as for `fixed`.

    Returns:
        A threshold for a response, without state.

    Raises:
        ValueError: If `of` or `per` is unknown.

    Example:
        >>> import optax
        >>> import stablegrad as sg
        >>> tx = sg.guard(optax.sgd(0.1), sg.skip(sg.nonfinite()))

    Reference:
        `optax.apply_if_finite` asks the same of the incoming updates; it applies them
        all the same after some consecutive errors, which this never does.
    """
    check_signal(of, per)
    return _stateless("nonfinite", of, per, jnp.inf)
