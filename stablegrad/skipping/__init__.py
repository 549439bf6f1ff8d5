"""Skipping bad steps: the rules of the large trainers, repaired and as published."""
