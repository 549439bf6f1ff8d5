"""Planted faults, healthy networks, and what a diagnosis says of them."""
