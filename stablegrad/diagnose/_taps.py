"""Statistics of an array and of the gradient that comes back to it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._elementwise import is_saturated

# What comes back through a probe, in this order.
GRADIENT = ("rms", "nonfinite")
FLOAT16_LARGEST = 65504.0


@jax.custom_vjp
def tap(array: jax.Array, probe: jax.Array) -> jax.Array:
    """Return the array; the gradient of the probe is the statistics of its gradient."""
    del probe
    return array


def _forward(array, probe):
    return array, jnp.zeros((), probe.dtype)


def _backward(_, gradient):
    found = of_gradient(gradient)
    return gradient, jnp.stack([found[name] for name in GRADIENT])


tap.defvjp(_forward, _backward)


def probes(shape: tuple[int, ...] = ()) -> jax.Array:
    """Return what to differentiate by, one for each iteration of the scans around."""
    return jnp.zeros((*shape, len(GRADIENT)), jnp.float32)


def sizes(array: jax.Array) -> jax.Array:
    """Return numbers as float32, complex ones as their absolute values."""
    real = jnp.abs(array) if jnp.iscomplexobj(array) else array
    return real.astype(jnp.float32)


def rms(array: jax.Array) -> jax.Array:
    """Root of the mean square, float32; no square overflows or vanishes. 0 if empty."""
    if not array.size:
        return jnp.zeros((), jnp.float32)
    x = jnp.abs(sizes(array))
    peak = jnp.max(x, initial=0.0)
    unit = jnp.where((peak > 0) & jnp.isfinite(peak), peak, 1.0)
    return unit * jnp.sqrt(jnp.mean(jnp.square(x / unit)))


def of_gradient(gradient: jax.Array) -> dict[str, jax.Array]:
    """Statistics of a gradient."""
    finite = jnp.isfinite(sizes(gradient))
    return {"rms": rms(gradient), "nonfinite": jnp.sum(~finite).astype(jnp.float32)}


def of_values(array: jax.Array) -> dict[str, jax.Array]:
    """Statistics of what a layer gives."""
    x = sizes(array)
    return {
        "rms": rms(x),
        "mean": jnp.mean(x),
        "largest": jnp.max(jnp.abs(x), initial=0.0),
        "nonfinite": jnp.sum(~jnp.isfinite(x)).astype(jnp.float32),
    }


def mean_cosine(array: jax.Array, by_example: bool) -> jax.Array:
    """Mean cosine between pairs of rows: of examples, or of all but the last axis."""
    x = sizes(array)
    if x.ndim < 2 or not x.size:
        return jnp.full((), jnp.nan)
    rows = x.reshape(x.shape[0], -1) if by_example else x.reshape(-1, x.shape[-1])
    count = rows.shape[0]
    if count < 2 or rows.shape[1] < 2:
        return jnp.full((), jnp.nan)
    unit = rows / jnp.maximum(jnp.linalg.norm(rows, axis=1, keepdims=True), 1e-30)
    total = jnp.sum(jnp.square(jnp.sum(unit, axis=0)))
    return (total - jnp.sum(jnp.square(unit))) / (float(count) * (count - 1))


def of_activation(activation: Any, array: jax.Array, axis: int) -> dict[str, jax.Array]:
    """Largest slope of each unit, and the share of saturated elements.

    Slopes are in units of the activation's largest. An element is saturated as
    `is_saturated` says.
    """
    _, slope = jax.jvp(activation.on, (array,), (jnp.ones_like(array),))
    slope = jnp.abs(slope.astype(jnp.float32)) / activation.slope
    others = tuple(i for i in range(slope.ndim) if i != axis % slope.ndim)
    return {
        "slopes": jnp.max(slope, axis=others),
        "saturated": jnp.mean(is_saturated(slope, 1.0).astype(jnp.float32)),
    }


def of_attention(
    logits: jax.Array, masked: jax.Array, weights: jax.Array
) -> dict[str, jax.Array]:
    """Largest unmasked logit, and the mean entropy of rows over that of equal weights.

    A mask is what takes more than 1,000 from a logit, or puts it below -1e8. Rows with
    one key only do not count.
    """
    x, after = logits.astype(jnp.float32), masked.astype(jnp.float32)
    allowed = (after > -1e8) & (after - x > -1e3)
    largest = jnp.max(jnp.where(allowed, jnp.abs(x), 0.0), initial=0.0)
    p = weights.astype(jnp.float32)
    entropy = -jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.maximum(p, 1e-30)), 0), -1)
    keys = jnp.sum(allowed, axis=-1).astype(jnp.float32)
    if keys.size != entropy.size:
        keys = jnp.full(entropy.shape, p.shape[-1], jnp.float32)
    keys = keys.reshape(entropy.shape)
    counted = keys > 1
    share = jnp.where(counted, entropy / jnp.log(jnp.maximum(keys, 2.0)), 0.0)
    return {
        "largest": largest,
        "entropy": jnp.sum(share) / jnp.maximum(jnp.sum(counted), 1),
    }


def of_router(weights: jax.Array) -> dict[str, jax.Array]:
    """Load of the busiest expert over its equal share, and entropy of the mean load."""
    p = weights.astype(jnp.float32).reshape(-1, weights.shape[-1])
    experts = p.shape[-1]
    first = jnp.mean(jax.nn.one_hot(jnp.argmax(p, axis=-1), experts), axis=0)
    mean = jnp.mean(p, axis=0)
    entropy = -jnp.sum(mean * jnp.log(jnp.maximum(mean, 1e-30))) / np.log(experts)
    return {"busiest": experts * jnp.max(first), "entropy": entropy}
