"""Clipping for an `optax.chain`: the published methods, repaired and as published."""
