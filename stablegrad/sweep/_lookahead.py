"""Optax's Lookahead as a transformation of the fast weights alone."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class LookaheadState(NamedTuple):
    """State of `lookahead`."""

    slow_weights: Any
    lookahead_inner: Any  # Of `optax.lookahead`.


def lookahead(
    fast: optax.GradientTransformation, sync_period: int, slow_step_size: float
) -> optax.GradientTransformationExtraArgs:
    """`optax.lookahead`, which wants a pair of parameters, for those who train one."""
    inner = optax.lookahead(fast, sync_period, slow_step_size)

    def init_fn(params):
        pair = optax.LookaheadParams.init_synced(params)
        slow = jax.tree.map(jnp.copy, params)
        return LookaheadState(slow, inner.init(pair))

    def update_fn(updates, state, params: Any = None, **extra):
        del extra
        pair = optax.LookaheadParams(fast=params, slow=state.slow_weights)
        moves: Any
        moves, after = inner.update(updates, state.lookahead_inner, pair)
        slow = optax.apply_updates(state.slow_weights, moves.slow)
        return moves.fast, LookaheadState(slow, after)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
