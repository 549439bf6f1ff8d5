"""Expectations of an activation over normal pre-activations, by quadrature.

They are integrals over panels that meet at 0, where most activations have their kink.
There, Gauss-Hermite quadrature is 0.3 % off for SELU, and 3 % for that of hard tanh.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from .._checks import require

Activation = Callable[[jax.Array], jax.Array]

NODES = 8  # Of Gauss and Legendre, in each panel.
# Ends of the panels on either side, in deviations: of width 1/4 from 2 to 10, and
# shrinking towards 0, where the kinks of an activation lie if q is large.
ENDS = np.concatenate([[0.0], 2.0 ** (np.arange(-208, 8) / 8), np.arange(8, 41) / 4])


@functools.cache
def normal_nodes() -> tuple[np.ndarray, np.ndarray]:
    """Return nodes and weights for expectations over N(0, 1)."""
    offsets, weights = np.polynomial.legendre.leggauss(NODES)
    half = np.diff(ENDS)[:, None] / 2
    above = (ENDS[:-1, None] + half + half * offsets).ravel()
    nodes = np.concatenate([-above[::-1], above])
    widths = (half * weights).ravel()
    density = np.exp(-np.square(nodes) / 2) / math.sqrt(2 * math.pi)
    return nodes, np.concatenate([widths[::-1], widths]) * density


def second_moment(
    activation: Activation,
    q: float,
    *,
    slopes: bool = False,
    may_overflow: bool = False,
) -> float:
    """Return E[phi^2] or E[phi'^2] at pre-activations of variance q."""
    require("q", q, "> 0", lambda x: 0 < x < math.inf)
    if not callable(activation):
        raise TypeError(
            f"`activation` must be an elementwise function, got {activation!r}."
        )
    nodes, weights = normal_nodes()
    # Compile-time evaluation: initialisers also run within `jax.jit`.
    with jax.ensure_compile_time_eval():
        at = jnp.asarray(math.sqrt(float(q)) * nodes, jnp.float32)
        whole, half = (np.asarray(activation(x)) for x in (at, at[::2]))
        same = whole.shape == nodes.shape and half.shape == nodes[::2].shape
        if not same or not np.allclose(half, whole[::2], equal_nan=True):
            raise ValueError(
                f"{shown(activation)} must be elementwise: a function of each element "
                "alone, of the shape of its argument."
            )
        found = _slopes(activation, at) if slopes else whole
    moment = float(np.sum(weights * np.square(np.abs(found).astype(np.float64))))
    if not math.isfinite(moment) and not (may_overflow and moment == math.inf):
        raise ValueError(f"{shown(activation)} is not finite at q = {q:g}.")
    return moment


def _slopes(activation: Activation, at: jax.Array) -> np.ndarray:
    if not jnp.issubdtype(jax.eval_shape(activation, at).dtype, jnp.inexact):
        return np.zeros(at.shape)
    try:
        return np.asarray(jax.jvp(activation, (at,), (jnp.ones_like(at),))[1])
    except TypeError:  # A `custom_vjp` has no forward mode.
        out, backward = jax.vjp(activation, at)
        return np.asarray(backward(jnp.ones_like(out))[0])


def shown(activation: Activation) -> str:
    """Return how messages call an activation."""
    return f"the activation `{getattr(activation, '__name__', repr(activation))}`"
