"""Products of the Hessian with a vector, for losses that differentiate twice or not."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from . import _vectors

METHODS = ("jvp", "vjp", "difference")
_SHORT = 1e-3  # Of the parameters' norm: what a central difference moves them by.


def product(loss, method: str) -> Callable:
    """A function (point, data, vector) -> H vector.

    `"jvp"` is forward over reverse, the cheapest; `"vjp"` is reverse over reverse, for
    functions with a `custom_vjp`; `"difference"` is the central difference of two
    gradients, for whatever has one, such as a Pallas kernel:

        H v = (g(x + h v) - g(x - h v)) / 2h,    h = 1e-3 ||x|| / ||v||
    """
    gradient = jax.grad(loss)

    def by_jvp(point, data, vector):
        return jax.jvp(lambda x: gradient(x, data), (point,), (vector,))[1]

    def by_vjp(point, data, vector):
        return jax.grad(lambda x: _vectors.dot(gradient(x, data), vector))(point)

    def by_difference(point, data, vector):
        size = jnp.maximum(_vectors.norm(vector), jnp.finfo(jnp.float32).tiny)
        length = jnp.maximum(_vectors.norm(point), 1e-3)
        h = _SHORT * length / size
        ahead = gradient(_vectors.moved(point, h, vector), data)
        behind = gradient(_vectors.moved(point, -h, vector), data)
        return jax.tree.map(
            lambda a, b: ((a - b) / (2 * h).astype(a.dtype)).astype(a.dtype),
            ahead,
            behind,
        )

    return {"jvp": by_jvp, "vjp": by_vjp, "difference": by_difference}[method]


def cheapest(loss, point, data) -> str:
    """The first method that this loss allows; an error of the loss itself is raised."""
    jax.eval_shape(jax.grad(loss), point, data)
    for method in METHODS[:-1]:
        if _refusal(method, loss, point, data) is None:
            return method
    return METHODS[-1]


def require_allowed(method: str, loss, point, data) -> None:
    """Raises ValueError unless this loss allows the method."""
    jax.eval_shape(jax.grad(loss), point, data)
    error = _refusal(method, loss, point, data)
    if error is not None:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"`curvature` must be one that `loss_fn` can be differentiated for, got "
            f"{method!r} ({reason}). Pass 'auto', 'difference', or 'forward', which "
            "takes losses only."
        ) from error


def _refusal(method: str, loss, point, data) -> Exception | None:
    """What stands in the way of a method."""
    try:
        # Tracing is not enough: some missing rules show on lowering only.
        jax.jit(product(loss, method)).lower(point, data, point)
    except Exception as error:
        return error
    return None
