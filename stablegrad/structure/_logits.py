"""Bounded logits: soft cap, z-loss, and attention whose logits stay in sight."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._checks import require


class Attended(NamedTuple):
    """The output of `attend`."""

    output: jax.Array  # (..., queries, heads, depth)
    largest_logits: (
        jax.Array
    )  # float32 (heads,): before the cap, over all that is seen.


def soft_cap(logits: jax.Array, cap: float | jax.Array) -> jax.Array:
    """Bound logits to (-cap, cap), and leave small ones almost as they are.

        z <- cap tanh(z / cap)

    Args:
        logits: Of any shape and floating-point dtype.
        cap: The bound, finite and > 0. Gemma 2 has 50 for attention and 30 for its
            outputs.

    Returns:
        Logits of the same shape and dtype. A nan stays nan, an inf becomes the cap.

    Raises:
        TypeError: If `logits` are not floating-point.
        ValueError: If a concrete `cap` is not finite and > 0.

    Example:
        >>> import jax.numpy as jnp
        >>> import stablegrad as sg
        >>> sg.structure.soft_cap(jnp.array([0.0, 50.0, 1e9]), 50.0).round().tolist()
        [0.0, 38.0, 50.0]

    Reference:
        Gemma 2 (2024), https://arxiv.org/abs/2408.00118.
    """
    require("cap", cap, "finite and > 0", lambda x: 0 < x < math.inf)
    logits = _floating("logits", logits)
    wide = np.promote_types(logits.dtype, np.float32)  # float16 may not hold the cap.
    cap = jnp.asarray(cap, wide)
    return (cap * jnp.tanh(logits.astype(wide) / cap)).astype(logits.dtype)


def _floating(name: str, x) -> jax.Array:
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"`{name}` must be floating-point, got {x.dtype}.")
    return x


def z_loss(logits: jax.Array, coefficient: float | jax.Array = 1e-4) -> jax.Array:
    """Return the z-loss, a penalty that keeps log Z near 0.

        coefficient (log sum exp z)^2,    its gradient: 2 coefficient log(Z) softmax(z)

    Args:
        logits: Shape (..., classes).
        coefficient: Weight of the term, >= 0.

    Returns:
        One number an example, float32 or wider, shape (...). Add its mean to the loss.

    Raises:
        TypeError: If `logits` are not floating-point.
        ValueError: If a concrete `coefficient` is negative.

    Example:
        >>> import jax.numpy as jnp
        >>> import stablegrad as sg
        >>> round(float(sg.structure.z_loss(jnp.zeros(32768))), 5)
        0.01081

    Reference:
        PaLM, Chowdhery et al. (2022), https://arxiv.org/abs/2204.02311.
    """
    require("coefficient", coefficient, ">= 0", lambda x: x >= 0)
    logits = _floating("logits", logits)
    wide = logits.astype(np.promote_types(logits.dtype, np.float32))
    square = jnp.square(jax.nn.logsumexp(wide, axis=-1))
    return jnp.asarray(coefficient, wide.dtype) * square


def normalize_qk(
    query: jax.Array, key: jax.Array, *, eps: float = 1e-6
) -> tuple[jax.Array, jax.Array]:
    """Divide queries and keys by their root mean square: QK-norm.

        q <- q / sqrt(mean q^2 + eps),  the same for k:    |q.k| / sqrt(d) <= sqrt(d)

    Flax's attention has it with learned gains: `normalize_qk=True`.

    Args:
        query: Shape (..., depth d of a head).
        key: The same.
        eps: Added to the mean square before the root, > 0.

    Returns:
        Both, in their own dtypes; computed in float32.

    Raises:
        TypeError: If queries or keys are not floating-point.
        ValueError: If a concrete `eps` is not > 0.

    Example:
        >>> import jax.numpy as jnp
        >>> import stablegrad as sg
        >>> query, key = sg.structure.normalize_qk(jnp.full(64, 1e3), jnp.ones(64))
        >>> round(float(query @ key / 8), 3)
        8.0

    Reference:
        Dehghani et al. (2023), https://arxiv.org/abs/2302.05442.
    """
    require("eps", eps, "> 0", lambda x: x > 0)

    def normalized(x):
        wide = x.astype(np.promote_types(x.dtype, np.float32))
        # The result does not depend on the unit; without it large squares overflow.
        unit = jnp.max(jnp.abs(wide), axis=-1, keepdims=True, initial=1.0)
        unit = jax.lax.stop_gradient(jnp.where(jnp.isfinite(unit), unit, 1.0))
        wide /= unit
        square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        least = jnp.asarray(eps, wide.dtype) / jnp.square(unit)
        return (wide * jax.lax.rsqrt(square + least)).astype(x.dtype)

    return normalized(_floating("query", query)), normalized(_floating("key", key))


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None = None,
    *,
    cap: float | None = None,
    qk_norm: bool = False,
) -> Attended:
    """Compute attention with bounded logits, and return the largest of every head.

        z = q.k / sqrt(d);    z <- cap tanh(z / cap);    output = softmax(z) v

    The largest logits are what `clip_logits` needs. The logits are materialised, which
    fused attention avoids.

    Args:
        query: Shape (..., queries, heads, depth d).
        key: Shape (..., keys, heads, depth d); one head is shared by all queries.
        value: Shape (..., keys, heads, depth); one head is shared by all queries.
        mask: Broadcastable to (..., heads, queries, keys). What is False or 0 is not
            seen, as in Flax's masks; a bias to be added to the logits is no mask.
        cap: Bound of `soft_cap` on the logits, > 0. None: no cap.
        qk_norm: Whether queries and keys go through `normalize_qk`.

    Returns:
        `Attended`: the output in the dtype of `value`, and the largest logits, through
        which no gradient flows; -inf where nothing is seen. Logits and softmax are
        float32 or wider.

    Raises:
        ValueError: If a concrete `cap` is not > 0, or keys or values have another
            number of heads than 1 and that of the queries.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import stablegrad as sg
        >>> x = jax.random.normal(jax.random.key(0), (2, 5, 4, 8))
        >>> output, largest = sg.structure.attend(x, x, x, cap=50.0)
        >>> output.shape, largest.shape
        ((2, 5, 4, 8), (4,))

    Reference:
        Vaswani et al. (2017), https://arxiv.org/abs/1706.03762.
    """
    heads = query.shape[-2]
    if not {key.shape[-2], value.shape[-2]} <= {1, heads}:
        raise ValueError(
            f"`key` and `value` must have 1 head or the {heads} of `query`, got "
            f"{key.shape[-2]} and {value.shape[-2]}. Repeat those that several queries "
            "share: `jnp.repeat(key, times, axis=-2)`."
        )
    if qk_norm:
        query, key = normalize_qk(query, key)
    # Added up in float32: q.k of float16 can overflow where q.k / sqrt(d) does not.
    wide = np.promote_types(np.promote_types(query.dtype, key.dtype), np.float32)
    pairs = "...qhd,...khd->...hqk"
    products = jnp.einsum(pairs, query, key, preferred_element_type=wide)
    logits = products / jnp.asarray(math.sqrt(query.shape[-1]), wide)
    seen = logits if mask is None else jnp.where(mask, logits, -jnp.inf)
    others = tuple(i for i in range(seen.ndim) if i != seen.ndim - 3)
    largest = jnp.max(seen, axis=others, initial=-jnp.inf).astype(jnp.float32)
    if cap is not None:
        logits = soft_cap(logits, cap)
    if mask is not None:
        # Not -inf: a query that sees nothing would be nan.
        logits = jnp.where(mask, logits, jnp.finfo(wide).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    output = jnp.einsum("...hqk,...khd->...qhd", weights, value)
    return Attended(output, jax.lax.stop_gradient(largest))
