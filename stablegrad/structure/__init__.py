"""Layers that bound the gradients inside a network."""
