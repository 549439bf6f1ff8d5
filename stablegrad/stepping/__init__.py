"""The ways to take one step: checked after it is computed, or shown safe before."""
