"""Names for functions of one number, by their values on a grid."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

GRID = np.linspace(-8.0, 8.0, 401, dtype=np.float32)

_KNOWN = (
    ("relu", jax.nn.relu),
    ("tanh", jnp.tanh),
    ("sigmoid", jax.nn.sigmoid),
    ("gelu", jax.nn.gelu),
    ("gelu", lambda x: jax.nn.gelu(x, approximate=False)),
    ("silu", jax.nn.silu),
    ("softplus", jax.nn.softplus),
    ("elu", jax.nn.elu),
    ("selu", jax.nn.selu),
    ("leaky_relu", jax.nn.leaky_relu),
    ("relu6", jax.nn.relu6),
    ("mish", jax.nn.mish),
    ("square", jnp.square),
    ("sin", jnp.sin),
)


def named(f: np.ndarray, dtype) -> str:
    """Return the name of a function computed in `dtype`, whatever multiplies it."""
    scaled, rounding = f / np.abs(f).max(), 2 * float(jnp.finfo(dtype).eps)
    for (name, _), known in zip(_KNOWN, _tables(jnp.dtype(dtype)), strict=True):
        known = known / np.abs(known).max()
        if np.allclose(scaled, known, atol=1e-3, rtol=max(rounding, 1e-5)):
            return name
    return ""


@functools.cache
def _tables(dtype) -> list[np.ndarray]:
    """Return the values of all known functions at the points of the grid in `dtype`."""
    points = jnp.asarray(GRID, dtype).astype(jnp.float32)
    return jax.device_get(jax.jit(lambda x: [f(x) for _, f in _KNOWN])(points))
