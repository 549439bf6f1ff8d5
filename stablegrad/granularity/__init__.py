"""Granularity: into which groups the numbers of a step fall."""
