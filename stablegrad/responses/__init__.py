"""Responses of a guard to a step that is not normal."""
