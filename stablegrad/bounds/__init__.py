"""Showing that a step stays finite, from the ranges of what enters it."""
