"""Clips as published: one paper a file, with the recurrence that its authors wrote."""
