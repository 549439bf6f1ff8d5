"""Products of the Hessian of a loss with a vector, by three methods."""

import jax
import jax.numpy as jnp
import optax

from .._norms import measure

_RELATIVE_STEP = 1e-3  # Step of the central difference, relative to ||x||.


def product(loss, method: str, params, data, vector):
    """Return the product H v of the Hessian at `params` with a vector.

    "jvp" is forward over reverse differentiation, the cheapest. "vjp" is reverse over
    reverse, for functions with a `custom_vjp`. "difference" takes two gradients, for
    functions without a second derivative, such as a Pallas kernel:

        H v = (g(x + h v) - g(x - h v)) / 2h,    h = 1e-3 ||x|| / ||v||
    """
    gradient = jax.grad(lambda x: loss(x, data))
    if method == "jvp":
        return jax.jvp(gradient, (params,), (vector,))[1]
    if method == "vjp":
        return jax.grad(lambda x: optax.tree.vdot(gradient(x), vector))(params)
    size = jnp.maximum(measure(vector).norm, jnp.finfo(jnp.float32).tiny)
    h = _RELATIVE_STEP * jnp.maximum(measure(params).norm, 1e-3) / size
    ahead, behind = (gradient(move(params, step, vector)) for step in (h, -h))
    return jax.tree.map(lambda a, b: (a - b) / (2 * h), ahead, behind)


def move(params, length, direction):
    """Return `params + length * direction`, in the dtypes of `params`."""
    return optax.apply_updates(params, optax.tree.scale(length, direction))


def choose(method: str, loss, params, data) -> str:
    """Return the method, or for "auto" the cheapest one that the loss supports.

    Raise ValueError if the loss does not support it, and any error of the loss itself.
    """
    if method in ("difference", "forward"):
        return method
    jax.eval_shape(jax.grad(loss), params, data)
    cause = None
    for candidate in ("jvp", "vjp") if method == "auto" else (method,):
        try:
            # Tracing is not enough: JAX reports some missing rules at lowering only.
            jax.jit(product, static_argnums=(0, 1)).lower(
                loss, candidate, params, data, params
            )
            return candidate
        except Exception as error:
            cause = error
    if method == "auto":
        return "difference"
    reason = str(cause).strip().split("\n")[0]
    raise ValueError(
        f"`curvature` must be a derivative that `loss_fn` supports, got {method!r} "
        f"({reason}). Pass 'auto', 'difference', or 'forward', which takes losses only."
    ) from cause
