"""Granularity: the groups of elements whose norms a rule judges separately."""
