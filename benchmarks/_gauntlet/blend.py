"""Levanter's skip step as its authors wrote it: a step is masked by multiplying."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

WINDOW = 128
SIGMA = 6.0


class BlendState(NamedTuple):
    """State of `blending_skip`."""

    inner_state: Any
    past: jax.Array  # float32 (2, window): losses and gradient norms, raw.
    seen: jax.Array  # int32


def blending_skip(inner: optax.GradientTransformation):
    """Multiplies the update by 0 where loss or norm is an outlier: 0 * nan is nan."""
    inner = optax.with_extra_args_support(inner)

    def init_fn(params) -> BlendState:
        past = jnp.zeros((2, WINDOW), jnp.float32)
        return BlendState(inner.init(params), past, jnp.zeros((), jnp.int32))

    def update_fn(updates, state: BlendState, params=None, *, value, **extra):
        norm = optax.global_norm(updates)
        now = jnp.stack([value, norm]).astype(jnp.float32)
        used = jnp.arange(WINDOW) < state.seen
        where = jnp.broadcast_to(used, state.past.shape)
        mean = jnp.mean(state.past, axis=-1, where=where)
        std = jnp.maximum(jnp.std(state.past, axis=-1, where=where), 1e-6)
        fine = jnp.all(now <= mean + SIGMA * std) | (state.seen < WINDOW // 2)
        out, inner_state = inner.update(updates, state.inner_state, params, **extra)
        factor = fine.astype(jnp.float32)
        out = jax.tree.map(lambda u: (factor * u).astype(u.dtype), out)
        inner_state = jax.tree.map(
            lambda new, old: jnp.where(fine, new, old), inner_state, state.inner_state
        )
        past = state.past.at[:, state.seen % WINDOW].set(now)
        return out, BlendState(inner_state, past, state.seen + 1)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
