"""What `metrics` shows of a trust region."""

import jax
import jax.numpy as jnp

from ._radius import RELEASE, TrustRegionState, init_radius

SHOWN = ("ratio", "scale", "probes", "cuts", "mismatch")


def numbers_of_trust(response_states) -> dict[str, jax.Array]:
    """Of the first trust region among a guard's responses."""
    for state in response_states:
        if isinstance(state, TrustRegionState):
            # Bare arrays, where NNX has wrapped each in a variable.
            bare = jax.tree.structure(init_radius())
            state = jax.tree.unflatten(bare, jax.tree.leaves(state))
            binds = state.trust_radius < RELEASE * state.own_length
            radius = jnp.where(binds, state.trust_radius, jnp.inf)
            shown = {f"trust_{name}": getattr(state, f"trust_{name}") for name in SHOWN}
            return {"trust_radius": radius, **shown}
    return {}
