"""An identity whose backward pass limits the gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from .. import _checks

PER = ("whole", "example", "token")


def limit_gradient(
    x: jax.Array, max_norm: float | jax.Array, *, per: str = "example"
) -> jax.Array:
    """Return `x`, and limit the gradient that flows back through it.

        forward   y = x
        backward  g_i <- g_i min(1, max_norm / ||g_i||)    for every part i

    The layers before this point get a gradient of at most `max_norm` per part. A clip
    in the optimizer acts on the sum over the batch, where one example may dominate.

    Args:
        x: Activations, of any floating-point dtype.
        max_norm: Largest norm of a part, >= 0, in the units of dL/dx; it may be traced.
            In the gradient of a mean over a batch of B, each example's share contains a
            factor 1 / B. 0 stops the gradient.
        per: The parts. "example": one index of the first axis. "token": one vector
            along the last axis, as in (batch, length, width). "whole": all of `x`.

    Returns:
        `x`. Norms are computed in float32 or wider and do not overflow. A part with a
        nan or inf flows back unchanged, so that a guard can report it, and does not
        affect the other parts. As any `jax.custom_vjp`, it supports reverse mode only.

    Raises:
        TypeError: If `x` is not floating-point.
        ValueError: If `max_norm` or `per` is out of range, or `x` has no axis for the
            parts.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import stablegrad as sg
        >>> weights = jnp.array([[1.0], [1000.0]])
        >>> loss = lambda x: jnp.sum(weights * sg.limit_gradient(x, 5.0))
        >>> jax.grad(loss)(jnp.ones((2, 1))).ravel().tolist()
        [1.0, 5.0]

    Reference:
        Pascanu et al. (2013), https://arxiv.org/abs/1211.5063, inside the network.
    """
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"`x` must be floating-point, got {x.dtype}.")
    _checks.require("max_norm", max_norm, ">= 0", lambda x: x >= 0)
    _checks.require("per", per, f"one of {PER}", lambda x: x in PER)
    if per != "whole" and x.ndim == 0:
        raise ValueError(f'`x` must have an axis for per="{per}", got a scalar.')
    axes = {
        "whole": tuple(range(x.ndim)),
        "example": tuple(range(1, x.ndim)),
        "token": (x.ndim - 1,),
    }[per]
    most = jnp.asarray(max_norm, np.promote_types(x.dtype, np.float32))
    if most.ndim:
        raise ValueError(f"`max_norm` must be one number, got shape {most.shape}.")
    return _identity(x, most, axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _identity(x, max_norm, axes):
    return x


def _forward(x, max_norm, axes):
    return x, max_norm


def _backward(axes, max_norm, gradient):
    wide = np.promote_types(gradient.dtype, np.float32)
    parts = gradient.astype(wide)
    largest = jnp.max(jnp.abs(parts), axis=axes, keepdims=True, initial=0.0)
    measurable = jnp.isfinite(largest) & (largest > 0)
    # Divided by the largest element, so that no square overflows or vanishes; by less
    # near the largest float, whose reciprocal would be rounded to zero.
    divisor = jnp.minimum(largest, np.finfo(wide).max / 256)
    divisor = jnp.where(measurable, divisor, 1.0)
    unit = parts / divisor
    norm = jnp.sqrt(jnp.sum(unit * unit, axis=axes, keepdims=True))
    norm = jnp.where(measurable, norm, 1.0)
    share = max_norm.astype(wide) / norm
    limited = (unit * share).astype(gradient.dtype)
    kept = jnp.where(measurable & (divisor > share), limited, gradient)
    return kept, jnp.zeros_like(max_norm)


_identity.defvjp(_forward, _backward)
