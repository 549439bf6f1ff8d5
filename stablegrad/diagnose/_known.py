"""Names for functions of one number, by their values on a grid."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

GRID = np.linspace(-8.0, 8.0, 401, dtype=np.float32)

_KNOWN = {
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "gelu": jax.nn.gelu,
    "gelu ": lambda x: jax.nn.gelu(x, approximate=False),
    "silu": jax.nn.silu,
    "softplus": jax.nn.softplus,
    "elu": jax.nn.elu,
    "selu": jax.nn.selu,
    "leaky_relu": jax.nn.leaky_relu,
    "relu6": jax.nn.relu6,
    "mish": jax.nn.mish,
    "square": jnp.square,
    "sin": jnp.sin,
}


def named(f: np.ndarray) -> str:
    """Return the name of a function, whatever it is multiplied by."""
    scaled = f / np.abs(f).max()
    for name, known in _tables().items():
        if np.allclose(scaled, known / np.abs(known).max(), atol=1e-3):
            return name.strip()
    return ""


@functools.cache
def _tables() -> dict[str, np.ndarray]:
    both = jax.jit(lambda x: {name: f(x) for name, f in _KNOWN.items()})
    return jax.device_get(both(GRID))
