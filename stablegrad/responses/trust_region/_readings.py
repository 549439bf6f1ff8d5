"""What `metrics` shows of a trust region."""

import jax
import jax.numpy as jnp

from ._radius import RELEASE, TrustRegionState

SHOWN = ("ratio", "scale", "probes", "cuts", "mismatch")


def readings(state: TrustRegionState) -> dict[str, jax.Array]:
    """Return the numbers of a trust region by name, finite."""
    binds = state.trust_radius < RELEASE * state.own_length
    radius = jnp.where(binds, state.trust_radius, jnp.inf)
    shown = {f"trust_{name}": getattr(state, f"trust_{name}") for name in SHOWN}
    return {"trust_radius": radius, **shown}
