"""Lookahead as a transformation of one set of parameters, the fast weights."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class LookaheadState(NamedTuple):
    slow_weights: Any
    lookahead_inner: Any  # State of `optax.lookahead`.


def lookahead(
    fast: optax.GradientTransformation, sync_period: int, slow_step_size: float
) -> optax.GradientTransformationExtraArgs:
    """Wrap `optax.lookahead`, which updates a pair of parameters, to update one."""
    inner = optax.lookahead(fast, sync_period, slow_step_size)

    def init_fn(params):
        pair = optax.LookaheadParams.init_synced(params)
        return LookaheadState(jax.tree.map(jnp.copy, params), inner.init(pair))

    def update_fn(updates, state, params: Any = None, **extra):
        del extra
        pair = optax.LookaheadParams(fast=params, slow=state.slow_weights)
        moves: Any
        moves, inner_state = inner.update(updates, state.lookahead_inner, pair)
        slow = optax.apply_updates(state.slow_weights, moves.slow)
        return moves.fast, LookaheadState(slow, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
